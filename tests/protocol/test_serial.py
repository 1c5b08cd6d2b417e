"""Serial channels over a pipe that keeps what the dead wrote, as virtio-serial does."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing

from protocol.api import Done, Shutdown
from protocol.errors import LinkError
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.resync import PADDING, State


class Port(trio.abc.Stream):
    """One end of a pipe. It outlives the processes that use it: closing it changes nothing."""

    def __init__(self, limit: int | None = None) -> None:
        self.buffer = bytearray()
        self.limit = limit
        self.absent = False
        self.changed = trio.lowlevel.ParkingLot()
        self.peer: Port

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        rest = memoryview(bytes(data))
        while rest:
            room = len(rest) if self.limit is None else self.limit - len(self.peer.buffer)
            if room <= 0:
                await self.peer.changed.park()
                continue
            self.peer.buffer += rest[:room]
            rest = rest[room:]
            self.peer.changed.unpark_all()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self.buffer:
            if self.absent:
                return b""
            await self.changed.park()
        data = bytes(self.buffer[:max_bytes])
        del self.buffer[: len(data)]
        self.changed.unpark_all()
        return data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def ports(limit: int | None = None) -> tuple[Port, Port]:
    one, other = Port(limit), Port(limit)
    one.peer, other.peer = other, one
    return one, other


async def meet(*channels: SerialChannel) -> list[trio.abc.Stream]:
    streams: dict[int, trio.abc.Stream] = {}

    async def establish(index: int) -> None:
        streams[index] = await channels[index].establish()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for index in range(len(channels)):
                nursery.start_soon(establish, index)
    return [streams[index] for index in range(len(channels))]


@pytest.mark.parametrize("limit", [None, 16, 4096])
async def test_a_session_each_way(limit: int | None, autojump_clock: trio.testing.MockClock) -> None:
    one, other = await meet(*map(SerialChannel, ports(limit)))
    data = bytes(range(256)) * 2000

    async def receive(stream: trio.abc.Stream) -> None:
        received = b""
        while len(received) < len(data):
            received += (chunk := await stream.receive_some(10_000))
            assert 0 < len(chunk) <= 10_000
        assert received == data

    async with trio.open_nursery() as nursery:
        for stream in (one, other):
            nursery.start_soon(stream.send_all, data)
            nursery.start_soon(receive, stream)


async def test_a_peer_that_comes_much_later(autojump_clock: trio.testing.MockClock) -> None:
    near, far = ports(limit=64 * 1024)
    channel = SerialChannel(near)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.establish)
        await trio.sleep(100)
        assert len(far.buffer) == 64 * 1024  # blocked by a reader that is not there
        await meet(SerialChannel(far))


async def test_a_process_killed_within_a_record_and_its_successor(
    autojump_clock: trio.testing.MockClock,
) -> None:
    near, far = ports()
    channel = SerialChannel(near)
    stream, doomed = await meet(channel, SerialChannel(far))
    await doomed.send_all(b"last words")
    await doomed.send_all(b"never finished" * 1000)
    del near.buffer[-5000:]  # killed: the rest was never written
    assert await stream.receive_some() == b"last words"
    async with trio.open_nursery() as nursery:

        async def survive() -> None:
            with pytest.raises(trio.BrokenResourceError) as broken:
                await stream.receive_some()
            assert isinstance(broken.value.__cause__, LinkError)
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x")
            fresh.append(await channel.establish())

        fresh: list[trio.abc.Stream] = []
        nursery.start_soon(survive)
        (successor,) = await meet(SerialChannel(far))
    await successor.send_all(b"hello")
    assert await fresh[0].receive_some() == b"hello"


async def test_a_write_cut_short_here_is_made_good_at_once(autojump_clock: trio.testing.MockClock) -> None:
    near, far = ports(limit=1000)
    channel, other = SerialChannel(near), SerialChannel(far)
    stream, theirs = await meet(channel, other)
    with trio.move_on_after(1):
        await stream.send_all(bytes(5000))
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await stream.send_all(b"x")
    near.limit = None
    before = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def read_on() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await theirs.receive_some()
            await other.establish()

        nursery.start_soon(read_on)
        stream = await channel.establish()
    assert trio.current_time() - before < 0.5
    assert other.resync.state is State.ESTABLISHED


async def test_a_new_session_ends_the_one_before(autojump_clock: trio.testing.MockClock) -> None:
    near, far = ports()
    channel, other = SerialChannel(near), SerialChannel(far)
    stream, theirs = await meet(channel, other)
    await theirs.send_all(b"unread")
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await theirs.receive_some()
            assert await (await other.establish()).receive_some() == b"new"

        nursery.start_soon(follow)
        fresh = await channel.establish()
        await fresh.send_all(b"new")
    for call in (stream.receive_some, lambda: stream.send_all(b"x"), stream.wait_send_all_might_not_block):
        with pytest.raises(trio.ClosedResourceError):
            await call()


async def test_one_sender_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    near, far = ports(limit=1000)
    stream, _ = await meet(SerialChannel(near), SerialChannel(far))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(5000))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_nobody_at_the_other_end(autojump_clock: trio.testing.MockClock) -> None:
    near, far = ports()
    channel = SerialChannel(near)
    stream, _ = await meet(channel, SerialChannel(far))
    near.absent = True
    assert await stream.receive_some() == b""
    assert await stream.receive_some() == b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.establish)
        await trio.sleep(5)
        near.absent = False
        await meet(SerialChannel(far))


@pytest.mark.parametrize("direction", ["receive_some", "send_all"])
async def test_a_transport_that_is_gone_for_good(
    direction: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    near, _ = ports()

    async def gone(data: object = None) -> bytes:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError("the port is gone")

    monkeypatch.setattr(near, direction, gone)
    with pytest.raises(trio.BrokenResourceError, match="the port is gone"):
        await SerialChannel(near).establish()


async def test_links_over_a_pipe_whose_users_are_killed_at_random(
    autojump_clock: trio.testing.MockClock,
) -> None:
    near, far = ports(limit=20_000)
    service = Service()

    async def shutdown(message: Shutdown) -> Done:
        return Done()

    service.on_request(Shutdown, shutdown)
    sessions: dict[Role, Link] = {}

    async def live(port: Port, role: Role) -> None:
        channel = SerialChannel(port)
        while True:
            link = sessions[role] = Link(await channel.establish(), role, service, Hello())
            with suppress(LinkError):
                await link.run()

    async def die_and_return(port: Port, role: Role, lives: int) -> None:
        for life in range(lives):
            with trio.move_on_after(0.3 + 0.7 * life):
                await live(port, role)
            if life % 2:
                del port.peer.buffer[-life * 3 :]  # what a real death leaves unwritten
        await live(port, role)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(die_and_return, near, Role.HOST, 7)
        nursery.start_soon(die_and_return, far, Role.GUEST, 4)
        await trio.sleep(120)
        for link in sessions.values():
            assert await link.request(Shutdown()) == Done()
        nursery.cancel_scope.cancel()


def test_padding_is_longer_than_any_record() -> None:
    assert len(PADDING) >= 4 + 128 * 1024 + 8
