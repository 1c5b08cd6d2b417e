from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from protocol.api import DialUnix
from protocol.link import Hello, Incoming, Link, Role, SerialChannel, Service
from protocol.packedport import PackedPort
from protocol.packing import MAGIC
from protocol.serial import SocketPort

PATIENCE = 60.0

TEXT = b"".join(
    b"line %d of something that says the same again and again\n" % number for number in range(40_000)
)
NOISE = random.Random(2).randbytes(1 << 20)


def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    return one, other


class Wire:
    """Between two sockets: carries what comes on either, in pieces, and counts it."""

    def __init__(self, one: trio.SocketStream, other: trio.SocketStream) -> None:
        self.carried = 0
        self._ends = (one, other)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, *self._ends)
            nursery.start_soon(self._carry, *reversed(self._ends))

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async with sink:
            try:
                while data := await source.receive_some(9000):
                    self.carried += len(data)
                    await sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass


async def echo(_: DialUnix, incoming: Incoming) -> None:
    async with await incoming.accept() as stream:
        while data := await stream.receive_some(65536):
            await stream.send_all(data)


@asynccontextmanager
async def joined(packed: tuple[bool, bool]) -> AsyncIterator[tuple[Link, Wire]]:
    """A link, of whose ends those that are ``packed`` know of it."""
    here, wire_here = sockets()
    there, wire_there = sockets()
    wire = Wire(wire_here, wire_there)
    service = Service()
    service.on_stream(DialUnix, echo)

    async def run_far(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        async with there:
            port = SocketPort(there)
            stream = await SerialChannel(PackedPort(port) if packed[1] else port).establish()
            await Link(stream, Role.GUEST, service, Hello(name="there")).run()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.run)
            await nursery.start(run_far)
            port = SocketPort(here)
            channel = SerialChannel(PackedPort(port) if packed[0] else port)
            stream = await channel.establish()
            link = Link(stream, Role.HOST, Service(), Hello(name="here"))
            await nursery.start(link.run)
            yield link, wire
            await link.goodbye()
            await channel.aclose()
            nursery.cancel_scope.cancel()


async def there_and_back(link: Link, data: bytes) -> bytes:
    stream = await link.open(DialUnix("echo"))
    found = b""
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        while len(found) < len(data):
            found += await stream.receive_some(65536)
    return found


@pytest.mark.parametrize("packed", [(True, True), (True, False), (False, True), (False, False)])
async def test_a_link_whichever_side_knows_of_it(packed: tuple[bool, bool]) -> None:
    async with joined(packed) as (link, wire):
        assert await there_and_back(link, b"a") == b"a"
        assert await there_and_back(link, TEXT) == TEXT
        text = wire.carried
        assert await there_and_back(link, NOISE) == NOISE
        noise = wire.carried - text
    assert (text < len(TEXT)) is all(packed)  # it goes there and back
    assert noise < 2.2 * len(NOISE)


async def test_a_write_that_is_cancelled_is_finished_by_the_next() -> None:
    here, there = sockets()
    port, peer = PackedPort(SocketPort(here), ["zlib"]), PackedPort(SocketPort(there), ["zlib"])
    async with port, peer:
        found = b""
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(port.send_all, b"one")
                nursery.start_soon(peer.send_all, b"two")
                nursery.start_soon(port.receive_some)
                found += await peer.receive_some()
            with trio.move_on_after(0.05) as limit:
                await port.send_all(NOISE)  # more than the socket takes, and nobody reads
            assert limit.cancelled_caught
            assert not port.send_nowait(b"x")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(port.send_all, b"end")
                while len(found) < 3 + len(NOISE) + 3:
                    found += await peer.receive_some()
        assert found == b"one" + NOISE + b"end"


async def test_what_cannot_be_right_breaks_it() -> None:
    here, there = sockets()
    port = PackedPort(SocketPort(here))
    async with port, there:
        await there.send_all(MAGIC + b"\x04zlib" + b"\xff\0\0\0")
        with pytest.raises(trio.BrokenResourceError, match="kind 255"):
            await port.receive_some()


async def test_nothing_is_said_before_the_other_side_has() -> None:
    here, there = sockets()
    port = PackedPort(SocketPort(here), ["zlib"])
    async with port, there:
        assert not port.send_nowait(b"x")
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(port.send_all, b"x")
                assert await there.receive_some(100) == MAGIC + b"\x04zlib"
                with trio.move_on_after(0.05) as limit:
                    await there.receive_some(100)
                nursery.cancel_scope.cancel()
        assert limit.cancelled_caught
