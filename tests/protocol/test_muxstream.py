"""The streams of a link, over a pair of real sessions without a link: bytes are carried by hand."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
import trio
import trio.testing

from protocol.errors import ErrorCode, LinkClosed, StreamReset
from protocol.messages import Credit, Data, Eof, Hello, Open, Reset
from protocol.muxstream import Driver, MuxStream
from protocol.session import Role, Session

WINDOW = 100


class Wire:
    """Two sessions with one open stream between them, whose bytes move at each flush."""

    def __init__(self) -> None:
        self.sessions = [Session(role, Hello(), 0.0, window=WINDOW) for role in (Role.HOST, Role.GUEST)]
        self.streams: list[MuxStream] = []
        self.frames: list[object] = []
        self.moving = self.held = False
        self.move()
        number = self.sessions[0].open("tcp", [])
        self.move()
        self.sessions[1].accept(number)
        self.move()
        self.streams = [MuxStream(Driver(session, self.move), number) for session in self.sessions]
        self.frames.clear()

    def move(self) -> None:
        if self.moving or self.held:
            return
        self.moving = True
        while any(session.has_output for session in self.sessions):
            for side in (0, 1):
                batch = self.sessions[side].data_to_send()
                for event in self.sessions[1 - side].receive_data(b"".join(batch.buffers), 0.0):
                    self.frames.append(event)
                    if self.streams:
                        self.tell(self.streams[1 - side], event)
                if batch.drained:
                    self.streams[side].on_sendable()
        self.moving = False

    def tell(self, stream: MuxStream, event: object) -> None:
        match event:
            case Data(payload=payload, loan=loan):
                stream.on_data(payload, loan)
            case Eof():
                stream.on_eof()
            case Credit():
                stream.on_sendable()
            case Reset(code=code, message=message):
                stream.on_broken(StreamReset(ErrorCode.parse(code), message))
            case Open():
                pass


class EndsWhenClosed(MuxStream):
    """What trio's checker expects of a stream: closing it is an end, not a cut."""

    async def aclose(self) -> None:
        try:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                await self.send_eof()
        finally:
            await super().aclose()


async def test_trio_finds_it_a_proper_stream() -> None:
    async def maker() -> tuple[MuxStream, MuxStream]:
        wire = Wire()
        number = wire.streams[0]._number
        wire.streams = [EndsWhenClosed(Driver(session, wire.move), number) for session in wire.sessions]
        return wire.streams[0], wire.streams[1]

    async def clogged_maker() -> tuple[MuxStream, MuxStream]:
        one, other = await maker()
        for stream in (one, other):
            await stream.send_all(b"x" * WINDOW)
        return one, other

    # trio's checker really waits, a second in all; a busy machine may take many.
    with trio.fail_after(60):
        await trio.testing.check_half_closeable_stream(maker, clogged_maker)


async def test_bytes_flow_within_the_window() -> None:
    one, other = Wire().streams
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, bytes(range(250)))
        received = b""
        while len(received) < 250:
            await trio.testing.wait_all_tasks_blocked()
            received += (data := await other.receive_some(60))
            assert len(data) <= 60
    assert received == bytes(range(250))


async def test_what_is_sent_may_be_changed_afterwards(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire()
    one, other = wire.streams
    buffer = bytearray(b"x" * 50)
    wire.held = True  # the bytes stay in the session
    with trio.move_on_after(1):
        await one.send_all(buffer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, buffer)
        await trio.testing.wait_all_tasks_blocked()
        buffer[:] = b"y" * 50
        wire.held = False
        wire.move()
    assert await other.receive_some() == b"x" * 50


async def test_a_cancelled_send_leaves_nothing_behind(autojump_clock: trio.testing.MockClock) -> None:
    one, other = Wire().streams
    with trio.move_on_after(1) as scope:
        await one.send_all(b"x" * (WINDOW + 50))
    assert scope.cancelled_caught
    assert await other.receive_some() == b"x" * WINDOW
    await one.send_all(b"y")
    assert await other.receive_some() == b"y"


async def test_waiting_for_credit() -> None:
    one, other = Wire().streams
    await one.wait_send_all_might_not_block()
    await one.send_all(b"x" * WINDOW)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.wait_send_all_might_not_block)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        await other.receive_some()


async def test_half_close_leaves_the_other_direction() -> None:
    one, other = Wire().streams
    await one.send_all(b"question")
    await one.send_eof()
    await one.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await one.send_all(b"more")
    assert await other.receive_some() == b"question"
    assert await other.receive_some() == b""
    assert await other.receive_some() == b""
    await other.send_all(b"answer")
    await other.send_eof()
    assert await one.receive_some() == b"answer"
    assert await one.receive_some() == b""


async def test_closing_after_both_ends_says_nothing() -> None:
    wire = Wire()
    one, other = wire.streams
    await one.send_eof()
    await other.send_eof()
    await one.aclose()
    await other.aclose()
    assert [type(frame) for frame in wire.frames] == [Eof, Eof]


async def test_closing_before_the_end_is_a_reset() -> None:
    one, other = Wire().streams
    await one.aclose()
    for call in (other.receive_some, other.send_eof, lambda: other.send_all(b"x")):
        with pytest.raises(trio.BrokenResourceError) as caught:
            await call()
        reset = caught.value.__cause__
        assert isinstance(reset, StreamReset)
        assert reset.code is ErrorCode.CANCELLED
    for call in (one.receive_some, one.send_eof, lambda: one.send_all(b"x")):
        with pytest.raises(trio.ClosedResourceError):
            await call()


async def test_a_reset_carries_its_reason_and_wakes_everyone() -> None:
    one, other = Wire().streams
    caught: list[BaseException | None] = []

    async def expect_broken(call: object, *args: object) -> None:
        with pytest.raises(trio.BrokenResourceError) as info:
            await call(*args)  # type: ignore[operator]
        caught.append(info.value.__cause__)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_broken, other.receive_some)
        nursery.start_soon(expect_broken, other.send_all, b"x" * (WINDOW + 1))
        await trio.testing.wait_all_tasks_blocked()
        await one.reset(ErrorCode.UNREACHABLE, "no route")
    assert [(error.code, str(error)) for error in caught if isinstance(error, StreamReset)] == [
        (ErrorCode.UNREACHABLE, "no route")
    ] * 2


async def test_a_reset_discards_what_was_not_read() -> None:
    one, other = Wire().streams
    await one.send_all(b"half of it")
    await one.reset(ErrorCode.RESET)
    with pytest.raises(trio.BrokenResourceError):
        await other.receive_some()


async def test_but_not_what_was_complete() -> None:
    one, other = Wire().streams
    await one.send_all(b"all of it")
    await one.send_eof()
    await one.aclose()
    assert await other.receive_some(5) == b"all o"
    assert await other.receive_some() == b"f it"
    assert await other.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await other.send_all(b"x")


async def test_the_loss_of_the_link_breaks_it() -> None:
    one, _ = Wire().streams
    one.on_broken(LinkClosed("gone"))
    with pytest.raises(trio.BrokenResourceError, match="gone") as caught:
        await one.receive_some()
    assert isinstance(caught.value.__cause__, LinkClosed)


async def test_one_task_a_direction() -> None:
    one, _ = Wire().streams
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await one.receive_some()
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, b"x" * 500)
        await trio.testing.wait_all_tasks_blocked()
        for call in (one.send_eof, one.wait_send_all_might_not_block, partial(one.send_all, b"x")):
            with pytest.raises(trio.BusyResourceError):
                await call()
        nursery.cancel_scope.cancel()
