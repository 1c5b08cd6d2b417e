"""Sockets joined through a pair of links, with memory for payloads and without; the laws are those of ``splice``."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol import messages
from protocol.api import DialTcp
from protocol.bulk import INLINE_BELOW, SLOT, Bulk
from protocol.errors import ErrorCode, LocalProtocolError
from protocol.frames import FrameDecoder
from protocol.link import Hello, Incoming, Link, Role, Service
from protocol.messages import AnyFrame, BulkOffer, Data, Eof, Open, Opened
from protocol.muxstream import Driver, MuxStream
from protocol.pump import CHUNK, INLINE_CHUNK, pump
from protocol.serial import SocketPort
from protocol.session import Session
from protocol.splice import Spliced, abort

SLOTS = 32
HALF = SLOTS * SLOT
# Nothing may wait for a heartbeat, so there is none.
OPTIONS: dict[str, Any] = {"heartbeat": 1000.0, "dead_after": 2000.0}
JOINED, ACCEPTED = 1, 2


def descriptors() -> set[str]:
    return set(os.listdir("/dev/fd"))


def ends() -> list[SocketPort]:
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return [SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in pair]


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """A real TCP connection over loopback: what is near us, and what is far."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = await trio.open_tcp_stream(*listener.getsockname())
        near, _ = listener.accept()
    near.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(near)), far


def memory() -> list[Bulk]:
    """Of a host and a guest."""
    view = memoryview(bytearray(2 * HALF))
    host, guest = Bulk(), Bulk()
    host.attach(view[:HALF], view[HALF:])
    guest.attach(view[HALF:], view[:HALF])
    host.accept = lambda extents, mark: True
    return [host, guest]


class Connection:
    """One that is carried through the links: ``left`` is far from the host, ``right`` from the guest."""

    def __init__(self, left: trio.SocketStream) -> None:
        self.left = left
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.results: list[Spliced] = []
        self.right: trio.SocketStream

    def add(self, result: Spliced) -> None:
        self.results.append(result)
        if len(self.results) == 2:
            self.ended.set()


class Tunnel:
    """Two links that carry connections."""

    def __init__(self, nursery: trio.Nursery, bulks: list[Bulk] | None) -> None:
        self._nursery = nursery
        self.bulks = bulks or [Bulk(), Bulk()]
        self.used = bulks is not None
        self._waiting: list[Connection] = []
        self.narrow = False  # the guest's sockets take little at a time
        service = Service()
        service.on_stream(DialTcp, self._serve)
        one, other = ends()
        offer = BulkOffer([], b"", self.bulks[1].busy()) if self.used else None
        self.host = Link(one, Role.HOST, Service(), Hello(), bulk=self.bulks[0], **OPTIONS)
        self.guest = Link(other, Role.GUEST, service, Hello(bulk=offer), bulk=self.bulks[1], **OPTIONS)
        self.accepted: list[MuxStream] = []

    async def start(self) -> None:
        async with trio.open_nursery() as starting:
            for link in (self.host, self.guest):
                starting.start_soon(self._nursery.start, link.run)
        if self.used:
            with trio.fail_after(20):
                while not self.bulks[1].active:
                    await trio.sleep(0.001)

    async def _serve(self, target: DialTcp, incoming: Incoming) -> None:
        if target.port == ACCEPTED:
            self.accepted.append(await incoming.accept())
            await trio.sleep_forever()
        near, right = await tcp_pair()
        if self.narrow:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection = self._waiting.pop(0)
        connection.right = right
        connection.add(await pump(await incoming.accept(), near))

    async def connect(self) -> Connection:
        near, left = await tcp_pair()
        connection = Connection(left)
        self._waiting.append(connection)
        stream = await self.host.open(DialTcp("", JOINED))

        async def carry() -> None:
            with connection.scope:
                connection.add(await pump(stream, near))

        self._nursery.start_soon(carry)
        return connection

    async def accept(self) -> tuple[MuxStream, MuxStream]:
        """A stream that is not joined with anything yet: the host's end, and the guest's."""
        stream = await self.host.open(DialTcp("", ACCEPTED))
        return stream, self.accepted.pop()

    async def all_free(self) -> None:
        """Wait until every slot has come home; a stream more has both sides say something."""
        if not self.used:
            return
        with trio.fail_after(20):
            while [bulk.free for bulk in self.bulks] != [SLOTS, SLOTS]:
                for stream in await self.accept():
                    await stream.aclose()
                await trio.testing.wait_all_tasks_blocked()
        assert not any(bulk.in_use for bulk in self.bulks)


@asynccontextmanager
async def tunnelling(bulks: list[Bulk] | None) -> AsyncIterator[Tunnel]:
    before = descriptors()
    async with trio.open_nursery() as nursery:
        tunnel = Tunnel(nursery, bulks)
        await tunnel.start()
        with trio.fail_after(60):
            yield tunnel
        if tunnel.host._error is None:
            await tunnel.host.goodbye()
        nursery.cancel_scope.cancel()
    assert descriptors() == before


@pytest.fixture(params=[True, False], ids=["memory", "inline"])
async def tunnel(request: pytest.FixtureRequest) -> AsyncIterator[Tunnel]:
    async with tunnelling(memory() if request.param else None) as tunnel:
        yield tunnel


@pytest.fixture
async def connection(tunnel: Tunnel) -> AsyncIterator[Connection]:
    """One that both sides close, and that leaves nothing behind."""
    connection = await tunnel.connect()
    async with connection.left, connection.right:
        yield connection
    with trio.fail_after(20):
        await connection.ended.wait()
    await tunnel.all_free()


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    received = b""
    while len(received) < count:
        data = await stream.receive_some(count - len(received))
        assert data, "the end came early"
        received += data
    return received


async def send_and_end(stream: trio.abc.HalfCloseableStream, payload: bytes) -> None:
    await stream.send_all(payload)
    await stream.send_eof()


async def expect_reset(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError) as caught:
        await everything(stream)
    assert isinstance(caught.value.__cause__, ConnectionResetError)


# --- one connection --------------------------------------------------------------------------------


async def test_a_half_close_passes_and_the_other_direction_lives_on(connection: Connection) -> None:
    await send_and_end(connection.left, b"question")
    assert await everything(connection.right) == b"question"
    await send_and_end(connection.right, b"answer")
    assert await everything(connection.left) == b"answer"
    await connection.ended.wait()
    assert sorted(result.a_to_b for result in connection.results) == [6, 8]
    assert all(result.a_to_b + result.b_to_a == 14 and not result.error for result in connection.results)


async def test_it_ends_without_a_word(connection: Connection) -> None:
    await connection.right.send_eof()
    assert await everything(connection.left) == b""
    await connection.left.send_eof()
    assert await everything(connection.right) == b""
    await connection.ended.wait()
    assert connection.results == [Spliced(0, 0)] * 2


@pytest.mark.parametrize("from_left", [True, False])
async def test_a_reset_is_a_reset_on_the_other_side(connection: Connection, from_left: bool) -> None:
    left, right = connection.left, connection.right
    source, sink = (left, right) if from_left else (right, left)
    await source.send_all(b"x")
    assert await sink.receive_some() == b"x"
    await abort(source, ErrorCode.RESET, "test")
    await expect_reset(sink)
    await connection.ended.wait()
    assert all("reset" in result.error for result in connection.results)


async def test_a_reset_after_a_half_close_ends_it(connection: Connection) -> None:
    await send_and_end(connection.right, b"all there is")
    assert await everything(connection.left) == b"all there is"
    await abort(connection.right, ErrorCode.RESET, "test")
    await connection.left.send_all(b"to nobody")
    with trio.fail_after(20):
        await connection.ended.wait()


@pytest.mark.parametrize("from_left", [True, False])
async def test_a_reset_also_passes_when_much_is_under_way(
    connection: Connection, nursery: trio.Nursery, from_left: bool
) -> None:
    left, right = connection.left, connection.right
    source, sink = (left, right) if from_left else (right, left)

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await source.send_all(bytes(1 << 20))

    nursery.start_soon(send)
    await exactly(sink, 3_000_000)
    await abort(sink, ErrorCode.RESET, "test")
    await connection.ended.wait()
    assert all(result.error for result in connection.results)


@pytest.mark.parametrize("from_left", [True, False])
async def test_a_slow_reader_slows_its_writer_and_loses_nothing(
    connection: Connection, nursery: trio.Nursery, from_left: bool
) -> None:
    left, right = connection.left, connection.right
    source, sink = (left, right) if from_left else (right, left)
    payload = os.urandom(16 << 20)
    sent = trio.Event()

    async def send() -> None:
        await send_and_end(source, payload)
        sent.set()

    nursery.start_soon(send)
    with trio.move_on_after(0.3):
        await sent.wait()
    assert not sent.is_set()
    assert await everything(sink) == payload


async def test_both_directions_at_once(connection: Connection, nursery: trio.Nursery) -> None:
    there, back = os.urandom(12 << 20), os.urandom(12 << 20)
    received: dict[str, bytes] = {}

    async def receive(name: str, stream: trio.SocketStream) -> None:
        received[name] = await everything(stream)

    async with trio.open_nursery() as reading:
        nursery.start_soon(send_and_end, connection.left, there)
        nursery.start_soon(send_and_end, connection.right, back)
        reading.start_soon(receive, "left", connection.left)
        reading.start_soon(receive, "right", connection.right)
    assert received["right"] == there
    assert received["left"] == back
    await connection.ended.wait()
    assert connection.results == [Spliced(12 << 20, 12 << 20)] * 2


AROUND = [
    limit + difference for limit in (INLINE_BELOW, INLINE_CHUNK, SLOT, CHUNK) for difference in (-1, 0, 1)
]


async def test_each_size_arrives_whole(connection: Connection) -> None:
    left, right = connection.left, connection.right
    for size in [1, *AROUND, *reversed(AROUND), 1]:
        payload = os.urandom(size)
        for source, sink in ((left, right), (right, left)):
            async with trio.open_nursery() as sending:
                sending.start_soon(source.send_all, payload)
                assert await exactly(sink, size) == payload


async def test_what_streams_carry_is_counted(tunnel: Tunnel) -> None:
    """Both ways, whether by pump or by a task, inline or in memory, and on both sides the same."""
    connection = await tunnel.connect()
    async with connection.left, connection.right:
        for size in (1, 3 * CHUNK, INLINE_CHUNK):
            async with trio.open_nursery() as sending:
                sending.start_soon(connection.left.send_all, bytes(size))
                await exactly(connection.right, size)
        await connection.right.send_all(b"back")
        await exactly(connection.left, 4)
    await connection.ended.wait()
    stream, accepted = await tunnel.accept()
    for size in (1, 3 * CHUNK, INLINE_CHUNK):
        async with trio.open_nursery() as sending:
            sending.start_soon(stream.send_all, bytes(size))
            await exactly(accepted, size)
    await accepted.send_all(b"back")
    await exactly(stream, 4)
    carried = 2 * (1 + 3 * CHUNK + INLINE_CHUNK)
    assert (tunnel.host.traffic.sent, tunnel.host.traffic.received) == (carried, 8)
    assert (tunnel.guest.traffic.received, tunnel.guest.traffic.sent) == (carried, 8)
    for end in (stream, accepted):
        await end.aclose()


async def test_many_pieces_of_any_size_come_in_order(connection: Connection, nursery: trio.Nursery) -> None:
    pieces = [os.urandom(size) for size in [1, 3 * SLOT, 10, *AROUND, 5, 1 << 20, 7] * 3]

    async def send() -> None:
        for piece in pieces:
            await connection.left.send_all(piece)
            await trio.lowlevel.checkpoint()
        await connection.left.send_eof()

    nursery.start_soon(send)
    assert await everything(connection.right) == b"".join(pieces)


async def test_cancelled_both_sides_see_a_reset(connection: Connection) -> None:
    await connection.left.send_all(b"x")
    assert await connection.right.receive_some() == b"x"
    connection.scope.cancel()
    await expect_reset(connection.left)
    await expect_reset(connection.right)
    connection.add(Spliced(0, 0))  # the cancelled one returns nothing


async def test_cancelled_with_data_under_way_it_leaves_nothing_behind(
    connection: Connection, nursery: trio.Nursery
) -> None:
    async def send(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(bytes(1 << 20))

    async with trio.open_nursery() as sending:
        sending.start_soon(send, connection.left)
        sending.start_soon(send, connection.right)
        await exactly(connection.right, 1_000_000)
        connection.scope.cancel()
    connection.add(Spliced(0, 0))


# --- many ------------------------------------------------------------------------------------------


async def test_one_that_does_not_read_does_not_stop_the_others(tunnel: Tunnel) -> None:
    stuck = await tunnel.connect()
    blocked = os.urandom(16 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, stuck.left, blocked)
        with trio.move_on_after(0.2):
            await trio.sleep_forever()  # until it can send no more
        others = [await tunnel.connect() for _ in range(12)]

        async def exchange(connection: Connection) -> None:
            payload = os.urandom(2 << 20)
            async with connection.left, connection.right, trio.open_nursery() as sending:
                sending.start_soon(send_and_end, connection.left, payload)
                assert await everything(connection.right) == payload
                sending.start_soon(send_and_end, connection.right, payload)
                assert await everything(connection.left) == payload
            await connection.ended.wait()

        async with trio.open_nursery() as exchanging:
            for other in others:
                exchanging.start_soon(exchange, other)
        assert await everything(stuck.right) == blocked
    async with stuck.left, stuck.right:
        await stuck.right.send_eof()
    await stuck.ended.wait()
    await tunnel.all_free()


async def test_a_hundred_that_wait_for_room_all_get_it(tunnel: Tunnel) -> None:
    tunnel.narrow = True
    connections = [await tunnel.connect() for _ in range(100)]
    payload = os.urandom(500_000)
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(send_and_end, connection.left, payload)
        with trio.move_on_after(0.2):
            await trio.sleep_forever()  # now none of them can send any more
        assert not tunnel.used or tunnel.bulks[0].free < SLOTS // 2

        async def receive(connection: Connection) -> None:
            assert await everything(connection.right) == payload
            await connection.right.send_eof()
            assert await everything(connection.left) == b""
            await connection.left.aclose()
            await connection.right.aclose()
            await connection.ended.wait()

        for connection in connections:
            nursery.start_soon(receive, connection)
    await tunnel.all_free()


# --- the end of a stream, and of the link ----------------------------------------------------------


async def test_what_was_complete_is_delivered_even_if_the_stream_is_cut_afterwards(tunnel: Tunnel) -> None:
    stream, guest = await tunnel.accept()
    near, far = await tcp_pair()
    # What TCP itself would keep for a slow reader is little, so that the pump has to.
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    async with far, trio.open_nursery() as nursery:
        nursery.start_soon(pump, stream, near)
        payload = os.urandom(100_000)
        await send_and_end(guest, payload)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await guest.reset(ErrorCode.RESET, "test")
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.fail_after(20):
            assert await exactly(far, len(payload)) == payload


@pytest.mark.parametrize("ended", [True, False])
async def test_the_loss_of_the_link_ends_it_even_if_the_socket_takes_no_more(
    tunnel: Tunnel, ended: bool
) -> None:
    stream, guest = await tunnel.accept()
    near, far = await tcp_pair()
    async with far, trio.open_nursery() as nursery:
        results: list[Spliced] = []

        async def carry() -> None:
            results.append(await pump(stream, near))

        nursery.start_soon(carry)
        with trio.move_on_after(0.3):
            while True:
                await guest.send_all(bytes(1 << 20))  # the socket is full then
        if ended:
            await guest.send_eof()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await tunnel.host.goodbye()
        with trio.fail_after(20):
            while not results:
                await trio.sleep(0.001)
                if ended:
                    with trio.move_on_after(0.001):
                        await far.receive_some()
    assert not tunnel.bulks[0].in_use


async def test_a_stream_that_is_broken_already(tunnel: Tunnel) -> None:
    stream, guest = await tunnel.accept()
    await guest.reset(ErrorCode.RESET, "too late")
    await trio.testing.wait_all_tasks_blocked(0.01)
    near, far = await tcp_pair()
    async with far:
        assert (await pump(stream, near)).error == "too late"
        await expect_reset(far)


async def test_what_came_before_the_pump_is_delivered(tunnel: Tunnel, nursery: trio.Nursery) -> None:
    stream, guest = await tunnel.accept()
    payload = os.urandom(50_000)
    await send_and_end(guest, payload)
    await trio.testing.wait_all_tasks_blocked(0.01)
    near, far = await tcp_pair()
    async with far, near:
        nursery.start_soon(pump, stream, near)
        assert await everything(far) == payload
        await send_and_end(far, b"thanks")
        assert await guest.receive_some() == b"thanks"
        assert await guest.receive_some() == b""


async def test_a_stream_without_a_link_has_nobody_to_carry_it() -> None:
    stream = MuxStream(Driver(Session(Role.HOST, Hello(), 0.0), lambda: None), 2)
    near, far = await tcp_pair()
    async with near, far:
        with pytest.raises(LocalProtocolError):
            await pump(stream, near)
        assert near.socket.fileno() >= 0, "it is still the caller's"


# --- what one read brings --------------------------------------------------------------------------


class Peer:
    """A guest made by hand, so that it can say many things at once."""

    def __init__(self, nursery: trio.Nursery) -> None:
        one, self.port = ends()
        self.bulks = memory()
        self.link = Link(one, Role.HOST, Service(), Hello(), bulk=self.bulks[0], **OPTIONS)
        self._nursery = nursery
        self._decoder = FrameDecoder()

    async def start(self) -> None:
        await self.say(Hello(bulk=BulkOffer([], b"", self.bulks[1].busy())))
        await self._nursery.start(self.link.run)
        self.bulks[1].begin(b"")

    async def say(self, *frames: AnyFrame) -> None:
        await self.port.send_all(b"".join(b"".join(messages.encode(frame)) for frame in frames))

    async def hears(self, kind: type[AnyFrame]) -> AnyFrame:
        """The next frame of this kind."""
        while True:
            while (raw := self._decoder.next_frame()) is not None:
                if isinstance(frame := messages.decode(raw), kind):
                    return frame
            self._decoder.receive_data(await self.port.receive_some())

    async def open(self) -> MuxStream:
        streams: list[MuxStream] = []

        async def ask() -> None:
            streams.append(await self.link.open(DialTcp("", 1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            frame = await self.hears(Open)
            assert isinstance(frame, Open)
            await self.say(Opened(frame.stream, 1 << 20))
        return streams[0]

    def by_run(self, stream: MuxStream, content: bytes) -> Data:
        run = self.bulks[1].take(len(content))
        assert run is not None
        run.length = len(content)
        run.view[: run.length] = content
        reference = [run.first, run.length]
        self.bulks[1].lend(run)
        return Data(number_of(stream), b"", reference)


def number_of(stream: MuxStream) -> int:
    return stream._number


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with trio.open_nursery() as nursery:
        peer = Peer(nursery)
        with trio.fail_after(20):
            await peer.start()
            yield peer
        nursery.cancel_scope.cancel()
        await peer.port.aclose()


async def test_what_is_pumped_does_not_hide_what_came_with_it(peer: Peer, nursery: trio.Nursery) -> None:
    """The first one's credit is written before the second one, which is over with this, hears of its end."""
    first, second = await peer.open(), await peer.open()
    await second.send_eof()
    await peer.hears(Eof)
    near, far = await tcp_pair()
    nursery.start_soon(pump, first, near)
    await trio.testing.wait_all_tasks_blocked()
    one, two = number_of(first), number_of(second)
    await peer.say(Data(one, bytes(64 * 1024)), Data(one, bytes(6000)), Data(two, b"last words"), Eof(two))
    assert await second.receive_some() == b"last words"
    assert await second.receive_some() == b""
    assert len(await exactly(far, 64 * 1024 + 6000)) == 64 * 1024 + 6000
    await far.aclose()


async def test_data_for_a_socket_that_broke_in_the_same_read_is_not_kept(
    peer: Peer, nursery: trio.Nursery
) -> None:
    stream = await peer.open()
    near, far = await tcp_pair()
    with socket.socket(fileno=os.dup(near.socket.fileno())) as same:
        nursery.start_soon(pump, stream, near)
        await trio.testing.wait_all_tasks_blocked()
        same.shutdown(socket.SHUT_WR)  # every write will fail
    await peer.say(*[peer.by_run(stream, bytes(5000)) for _ in range(4)])
    await peer.hears(messages.Reset)
    assert not peer.bulks[0].in_use
    await far.aclose()


async def test_a_bug_is_not_hidden_and_the_socket_is_closed(
    tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = await tunnel.accept()
    near, far = await tcp_pair()

    def bug() -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(stream, "peek", bug)
    async with far:
        with pytest.raises(TypeError):
            await pump(stream, near)
        await expect_reset(far)
