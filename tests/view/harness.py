"""The view without a VM: the guest's process and the host's, both real, on one kernel.

A ``Port`` stands in for QEMU, and the mount is in a mount namespace of its own: no process of the test run follows a path
into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import trio

from guest_agent.view.places import Place
from host_agent.view.control import GetViewState, ViewState
from host_agent.view.unmounting import KIND
from protocol.errors import LinkError
from protocol.link import Hello, Link, Role, Service
from tests.files.harness import TrioThread, eventually, loose_directory
from tests.files.namespace import Finished, Namespace, Running
from tests.files.ordinary import GUEST, UsersNamespace
from tests.files.port import Port
from tests.files.service import SOURCES


class View:
    """Both sides, with ``places`` shown; ``path`` is where. Only for processes in ``namespace``."""

    def __init__(
        self, *places: Place, owner: str = "me", hasty: bool = False, ordinary: bool = False
    ) -> None:
        """``hasty``: who waits for the guest gives up in some seconds. ``ordinary``: it is shown to a user who is not
        root, and by that one."""
        self._hasty = hasty
        self._ordinary = ordinary
        self.places = list(places)
        self._owner = owner
        self._guest: subprocess.Popen[bytes] | None = None
        self._view: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> View:
        with contextlib.ExitStack() as stack:
            self.directory = stack.enter_context(loose_directory())
            self.path = self.directory / "view"
            self.path.mkdir()
            kind = UsersNamespace if self._ordinary else Namespace
            self.namespace = stack.enter_context(kind(self.directory, KIND))
            self._loop = stack.enter_context(TrioThread())
            self._sockets = self.directory / "host.sock", self.directory / "guest.sock"
            self.port = stack.enter_context(Port(*self._sockets))
            if self._ordinary:
                for path in (self.path, self._sockets[0]):
                    os.chown(path, GUEST, GUEST)
            stack.push(self._show_logs)
            stack.callback(self.namespace.force_unmount)
            stack.callback(self.kill_view)
            stack.callback(self.kill_guest)
            self.tell(*self.places)
            self.start_guest()
            self.start_view()
            self.wait_mounted()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        logs = self._logs()
        self._stack.__exit__(kind, *exception)
        if kind is None:
            for name, text in logs.items():
                assert "Traceback" not in text, f"{name}:\n{text[-6000:]}"

    def _logs(self) -> dict[str, str]:
        found = {}
        for name in ("guest.log", "view.log"):
            with contextlib.suppress(OSError):
                found[name] = (self.directory / name).read_text(errors="replace")
        return found

    def _show_logs(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            for name, text in self._logs().items():
                print(f"--- {name}\n{text[-6000:]}")

    # --- the guest -----------------------------------------------------------------------------------

    def tell(self, *places: Place) -> None:
        """From now on the guest has these."""
        new = self.directory / "places.new"
        new.write_text(json.dumps([asdict(place) for place in places]))
        new.rename(self.directory / "places")

    def start_guest(self) -> None:
        argv = [sys.executable, "-m", "tests.view.guest", str(self.directory / "places")]
        with (self.directory / "guest.log").open("ab") as log:
            self._guest = subprocess.Popen(
                [*argv, "--connect-unix", str(self._sockets[1])],
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(SOURCES)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_guest(self) -> None:
        if self._guest is not None:
            guest, self._guest = self._guest, None
            guest.kill()
            guest.wait(20)

    def signal_guest(self, number: signal.Signals) -> None:
        assert self._guest is not None
        self._guest.send_signal(number)

    # --- the host ------------------------------------------------------------------------------------

    def start_view(self) -> None:
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "host_agent.view", str(self.path), "--owner", self._owner]
        argv += [
            "--guest-socket",
            str(self._sockets[0]),
            "--control-fd",
            str(theirs.fileno()),
            "--name",
            "test",
        ]
        if self._hasty:
            argv += ["--patience", "2", "--answer-time", "5"]
        with (self.directory / "view.log").open("ab") as log, theirs:
            self._view = subprocess.Popen(
                self.namespace.command(argv),
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(SOURCES)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._link: Link = self._loop.start(self._run, ours)

    async def _run(self, ours: socket.socket, task_status: trio.TaskStatus[Link]) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with contextlib.suppress(LinkError):
            await Link(stream, Role.CLIENT, Service(), Hello(name="test"), dead_after=120).run(task_status)

    def state(self) -> ViewState:
        return self._loop.call(self._link.request, GetViewState())

    def wait_mounted(self) -> None:
        eventually("the view is mounted", lambda: self.state().mounted, 60)

    @property
    def view_pid(self) -> int:
        assert self._view is not None
        return self._view.pid

    def kill_view(self) -> None:
        if self._view is not None:
            view, self._view = self._view, None
            with contextlib.suppress(ProcessLookupError):
                os.kill(view.pid, signal.SIGCONT)
            view.kill()
            view.wait(20)

    def end_view(self) -> int:
        """Hang up, as the host agent does when it ends; returns the exit status."""
        assert self._view is not None

        async def leave() -> None:
            with contextlib.suppress(LinkError):
                await self._link.goodbye("the test is over")

        self._loop.call(leave)
        return self.wait_view()

    def wait_view(self) -> int:
        """It ends; its exit status."""
        assert self._view is not None
        view, self._view = self._view, None
        return view.wait(30)

    def is_mounted(self) -> bool:
        return bool(self.namespace.mounts())

    # --- programs in it ------------------------------------------------------------------------------

    def run(self, argv: Sequence[str], **options: Any) -> Finished:
        return self.namespace.run(argv, **{"cwd": self.path, **options})

    def sh(self, script: str, **options: Any) -> str:
        return self.run(["sh", "-ec", script], **options).output

    def python(self, script: str, *arguments: str, **options: Any) -> str:
        return self.run([sys.executable, "-c", script, *arguments], **options).output

    def start(self, argv: Sequence[str]) -> Running:
        return self.namespace.start(argv, cwd=self.path)
