"""The guest's clock is kept by a keeper whose own clocks, and whose guest, the test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
import trio.testing

from host_agent.guest_clock import (
    ANSWER_TIME,
    FINE_NS,
    INTERVAL,
    JUMP_NS,
    RETRY,
    ClockKeeper,
    Moment,
    Reading,
    reading,
)
from protocol.api import AdjustClock, GuestClock
from protocol.errors import ErrorCode, LinkClosed, RpcError
from protocol.link import Link

MS = 1_000_000
SECOND = 1000 * MS


@dataclass
class Machine:
    """A host and a guest in trio's time. ``there`` and ``back`` are how long a message takes, seconds."""

    there: float = 0.0005
    back: float = 0.0005
    host_offset: int = 1_800_000_000 * SECOND
    guest_offset: int = 1_800_000_000 * SECOND
    asked: list[int] = field(default_factory=list)
    failure: Exception | None = None
    before_answer: Callable[[], None] = lambda: None

    @staticmethod
    def monotonic() -> int:
        return round(trio.current_time() * SECOND)

    def now(self) -> Moment:
        return Moment(self.monotonic() + self.host_offset, self.monotonic())

    @property
    def ahead(self) -> int:
        return self.guest_offset - self.host_offset

    async def request(self, message: AdjustClock, *, timeout: float) -> GuestClock:
        assert timeout == ANSWER_TIME
        await trio.sleep(self.there)
        if self.failure is not None:
            raise self.failure
        self.guest_offset += message.by_ns
        if message.by_ns:
            self.asked.append(message.by_ns)
        answer = GuestClock(self.monotonic() + self.guest_offset)
        await trio.sleep(self.back)
        self.before_answer()
        return answer


@dataclass
class Kept:
    machine: Machine
    events: list[tuple[str, str]]
    keeper: ClockKeeper
    link: Any = None

    def connect(self) -> None:
        self.link = self.machine
        self.keeper.look()


@pytest.fixture
def kept(nursery: trio.Nursery) -> Kept:
    machine, events = Machine(), list[tuple[str, str]]()
    made = Kept(machine, events, cast(ClockKeeper, None))
    made.keeper = ClockKeeper(
        lambda: cast(Link, made.link), lambda kind, message: events.append((kind, message)), machine.now
    )
    nursery.start_soon(made.keeper.run)
    made.connect()
    return made


async def test_a_clock_that_is_right_is_left_alone(
    kept: Kept, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(10 * INTERVAL)
    assert (kept.machine.asked, kept.events) == ([], [])


@pytest.mark.parametrize("off", [-3600 * SECOND, JUMP_NS + MS, 365 * 86400 * SECOND])
async def test_a_jump_is_undone_and_told(
    kept: Kept, autojump_clock: trio.testing.MockClock, off: int
) -> None:
    await trio.sleep(1)
    kept.machine.guest_offset += off
    kept.keeper.look()
    await trio.sleep(1)
    assert abs(kept.machine.ahead) <= FINE_NS
    assert len(kept.machine.asked) == 1
    [(kind, message)] = kept.events
    assert kind == "clock"
    assert ("behind" in message, f"{abs(off) / 1e9:.1f} s" in message) == (off < 0, True)


async def test_a_small_error_is_found_by_itself_and_not_told(
    kept: Kept, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1)
    kept.machine.guest_offset -= 20 * MS
    await trio.sleep(INTERVAL + 1)
    assert abs(kept.machine.ahead) <= FINE_NS
    assert (len(kept.machine.asked), kept.events) == (1, [])


async def test_what_may_only_be_the_way_is_left_alone(
    kept: Kept, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1)
    # Half of the round trip is not half of the way: the answer is given 390 ms early, and nobody can know.
    kept.machine.there, kept.machine.back = 0.01, 0.8
    kept.keeper.look()
    await trio.sleep(30)
    assert kept.machine.asked == []


async def test_a_slow_way_does_not_make_a_clock_wrong(
    kept: Kept, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1)
    kept.machine.there, kept.machine.back = 0.5, 0.7
    kept.machine.guest_offset -= 3600 * SECOND
    kept.keeper.look()
    await trio.sleep(30)
    assert abs(kept.machine.ahead) <= 100 * MS  # half of what the two ways differ by


async def test_the_quickest_answer_counts(kept: Kept, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(1)
    kept.machine.back = 0.5
    answers = 0

    def quicker() -> None:
        nonlocal answers
        answers += 1
        kept.machine.back = 0.001

    kept.machine.before_answer = quicker
    kept.machine.guest_offset += 50 * MS
    kept.keeper.look()
    await trio.sleep(10)
    assert abs(kept.machine.ahead) <= FINE_NS
    assert answers >= 2


async def test_a_host_whose_clock_is_set_meanwhile_is_asked_again(
    kept: Kept, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1)
    jumps = 2

    def jump() -> None:
        nonlocal jumps
        if jumps:
            jumps -= 1
            kept.machine.host_offset += 1800 * SECOND

    kept.machine.before_answer = jump
    kept.keeper.look()
    await trio.sleep(30)
    assert abs(kept.machine.ahead) <= FINE_NS


async def test_a_guest_that_does_not_answer_is_asked_again_soon(
    kept: Kept, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1)
    kept.machine.guest_offset -= 5 * SECOND
    kept.machine.failure = RpcError(ErrorCode.TIMEOUT, "no answer")
    kept.keeper.look()
    await trio.sleep(RETRY / 2)
    kept.machine.failure = None
    await trio.sleep(2 * RETRY)
    assert abs(kept.machine.ahead) <= FINE_NS


@pytest.mark.parametrize("failure", [RpcError(ErrorCode.UNSUPPORTED, "older"), LinkClosed("gone")])
async def test_one_that_cannot_is_not_asked_all_the_time(
    kept: Kept, autojump_clock: trio.testing.MockClock, failure: Exception
) -> None:
    await trio.sleep(1)
    kept.machine.failure = failure
    kept.machine.guest_offset -= 5 * SECOND
    kept.keeper.look()
    await trio.sleep(INTERVAL / 2)
    kept.machine.failure = None
    await trio.sleep(INTERVAL / 4)
    assert kept.machine.asked == []
    # The next session begins with a look.
    kept.connect()
    await trio.sleep(1)
    assert abs(kept.machine.ahead) <= FINE_NS


async def test_without_a_session_nothing_is_asked(kept: Kept, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(1)
    kept.link = None
    kept.machine.guest_offset -= 5 * SECOND
    kept.keeper.look()
    await trio.sleep(3 * INTERVAL)
    assert kept.machine.asked == []
    kept.connect()
    await trio.sleep(1)
    assert abs(kept.machine.ahead) <= FINE_NS


@pytest.mark.parametrize("shown", [(1 << 64) - 1, 1 << 63, -1])
async def test_a_guest_that_shows_no_time_is_left_alone(
    kept: Kept, autojump_clock: trio.testing.MockClock, shown: int
) -> None:
    await trio.sleep(1)
    kept.machine.guest_offset = shown - kept.machine.monotonic()
    kept.machine.there = 0
    kept.keeper.look()
    await trio.sleep(INTERVAL / 2)
    assert (kept.machine.asked, kept.events) == ([], [])


def test_a_reading_is_as_good_as_half_of_its_way() -> None:
    asked, answered = Moment(1000 * SECOND, 0), Moment(1000 * SECOND + 4 * MS, 4 * MS)
    assert reading(asked, answered, 1000 * SECOND + 2 * MS) == Reading(0, 2 * MS)
    assert reading(asked, answered, 1005 * SECOND + 2 * MS) == Reading(5 * SECOND, 2 * MS)


def test_a_reading_across_a_jump_is_none() -> None:
    asked = Moment(1000 * SECOND, 0)
    for jump in (-5 * SECOND, 2 * MS):
        assert reading(asked, Moment(1000 * SECOND + 4 * MS + jump, 4 * MS), 0) is None
