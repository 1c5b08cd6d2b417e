"""A guest made by hand that has memory in common with the real file server, and lies about it.

It speaks frame by frame, and nothing of what it says is checked on this side; the sessions that the server ends
are followed by others. What it would map as a file of its device, it maps out of the same memory (``memory``).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fileserver.control import SharedFolder
from protocol import codec, messages
from protocol.bulk import MARK_SIZE, MAX_RUN, SLOT
from protocol.errors import ErrorCode
from protocol.files import (
    MAX_FILES_PAYLOAD,
    ROOT,
    FileCall,
    GetAttributes,
    Lookup,
    MountReport,
    MountReports,
    MountStage,
    Read,
    Write,
)
from protocol.frames import FrameDecoder, encode_frame
from protocol.link import SerialChannel
from protocol.messages import AnyFrame, BulkOffer, Goodbye, Hello, Result
from protocol.region import FILE_SIZE, FILES, MARK_PAGE, SLOTS, Region
from protocol.session import Role
from tests.files.harness import FileServer, TrioThread, loose_directory
from tests.files.memory import START, Memory, Use, memory
from tests.fileserver.peers import port

SHARE: Final = 7
SOON: Final = 20.0
ALL: Final = (1 << FILES.slots) - 1
"""A mask of all slots of a half."""

OF_A_RUN: Final = MAX_RUN // SLOT
ANY_OFFER: Final = BulkOffer([START, FILE_SIZE], b"")
"""``HostileGuest.begin`` puts the mark in."""


class Ended(Exception):
    """The server ended the session; this is what it said last."""

    def __init__(self, goodbye: Goodbye | None) -> None:
        super().__init__("nothing" if goodbye is None else f"{goodbye.code}: {goodbye.reason}")
        self.code = None if goodbye is None else ErrorCode.parse(goodbye.code)
        self.reason = "" if goodbye is None else goodbye.reason


def call(number: int, op: int, args: object, payload: bytes = b"", run: Any = None) -> bytes:
    """A CALL's bytes. ``run`` has any shape."""
    return b"".join(messages.encode_call(number, op, args, payload, run, max_payload=MAX_FILES_PAYLOAD))


def frame(kind: type[AnyFrame], *fields: Any, payload: bytes = b"") -> bytes:
    """A frame's bytes, with fields of any shape."""
    number = next(number for number, cls in messages.TYPES.items() if cls is kind)
    return b"".join(encode_frame([number, *fields], payload))


def bitmap(mask: int) -> bytes:
    return mask.to_bytes(FILES.slots // 8, "little")


def mask_of(run: list[int]) -> int:
    first, length = run
    return ((1 << -(-length // SLOT)) - 1) << first


@dataclass(frozen=True, slots=True)
class Mapped:
    """The memory as the guest has it mapped at ``start`` of its device."""

    region: Region
    start: int

    @property
    def own(self) -> memoryview:
        """The slots that the guest fills."""
        return self.region.halves(FILES, Role.GUEST)[0]

    @property
    def hosts(self) -> memoryview:
        return self.region.halves(FILES, Role.GUEST)[1]


class HostileGuest:
    """Tests speak for it from another thread. ``top`` has the share, ``open``, and what is none of its business."""

    def __init__(self, loop: TrioThread, server: FileServer, memory: Memory, top: Path) -> None:
        self._loop = loop
        self.server = server
        self.memory = memory
        self.top = top
        self.lent = 0
        """The host's slots that we were lent in this session and have not given back."""
        self.has_memory = False
        """Whether the host has agreed to use it in this session."""
        self._numbers = itertools.count(1, 2)
        self._uniques = itertools.count(2, 2)

    async def run(self, directory: Path, task_status: trio.TaskStatus[None]) -> None:
        async with port(directory) as opened:
            task_status.started()
            self._channel: SerialChannel = await opened.accept(math.inf)
            await trio.sleep_forever()

    @contextlib.contextmanager
    def mapped(self, start: int = START) -> Iterator[Mapped]:
        with self.memory.path.open("r+b") as file:
            region = Region(mmap.mmap(file.fileno(), FILE_SIZE, flags=mmap.MAP_SHARED, offset=start))
        try:
            yield Mapped(region, start)
        finally:
            region.close()

    def mark(self, start: int = START) -> bytes:
        """A new one, on the plane's page of a file at ``start`` of the device."""
        mark = os.urandom(MARK_SIZE)
        with self.memory.path.open("r+b") as file:
            os.pwrite(file.fileno(), mark, start + SLOTS * SLOT + FILES.number * MARK_PAGE)
        return mark

    def unique(self) -> int:
        return next(self._uniques)

    # --- sessions ----------------------------------------------------------------------------------

    def begin(self, offer: BulkOffer | None = ANY_OFFER, *, busy: bytes = b"") -> None:
        """A new session, up to where the shares are mounted. Raises ``Ended``."""
        if offer is ANY_OFFER:
            offer = BulkOffer([START, FILE_SIZE], self.mark(), busy)
        hello = b"".join(messages.encode(Hello(boot_id="hostile", name="guest", bulk=offer)))
        self._loop.call(self._begin, hello)

    def begin_with(self, *offer: Any) -> None:
        """As ``begin``, with an offer of any shape."""
        fields = codec.encode(Hello(boot_id="hostile", name="guest"))
        fields[-1] = [*offer]
        self._loop.call(self._begin, frame(Hello, *fields))

    async def _begin(self, hello: bytes) -> None:
        with trio.fail_after(SOON):
            while not hasattr(self, "_channel"):
                await trio.sleep(0.01)
            self._stream = await self._channel.establish()
        self._decoder = FrameDecoder(max_payload=MAX_FILES_PAYLOAD)
        self.lent, self.has_memory = 0, False
        self._numbers = itertools.count(1, 2)
        await self._send(hello)
        while not isinstance(request := await self._next(), messages.Request):
            self.has_memory |= isinstance(request, messages.BulkBegin)
        reports = MountReports([MountReport(SHARE, MountStage.MOUNTED)])
        await self._send(b"".join(messages.encode(messages.Reply(request.id, codec.encode(reports)))))

    async def _send(self, data: bytes) -> None:
        # What ends the session is heard of when it is read.
        with trio.fail_after(SOON), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(data)

    async def _next(self) -> AnyFrame:
        with trio.fail_after(SOON):
            while (raw := self._decoder.next_frame()) is None:
                data = await self._stream.receive_some()
                if not data:
                    raise Ended(None)
                self._decoder.receive_data(bytes(data))
        received = messages.decode(raw)
        if isinstance(received, Goodbye):
            raise Ended(received)
        if isinstance(received, messages.Ping):
            await self._send(frame(messages.Pong, received.token))
        if isinstance(received, Result) and received.run is not None:
            assert not self.lent & mask_of(received.run), "the host lends what we still have"
            self.lent |= mask_of(received.run)
        return received

    # --- speaking ----------------------------------------------------------------------------------

    def send(self, *frames: bytes) -> None:
        """In one write, so that they are read together."""
        self._loop.call(self._send, b"".join(frames))

    def ended(self) -> Ended:
        """Wait for the end of the session; what the server says of it."""

        async def read_on() -> Ended:
            with trio.fail_after(SOON):
                while True:
                    try:
                        await self._next()
                    except Ended as ended:
                        return ended

        return self._loop.call(read_on)

    def number(self) -> int:
        """Of a call."""
        return next(self._numbers)

    def ask(self, op: int, args: object, payload: bytes = b"", run: Any = None) -> Result:
        """Raises ``Ended``."""
        number = self.number()

        async def ask() -> Result:
            await self._send(call(number, op, args, payload, run))
            while True:
                received = await self._next()
                if isinstance(received, Result) and received.id == number:
                    return received

        return self._loop.call(ask)

    def say(self, message: FileCall[Any], run: Any = None) -> Result:
        return self.ask(message.OP, codec.encode(message), run=run)

    def settle(self) -> None:
        """Until the server has read all that was sent. Raises ``Ended``."""
        self.say(GetAttributes(SHARE, self.unique(), ROOT))

    def free(self, mask: int) -> None:
        """Give back, and know that it was taken. Raises ``Ended``."""
        self.send(frame(messages.Free, bitmap(mask)))
        self.settle()
        self.lent &= ~mask

    def node(self, name: bytes) -> int:
        found = self.say(Lookup(SHARE, self.unique(), ROOT, name))
        assert found.errno == 0, name
        value: Any = codec.decode(Lookup.RESULT, found.value)
        return int(value.node)

    def read(self, node: int, size: int = MAX_RUN, offset: int = 0) -> Result:
        return self.say(Read(SHARE, self.unique(), node, offset, size))

    def write(self, node: int, run: Any, offset: int = 0) -> Result:
        return self.say(Write(SHARE, self.unique(), node, offset), run)

    # --- the accounts ------------------------------------------------------------------------------

    def use(self) -> Use:
        """The server's."""
        use = self.server.use()
        assert use is not None
        return use

    def check(self) -> None:
        """In a new session each slot of both halves can be used, and is free afterwards."""
        self.begin()
        assert self.has_memory
        content = os.urandom(MAX_RUN)
        (self.top / "open/check").write_bytes(content)
        node = self.node(b"check")
        with self.mapped() as mapped:
            for first in range(0, FILES.slots, OF_A_RUN):
                result = self.read(node)
                assert result.run is not None, "a slot is lost"
                start = result.run[0] * SLOT
                assert mapped.hosts[start : start + MAX_RUN] == content
                mapped.own[first * SLOT : first * SLOT + MAX_RUN] = content
                assert self.write(node, [first, MAX_RUN]).errno == 0
        assert self.lent == ALL
        assert self.use() == Use(True, 0, ALL, 0, 0, 0, 0, self.use().received, 0)
        self.free(ALL)
        assert self.use() == Use(True, 0, 0, 0, 0, 0, 0, self.use().received, 0)
        (self.top / "open/check").unlink()


@contextlib.contextmanager
def hostile_guest() -> Iterator[HostileGuest]:
    """Of a file server that shares one folder. It is alive at the end, and has met nothing that it did not expect."""
    with loose_directory() as directory, TrioThread() as loop, memory(directory) as shared:
        top = directory / "host"
        (top / "open").mkdir(parents=True)
        server = FileServer(loop, directory, directory / "files.sock", [], shared)
        guest = HostileGuest(loop, server, shared, top)
        loop.start(guest.run, directory)
        try:
            server.start([SharedFolder(SHARE, str(top / "open"), "/mnt/open", False)])
            yield guest
            assert server.alive()
        finally:
            server.kill()
            server.store.close()
            log = server.log.read_text(errors="replace") if server.log.exists() else ""
            print(log[-6000:])
        assert "Traceback" not in log
