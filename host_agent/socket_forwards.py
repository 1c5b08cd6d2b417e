"""Unix sockets that appear on the other side: the guest's on the host, and the host's in the guest (``reverse``).

The law: the list is the user's and is kept; what is on it is there for as long as the instance runs, and goes with it.
A path that somebody else listens at is said to be a conflict, and taken once it is free.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from host_agent import socket_rules
from host_agent.errors import UserError
from host_agent.forwarders import Connections, Dial, UnixForwarder
from host_agent.reverse import ReverseForwards
from protocol.api import ChangeSocketForwards, DialUnix, ForwardState, SocketForward, SocketRow, SocketRows

logger = logging.getLogger(__name__)

#: How often a path that could not be had is tried again, seconds.
RETRY = 1.0

#: Keeps the list. Raises ``OSError``.
Remember = Callable[[tuple[SocketForward, ...]], None]


def remove_stale(paths: Iterable[str]) -> None:
    """Unlink what a killed host agent has left: the sockets at which nobody listens."""
    for path in paths:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:  # a file that is no socket refuses, too
                with suppress(OSError):
                    if stat.S_ISSOCK(os.lstat(path).st_mode):
                        os.unlink(path)
            except OSError:
                pass  # it is gone, or somebody's whose backlog is full


class _Listening:
    """A socket of the guest's on the host."""

    def __init__(self, forward: SocketForward, dial: Dial, carried: Connections | None) -> None:
        self.forward = forward
        self.reason: str | None = None
        """None once it listens."""
        self.state = ForwardState.CONFLICT
        """What it is while it does not."""
        self.scope = trio.CancelScope()
        self._dial = dial
        self._carried = carried
        self.tried, self.ended = trio.Event(), trio.Event()

    async def run(self) -> None:
        """Listen, as soon as that is possible, until ``scope`` is cancelled."""
        try:
            with self.scope:
                await self._keep_listening()
        finally:
            self.tried.set()
            self.ended.set()

    async def _keep_listening(self) -> None:
        forwarder = UnixForwarder(
            Path(self.forward.host),
            DialUnix(self.forward.guest),
            self._dial,
            carried=self._carried,
            report=self._report,
        )
        said = ""
        while True:
            try:
                await forwarder.run(_Started(partial(self._report, None)))
            except (UserError, OSError) as error:
                if str(error) != said:
                    logger.info("cannot listen at %s: %s", self.forward.host, error)
                said = str(error)
                self._report(error)
            await trio.sleep(RETRY)

    def _report(self, error: UserError | OSError | None) -> None:
        match error:
            case None:
                self.reason = None
            case UserError():
                self.state, self.reason = ForwardState.CONFLICT, error.message
            case PermissionError():
                self.state, self.reason = ForwardState.DENIED, error.strerror or str(error)
            case OSError():
                self.state, self.reason = ForwardState.PENDING, error.strerror or str(error)
        self.tried.set()


@dataclass(frozen=True, slots=True)
class _Started:
    """Tells that what a task is to begin with has begun."""

    on_started: Callable[[], None]

    def started(self, value: object = None) -> None:
        self.on_started()


class SocketForwards:
    """All of them. ``register`` and the two ``link_`` functions belong to the link to the guest.

    ``carried``: who else they share the places for connections with. ``own`` are those of the host in the guest that
    are agentctl's, and on nobody's list; the user's win.
    """

    def __init__(
        self,
        forwards: Sequence[SocketForward],
        dial: Dial,
        remember: Remember,
        carried: Connections | None = None,
        own: Sequence[SocketForward] = (),
    ) -> None:
        self._forwards = tuple(forwards)
        self._own = tuple(own)
        self._dial = dial
        self._remember = remember
        self._carried = carried
        self._reverse = ReverseForwards(self._in_guest())
        self._listening: dict[SocketForward, _Listening] = {}
        self._nursery: trio.Nursery | None = None
        self._changing = trio.Lock()
        self.register = self._reverse.register
        self.link_up = self._reverse.link_up
        self.link_lost = self._reverse.link_lost

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then all sockets on the host are gone. Started when each has been tried once."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._reverse.run)
                await self._listen()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def report(self) -> SocketRows:
        """How each is doing, in the order in which they were added."""
        await trio.lowlevel.checkpoint()
        return SocketRows([self._row(forward) for forward in self._forwards])

    async def change(self, change: ChangeSocketForwards) -> SocketRows:
        """Remove and add, now and for each start; what is there already stays as it is.

        Raises ``UserError`` for what cannot be, ``OSError`` if it cannot be kept; then nothing has changed.
        """
        async with self._changing:
            wanted = socket_rules.changed(self._forwards, change)
            self._remember(wanted)
            self._forwards = wanted
            told = self._reverse.replace(self._in_guest())
            # Who asked for it may leave: what is on the list is there all the same. It waits for nobody but us.
            with trio.CancelScope(shield=True):
                await self._listen()
        if self._nursery is not None:
            await told.wait()
        return await self.report()

    async def use_own(self, own: Sequence[SocketForward]) -> None:
        """Have these of agentctl's instead. Returns when the guest has been told, if there is one."""
        async with self._changing:
            self._own = tuple(own)
            told = self._reverse.replace(self._in_guest())
        if self._nursery is not None:
            await told.wait()

    def _in_guest(self) -> list[SocketForward]:
        return [*self._own, *(each for each in self._forwards if each.reverse)]

    async def _listen(self) -> None:
        """Have what is on the list, and nothing else. Returns when each has been tried."""
        wanted = [each for each in self._forwards if not each.reverse]
        for forward in [each for each in self._listening if each not in wanted]:
            removed = self._listening.pop(forward)
            removed.scope.cancel()
            await removed.ended.wait()
        for forward in wanted:
            if forward not in self._listening and self._nursery is not None:
                listening = self._listening[forward] = _Listening(forward, self._dial, self._carried)
                self._nursery.start_soon(listening.run)
        for listening in list(self._listening.values()):
            await listening.tried.wait()

    def _row(self, forward: SocketForward) -> SocketRow:
        if forward.reverse:
            return self._reverse.row(forward)
        if (listening := self._listening.get(forward)) is None or not listening.tried.is_set():
            return SocketRow(forward, ForwardState.PENDING)
        if listening.reason is not None:
            return SocketRow(forward, listening.state, listening.reason)
        return SocketRow(forward, ForwardState.LISTENING)
