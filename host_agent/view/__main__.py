"""``python -m host_agent.view``: the process that shows the guest's files at a path of this machine.

The laws: the thread that was here first serves the kernel, since libfuse wants it; all that waits for others is in a
second one, where trio runs. Either's end is the other's. A guard takes the mount off should neither be able to.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from host_agent.agentlog import FORMAT
from host_agent.client import hello
from host_agent.view import guard
from host_agent.view.asking import ANSWER_TIME, PATIENCE, Guest
from host_agent.view.attributes import Owner, Ownership
from host_agent.view.control import GetViewState, ViewChanged, ViewState
from host_agent.view.files import Files
from host_agent.view.unmounting import source_of, unmount
from protocol.api import ViewPlace
from protocol.errors import AgentctlProtocolError, LinkError
from protocol.link import Link, Service
from protocol.session import Role

logger = logging.getLogger(__name__)

ARRANGE_TIME: Final = 40.0
"""Seconds for the guest to say what it shows: an emulated one starts a process and asks its dockerd first."""

SWITCH_INTERVAL: Final = 0.0005
"""Seconds: each call changes threads twice."""

LAST_TIME: Final = 5.0
"""Seconds for the thread that serves to end what it does."""

TELL_AFTER: Final = 0.05
"""Seconds after one word of how it is until the next."""

NO_ANSWER: Final = "the guest does not say what there is to see"


class View:
    """Both threads, and what one tells the other. ``_serving`` is the identity of the one that serves."""

    def __init__(self, arguments: argparse.Namespace, source: str) -> None:
        self._arguments = arguments
        self._source = source
        self._serving = threading.get_ident()
        self._ready = threading.Event()
        self._over = threading.Event()
        self._guest: Guest | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._mounted = False
        self._reason = ""
        self._ending = False

    def run(self) -> int:
        """The process's life; its exit status. In the thread that serves."""
        beside = threading.Thread(target=self._run_beside, daemon=True)
        beside.start()
        self._ready.wait()
        status = 1
        if self._guest is not None and not self._reason:
            status = self._serve(self._guest)
        self._ending = True
        self._in_trio(lambda: self._end.set())
        beside.join(LAST_TIME)
        return status

    def _serve(self, guest: Guest) -> int:
        from host_agent.view.mounting import FuseError, serve

        path = str(self._arguments.path)
        files = Files(guest, Ownership.of_this_process(Owner(self._arguments.owner)))
        try:
            serve(files, path, self._source, self._on_mounted, guest.begin_operation)
        except FuseError as error:
            if self._mounted:  # a signal has ended it
                return 0
            self._reason = f"{path} could not be mounted: {error}"
            self._in_trio(self._changed)
            time.sleep(0.2)  # so that it is told
            return 1
        finally:
            unmount(path, self._source)
        return 0

    def _on_mounted(self) -> None:
        self._mounted = True
        self._in_trio(self._changed)

    def _in_trio(self, function: object) -> None:
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function)  # type: ignore[arg-type]

    # --- the thread beside ---------------------------------------------------------------------------

    def _run_beside(self) -> None:
        try:
            trio.run(self._live)
        except BaseException:
            logger.exception("the view's link failed")
        finally:
            self._over.set()
            self._ready.set()
            if not self._ending:
                # libfuse's handler asks its loop to end, which must be interrupted for that.
                signal.pthread_kill(self._serving, signal.SIGTERM)

    async def _live(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._end, self._news = trio.Event(), trio.Event()
        control = socket.socket(fileno=self._arguments.control_fd)
        service = Service()
        service.on_request(GetViewState, self._get_state)
        self._control = Link(
            trio.SocketStream(trio.socket.from_stdlib_socket(control)),
            Role.SERVER,
            service,
            hello("agentctl-view"),
        )
        guest = Guest(
            self._arguments.guest_socket,
            self._changed,
            patience=self._arguments.patience,
            answer_time=self._arguments.answer_time,
            packed=self._arguments.packed,
        )
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._be_controlled)
            self._nursery.start_soon(self._tell)
            self._nursery.start_soon(guest.run)
            if not await guest.wait_arranged(ARRANGE_TIME):
                self._reason = NO_ANSWER
                self._changed()
            self._guest = guest
            self._ready.set()
            await self._end.wait()
            self._nursery.cancel_scope.cancel()

    async def _be_controlled(self) -> None:
        """The end of the host agent is ours."""
        try:
            await self._control.run()
        except LinkError as error:
            logger.warning("the link to the host agent failed: %s", error)
        self._nursery.cancel_scope.cancel()

    async def _get_state(self, request: GetViewState) -> ViewState:
        await trio.lowlevel.checkpoint()
        return self._state()

    def _state(self) -> ViewState:
        guest = self._guest
        places = [] if guest is None else guest.tree.places
        return ViewState(
            self._mounted,
            guest is not None and guest.connected,
            self._reason,
            [ViewPlace(os.fsdecode(b"/".join(place.path)), place.read_only) for place in places],
        )

    def _changed(self) -> None:
        self._news.set()

    async def _tell(self) -> None:
        """However often the guest has something else to show: one word at a time, and not too many."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            with suppress(AgentctlProtocolError, RuntimeError):
                await self._control.notify(ViewChanged(self._state()))
            await trio.sleep(TELL_AFTER)


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=FORMAT)
    logging.getLogger("fuse").setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH_INTERVAL)
    # libfuse has handlers of its own where there are none: by these the other thread ends the wait of this one.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    source = source_of(arguments.name, os.getpid())
    guard.start(str(arguments.path), source)
    status = View(arguments, source).run()
    logging.shutdown()
    os._exit(status)  # a thread that hangs does not keep the process alive


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m host_agent.view")
    parser.add_argument("path", type=Path, help="an empty directory")
    parser.add_argument("--guest-socket", type=Path, required=True, help="QEMU's socket of the port")
    parser.add_argument("--control-fd", type=int, required=True, help="a connected stream socket")
    parser.add_argument("--owner", choices=[owner.value for owner in Owner], default=Owner.ME.value)
    parser.add_argument("--packed", action="store_true", help="pack what travels where that pays")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for a link to come back")
    parser.add_argument("--answer-time", type=float, default=ANSWER_TIME, help="seconds for an answer")
    parser.add_argument("--name", default="agentctl", help="of the instance, for df(1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
