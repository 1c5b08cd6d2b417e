"""What a fence holds back: it goes out later, whole and in order, and never much later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from protocol import codec, messages
from protocol.api import Listeners
from protocol.link import Link, Service
from protocol.messages import AnyFrame, Data, Goodbye, Hello, Notify, Open
from protocol.outlet import HELD_MOST, MAX_HELD, PROMPT_SIZE, Drained, Outlet
from protocol.session import Role, Session

LATE = MAX_HELD / 2
"""Seconds in which all would be out that is not held."""

NEWS = Listeners(True, [], [])


class Played:
    """A fence whose numbers a test sets."""

    def __init__(self) -> None:
        self.answered = self.landed = 0
        self.looks = 0

    def mark(self) -> int:
        return self.answered if self.answered > self.landed else 0

    def passed(self, mark: int) -> bool:
        self.looks += 1
        return self.landed >= mark


class Transport(trio.abc.Stream):
    """Takes everything, and notes how and when it came."""

    def __init__(self) -> None:
        self.data = b""
        self.ways: list[str] = []
        self.times: list[float] = []

    def _note(self, way: str, data: bytes | bytearray | memoryview) -> None:
        self.data += data
        self.ways.append(way)
        self.times.append(trio.current_time())

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        self._note("at once", data)
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._note("by the task", data)

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("nobody asks")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await trio.sleep_forever()  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Silent:
    """Of a link, what the outlet tells."""

    def taken(self, drained: list[int]) -> list[Drained]:
        return []

    def written(self) -> None:
        pass


def wire(*frames: AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


class Side:
    """A session that is greeted and has stream 1 open, its outlet, and where that writes to."""

    def __init__(self) -> None:
        self.session = Session(Role.HOST, Hello(), 0.0)
        self.session.receive_data(wire(Hello(), Open(1, "tcp", [], 1 << 20)), 0.0)
        self.session.accept(1)
        self.session.data_to_send()
        self.transport, self.fence = Transport(), Played()
        self.outlet = Outlet(self.session, self.transport, Silent(), self.fence)

    def say(self, number: int) -> None:
        self.session.notify("event", [number])
        self.outlet.flush()

    @property
    def heard(self) -> bytes:
        return self.transport.data


def said(*numbers: int) -> bytes:
    return wire(*(Notify("event", [number]) for number in numbers))


@asynccontextmanager
async def running() -> AsyncIterator[Side]:
    side = Side()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.outlet.run)
        await trio.testing.wait_all_tasks_blocked()
        yield side
        nursery.cancel_scope.cancel()


@pytest.fixture
async def side() -> AsyncIterator[Side]:
    async with running() as side:
        yield side


async def test_while_nothing_is_to_be_waited_for_it_is_written_where_it_is_said(
    side: Side, autojump_clock: MockClock
) -> None:
    side.fence.answered = side.fence.landed = 7
    side.say(1)
    assert side.outlet.express(1, b"x")
    assert side.transport.ways == ["at once"] * 2
    assert side.heard == said(1) + wire(Data(1, b"x"))


async def test_what_is_held_goes_out_afterwards_whole_and_in_order(
    side: Side, autojump_clock: MockClock
) -> None:
    side.fence.answered = 1
    for number in range(5):
        side.say(number)
    await trio.sleep(LATE / 2)
    for number in range(5, 10):
        side.say(number)
    await trio.sleep(LATE / 2)
    assert side.heard == b""
    assert side.outlet.backlog > 0
    side.fence.landed = 1
    await trio.sleep(2 * HELD_MOST)
    assert side.heard == said(*range(10))
    assert side.outlet.backlog == 0
    side.say(10)
    assert side.transport.ways[-1] == "at once", "the task rests again"


async def test_what_is_said_later_waits_for_what_was_answered_before_it(
    side: Side, autojump_clock: MockClock
) -> None:
    side.fence.answered = 1
    side.say(1)
    await trio.sleep(LATE / 2)
    side.fence.answered = 2
    side.say(2)
    side.fence.landed = 1
    await trio.sleep(LATE / 2)
    assert side.heard == said(1)
    side.fence.landed = 2
    await trio.sleep(2 * HELD_MOST)
    assert side.heard == said(1, 2)


async def test_who_answers_on_and_on_holds_nothing_for_longer(side: Side, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    for number in range(500):
        side.fence.answered = number + 4  # four are always outstanding
        side.fence.landed = number
        if number % 10 == 0:
            side.say(number)
        await trio.sleep(0.001)
    assert len(side.transport.times) >= 40
    assert max(after - before for before, after in pairwise([began, *side.transport.times])) < MAX_HELD / 20
    side.fence.landed = side.fence.answered
    await trio.sleep(2 * HELD_MOST)
    assert side.heard == said(*range(0, 500, 10))


async def test_nothing_is_held_for_ever(
    side: Side, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    began = trio.current_time()
    side.fence.answered = 1
    side.say(1)
    await trio.sleep(MAX_HELD + 2 * HELD_MOST)
    assert side.heard == said(1)
    assert began + MAX_HELD <= side.transport.times[0] <= began + MAX_HELD + HELD_MOST
    for number in range(2, 10):  # nor is each that follows
        side.fence.answered = number
        side.say(number)
        assert side.transport.times[-1] == trio.current_time()
    assert side.outlet.express(1, b"x")
    assert [record.getMessage() for record in caplog.records] == ["outlet.held_in_vain seconds=1 mark=1"]
    side.fence.landed = 1  # what was given up has come: from now on it is worth waiting again
    side.say(10)
    await trio.sleep(LATE)
    assert side.heard == said(*range(1, 10)) + wire(Data(1, b"x"))
    side.fence.landed = 9
    await trio.sleep(2 * HELD_MOST)
    assert side.heard == said(*range(1, 10)) + wire(Data(1, b"x")) + said(10)
    assert len(caplog.records) == 1


async def test_to_wait_is_not_to_spin(side: Side, autojump_clock: MockClock) -> None:
    side.fence.answered = 1
    side.say(1)
    before = side.fence.looks
    await trio.sleep(MAX_HELD / 2)
    assert side.fence.looks - before <= MAX_HELD / 2 / HELD_MOST + 10


async def test_the_short_way_of_a_stream_is_held_as_well(side: Side, autojump_clock: MockClock) -> None:
    side.fence.answered = 1
    assert not side.outlet.express(1, b"x")
    side.session.send_data(1, b"x")  # as who is refused does
    side.outlet.flush()
    assert not side.outlet.express(1, b"y")
    await trio.sleep(LATE)
    assert side.heard == b""
    side.fence.landed = 1
    await trio.sleep(2 * HELD_MOST)
    assert side.heard == wire(Data(1, b"x"))
    assert side.outlet.express(1, b"y")
    assert side.heard == wire(Data(1, b"x")) + wire(Data(1, b"y"))


async def test_what_is_too_long_to_be_written_at_once_is_held_as_well(
    side: Side, autojump_clock: MockClock
) -> None:
    content = bytes(4 * PROMPT_SIZE)
    side.fence.answered = 1
    side.session.send_data(1, content)
    side.outlet.flush()
    await trio.sleep(LATE)
    assert side.heard == b""
    side.fence.landed = 1
    await trio.sleep(2 * HELD_MOST)
    assert side.heard.count(b"\0" * PROMPT_SIZE) == 4
    assert side.transport.ways == ["by the task"]


async def test_who_is_cancelled_meanwhile_still_has_what_is_held(autojump_clock: MockClock) -> None:
    async with running() as side:
        side.fence.answered = 1
        side.say(1)
        await trio.sleep(LATE)
        side.say(2)
    assert side.heard == b""
    assert side.outlet.last_words() == said(1, 2)


# --- of a link -----------------------------------------------------------------------------------------------


async def link_over(transport: Transport, fence: Played, nursery: trio.Nursery) -> Link:
    """A guest's link whose host has greeted it, and has heard its hello."""
    greeting = iter([wire(Hello(name="host"))])

    async def receive_some(max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if (data := next(greeting, None)) is None:
            await trio.sleep_forever()
        return data or b""

    transport.receive_some = receive_some  # type: ignore[method-assign]
    link = Link(transport, Role.GUEST, Service(), Hello(name="guest"), fence=fence)
    await nursery.start(link.run)
    await trio.testing.wait_all_tasks_blocked()
    transport.data, transport.times = b"", []
    return link


async def test_a_link_says_nothing_before_its_fence_lets_it(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    transport, fence = Transport(), Played()
    link = await link_over(transport, fence, nursery)
    fence.answered = 1
    link.post(NEWS)
    assert link.backlog > 0
    await trio.sleep(LATE)
    assert transport.data == b""
    fence.landed = 1
    await trio.sleep(2 * HELD_MOST)
    assert transport.data == wire(Notify(NEWS.TOPIC, codec.encode(NEWS)))
    assert link.backlog == 0
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_last_words_are_held_as_well_and_are_still_said(
    autojump_clock: MockClock, cancelled: bool
) -> None:
    transport, fence = Transport(), Played()
    news = wire(Notify(NEWS.TOPIC, codec.encode(NEWS)))
    async with trio.open_nursery() as nursery:
        link = await link_over(transport, fence, nursery)
        fence.answered = 1
        link.post(NEWS)
        await trio.sleep(LATE / 2)

        async def end() -> None:
            if cancelled:
                nursery.cancel_scope.cancel()
            else:
                await link.goodbye("over")

        async def land() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(LATE)
                assert transport.data == b""
                fence.landed = 1

        nursery.start_soon(land)
        nursery.start_soon(end)
    assert transport.data.startswith(news)
    assert len(transport.data) > len(news), "and the goodbye"


async def test_a_goodbye_is_said_though_nothing_ever_lands(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    transport, fence = Transport(), Played()
    link = await link_over(transport, fence, nursery)
    fence.answered = 1
    began = trio.current_time()
    await link.goodbye("over")
    assert transport.data == wire(Goodbye("gone", "over"))
    assert trio.current_time() - began < 3 * MAX_HELD
