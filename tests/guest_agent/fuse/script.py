"""A kernel, a host and a notifier that a test plays: requests in, calls out, results in, replies out."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guest_agent.fuse.abi import Request
from guest_agent.fuse.distance import Distance
from guest_agent.fuse.filesystem import Filesystem
from guest_agent.fuse.host import Host
from guest_agent.fuse.notifier import NotifierFull
from guest_agent.fuse.volume import Volume
from protocol import codec
from protocol.api import Done
from protocol.bulk import Run
from protocol.errors import LinkClosed, LinkError
from protocol.files import ATTR, FileCall
from protocol.link import OnResult
from protocol.messages import Result

ATTRIBUTES = ATTR.pack(11, 12, 8, 1, 2, 3, 4, 5, 6, 0o100644, 1, 1000, 1000, 0, 4096, 0)


@dataclass
class Asked:
    """A call that has reached the host."""

    call: FileCall[Any]
    payload: bytes | Run
    on_result: OnResult

    def answer(self, value: object = None, payload: bytes = b"") -> None:
        self.on_result(Result(1, 0, codec.encode(Done() if value is None else value), payload))

    def fail(self, number: int) -> None:
        self.on_result(Result(1, number, None))


class ScriptedLink:
    """One session."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.over = False
        self.gathered = self.stuck = 0
        """Bytes that wait for another call or an answer, and those that the transport does not take."""

    def call(
        self, call: FileCall[Any], payload: bytes | Run, on_result: OnResult, *, gather: bool = False
    ) -> None:
        if self.over:
            raise LinkClosed("over")
        self.asked.append(Asked(call, payload, on_result))
        self.gathered = self.gathered + len(payload) if gather else 0

    @property
    def backlog(self) -> int:
        return self.gathered + self.stuck

    def take(self) -> Asked:
        return self.asked.pop(0)

    @property
    def calls(self) -> list[FileCall[Any]]:
        return [asked.call for asked in self.asked]

    def end(self, error: LinkError | None = None) -> None:
        """As ``Link`` does: tell everybody, and be of no use any more."""
        self.over = True
        for asked in self.asked:
            asked.on_result(error or LinkClosed("over"))


class ScriptedKernel:
    """What was answered, in order, and whatever else a test wants to see in that order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def reply(self, unique: int, *buffers: bytes | bytearray | memoryview) -> None:
        self.log.append(("reply", unique, b"".join(buffers)))

    def fail(self, unique: int, error: int) -> None:
        self.log.append(("fail", unique, error))


class ScriptedNotifier:
    """Drops what it is told to when the test lets it."""

    def __init__(self, kernel: ScriptedKernel) -> None:
        self._log = kernel.log
        self.waiting: list[tuple[int, Callable[[], None]]] = []
        self.sequences: list[tuple[bytes, Callable[[], None]]] = []
        self.full = False

    def invalidate_data(self, node: int, then: Callable[[], None]) -> None:
        if self.full:
            raise NotifierFull("full")
        self.waiting.append((node, then))

    def invalidate_entry(self, parent: int, name: bytes, then: Callable[[], None]) -> None:
        raise NotifierFull("names are nobody's concern here")

    def sequence(self, notifications: bytes, then: Callable[[], None]) -> None:
        self.sequences.append((notifications, then))

    def finish(self) -> None:
        node, then = self.waiting.pop(0)
        self._log.append(("dropped", node))
        then()


class ScriptedTimers:
    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        self.waiting.append((seconds, function))

    def fire(self) -> float:
        seconds, function = self.waiting.pop(0)
        function()
        return seconds


class Away(Distance):
    """Of a host that is so many seconds away."""

    def __init__(self, round_trip: float) -> None:
        super().__init__()
        self.round_trip = round_trip

    def answered(self, call: object) -> None:
        """However long it took."""


class Script:
    """One share's file system between its players. ``link`` is None while the host is away. ``round_trip``: seconds, of a
    host that may be far."""

    def __init__(
        self,
        *,
        salt: int = 0,
        host_locks: bool = False,
        connected: bool = True,
        inherited: bool = False,
        round_trip: float | None = None,
    ) -> None:
        self.kernel = ScriptedKernel()
        self.notifier = ScriptedNotifier(self.kernel)
        self.timers = ScriptedTimers()
        self.dying: set[int] = set()
        """Threads that are to be killed."""
        self.runs: dict[int, int] = {}
        """How often threads have been given a processor, where that is known."""
        distance = None if round_trip is None else Away(round_trip)
        self.host = Host(lambda thread: thread in self.dying, distance)
        self.link = ScriptedLink()
        if connected:
            self.host.attach(self.link)
        self.volumes: set[Volume] = set()
        """Of the same share."""
        self.volume = Volume(
            7,
            self.host,
            self.notifier,
            self.timers,  # type: ignore[arg-type]
            salt=salt,
            host_locks=host_locks,
            volumes=self.volumes,
            inherited=inherited,
            times_run=lambda thread: self.runs.get(thread),
        )
        self._filesystem = Filesystem(self.kernel, self.volume)
        self._unique = 0

    def request(
        self, opcode: int, body: bytes = b"", node: int = 5, unique: int | None = None, pid: int = 42
    ) -> int:
        """Hand in a request, with a buffer that is scribbled over at once; returns its unique."""
        if unique is None:
            self._unique += 2
            unique = self._unique
        buffer = bytearray(body)
        self._filesystem.handle(Request(opcode, unique, node, 1000, 1000, pid, memoryview(buffer)))
        buffer[:] = b"\xee" * len(buffer)
        return unique

    def take(self) -> Asked:
        return self.link.take()

    @property
    def answers(self) -> list[tuple[Any, ...]]:
        """What was answered since the last look, in order."""
        log, self.kernel.log[:] = list(self.kernel.log), []
        return log

    def lose_host(self) -> None:
        self.link.end()
        self.host.detach(self.link)

    def find_host(self) -> None:
        self.link = ScriptedLink()
        self.host.attach(self.link)


def pack(layout: str, *values: Any) -> bytes:
    return struct.pack("<" + layout, *values)


def failed(unique: int, name: str) -> list[tuple[Any, ...]]:
    return [("fail", unique, getattr(errno, name))]


def replied(unique: int, reply: bytes = b"") -> list[tuple[Any, ...]]:
    return [("reply", unique, reply)]
