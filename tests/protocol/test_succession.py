"""One session at a time: who begins ends the one before, which leaves nothing behind."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from protocol.succession import Succession


class Sessions:
    """Their diary; each takes a second to clean up."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._succession = Succession()
        self.diary: list[str] = []

    async def begin(self, name: str, lasts: float = 1000.0) -> None:
        async def live() -> None:
            self.diary.append(f"{name} begins")
            try:
                await trio.sleep(lasts)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                self.diary.append(f"{name} is over")

        async def run() -> None:
            self.diary.append(f"{name}: {await self._succession.run(live)}")

        self._nursery.start_soon(run)
        await wait_all_tasks_blocked()


@pytest.fixture
def sessions(nursery: trio.Nursery) -> Sessions:
    return Sessions(nursery)


async def test_one_that_ends_by_itself(sessions: Sessions, autojump_clock: MockClock) -> None:
    await sessions.begin("first", lasts=5)
    await trio.sleep(10)
    await sessions.begin("second", lasts=5)
    await trio.sleep(10)
    whole = [f"{name}{word}" for name in ("first", "second") for word in (" begins", " is over", ": True")]
    assert sessions.diary == whole


async def test_the_next_begins_when_nothing_is_left_of_the_one_before(
    sessions: Sessions, autojump_clock: MockClock
) -> None:
    await sessions.begin("first")
    await sessions.begin("second", lasts=5)
    assert sessions.diary == ["first begins"]
    await trio.sleep(20)
    order = [
        "first begins",
        "first is over",
        "first: False",
        "second begins",
        "second is over",
        "second: True",
    ]
    assert sorted(sessions.diary) == sorted(order)
    assert sessions.diary.index("first is over") < sessions.diary.index("second begins")


async def test_of_those_that_wait_only_the_newest_begins(
    sessions: Sessions, autojump_clock: MockClock
) -> None:
    for name in ("first", "second", "third"):
        await sessions.begin(name, lasts=5)
    await trio.sleep(20)
    assert [line for line in sessions.diary if "begins" in line] == ["first begins", "third begins"]
    assert {"first: False", "second: False", "third: True"} <= {*sessions.diary}


async def test_one_that_fails_is_in_nobodys_way(autojump_clock: MockClock) -> None:
    succession = Succession()

    async def fail() -> None:
        await trio.sleep(1)
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        await succession.run(fail)
    assert await succession.run(trio.lowlevel.checkpoint)


async def test_one_that_is_cancelled_from_outside_is_in_nobodys_way(autojump_clock: MockClock) -> None:
    succession = Succession()
    with trio.move_on_after(1):
        await succession.run(trio.sleep_forever)
    assert await succession.run(trio.lowlevel.checkpoint)
