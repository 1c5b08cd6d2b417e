from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock as Clock

from guest_agent.edges import Known
from guest_agent.listeners import ALL_PROTOS, Protos, Snapshot
from guest_agent.ports import POLL_FASTEST, POLL_SLOWEST, RETRY_AFTER, PortDetector, open_polling
from protocol.api import Listener, Listeners, Proto

Scenario = Callable[[str], dict[str, Any]]


TCP, UDP = frozenset({Proto.TCP}), frozenset({Proto.UDP})


def ports(*numbers: int) -> Snapshot:
    return frozenset(Listener(Proto.TCP, "127.0.0.1", number) for number in numbers)


class World:
    """A guest whose listeners, and whose wake-ups, are set by the test."""

    detection = "scripted"
    confirm_after = 0.05

    def __init__(self) -> None:
        self.truth = ports()
        self.dumps: list[float] = []
        self.read: list[Protos] = []
        self.failures: list[Exception] = []
        self.seconds_per_dump = 0.0
        self.told: list[Listeners] = []
        self.changed: list[Protos] = []
        self.wake_sender, self._wakes = trio.open_memory_channel[Protos](math.inf)

    async def dump(self, protos: Protos) -> Snapshot:
        self.read.append(protos)
        self.dumps.append(trio.current_time())
        if self.failures:
            raise self.failures.pop()
        truth = frozenset(listener for listener in self.truth if listener.proto in protos)
        await trio.sleep(self.seconds_per_dump)
        return truth

    @asynccontextmanager
    async def wakes(self) -> AsyncIterator[World]:
        yield self

    async def wait(self, known: Known) -> Protos:
        return await self._wakes.receive()

    def settle(self, read: Protos, changed: Protos) -> None:
        self.changed.append(changed)

    def wake(self, protos: Protos = ALL_PROTOS) -> None:
        self.wake_sender.send_nowait(protos)

    async def hear(self, notice: Listeners) -> None:
        self.told.append(notice)


async def settled() -> None:
    await trio.sleep(10)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def detector(world: World, nursery: trio.Nursery) -> PortDetector:
    detector = PortDetector()
    nursery.start_soon(detector.follow, world.dump, world.wakes)
    await settled()
    return detector


async def test_idle_costs_one_dump_for_ever(
    autojump_clock: Clock, world: World, detector: PortDetector
) -> None:
    await trio.sleep(3600)
    assert len(world.dumps) == 1
    assert (detector.detection, detector.dumps) == ("scripted", 1)


async def test_a_wake_is_one_dump_and_one_confirmation(
    autojump_clock: Clock, world: World, detector: PortDetector
) -> None:
    started = trio.current_time()
    world.wake()
    await settled()
    assert [moment - started for moment in world.dumps[1:]] == pytest.approx([0, world.confirm_after])


async def test_the_confirmation_sees_what_the_wake_came_too_early_for(
    autojump_clock: Clock, world: World, detector: PortDetector, nursery: trio.Nursery
) -> None:
    nursery.start_soon(detector.announce, world.hear)
    await settled()
    world.wake()
    await trio.sleep(0.01)
    world.truth = ports(80)
    await settled()
    assert world.told[1:] == [Listeners(full=False, added=sorted(ports(80)))]


async def test_what_woke_is_read_and_of_udp_only_what_changed_is_confirmed(
    autojump_clock: Clock, world: World, detector: PortDetector, nursery: trio.Nursery
) -> None:
    nursery.start_soon(detector.announce, world.hear)
    world.truth = both = ports(80) | {Listener(Proto.UDP, "127.0.0.1", 53)}
    world.wake(TCP)
    await settled()
    world.wake(UDP)
    await settled()
    world.wake(UDP)
    await settled()
    assert world.read[1:] == [TCP, TCP, UDP, UDP, UDP]
    assert world.changed[1:] == [TCP, frozenset(), UDP, frozenset(), frozenset()]
    assert {listener for notice in world.told for listener in notice.added} == both


async def test_a_vain_wake_of_udp_does_not_forget_the_confirmation_of_tcp(
    autojump_clock: Clock, world: World, detector: PortDetector
) -> None:
    world.wake(TCP)
    world.wake(UDP)
    await settled()
    assert world.read[1:] == [TCP, UDP, TCP]


async def test_detection_under_constant_change_takes_at_most_half_the_time(
    autojump_clock: Clock, world: World, detector: PortDetector
) -> None:
    world.seconds_per_dump = 0.1
    for _ in range(1000):
        world.wake()
    started, before = trio.current_time(), len(world.dumps)
    await settled()
    assert (len(world.dumps) - before) * 0.1 <= (trio.current_time() - started) / 2 + 0.1


async def test_every_session_is_told_everything_first(
    autojump_clock: Clock, world: World, detector: PortDetector, nursery: trio.Nursery
) -> None:
    world.truth = ports(80, 443)
    world.wake()
    await settled()
    for _ in range(2):
        world.told.clear()
        with trio.move_on_after(1):
            await detector.announce(world.hear)
        assert world.told == [Listeners(full=True, added=sorted(ports(80, 443)))]
    assert len(world.dumps) == 3  # sessions cost no dumps


async def test_a_session_before_the_first_dump_waits_for_the_truth(
    autojump_clock: Clock, world: World, nursery: trio.Nursery
) -> None:
    detector = PortDetector()
    nursery.start_soon(detector.announce, world.hear)
    await settled()
    assert world.told == []
    nursery.start_soon(detector.follow, world.dump, world.wakes)
    await settled()
    assert world.told == [Listeners(full=True, added=[])]


async def test_a_slow_session_gets_the_difference_of_all_it_missed(
    autojump_clock: Clock, world: World, detector: PortDetector, nursery: trio.Nursery
) -> None:
    async def hear_slowly(notice: Listeners) -> None:
        await world.hear(notice)
        await trio.sleep(100)

    nursery.start_soon(detector.announce, hear_slowly)
    await settled()
    for truth in (ports(1), ports(1, 2), ports(2), ports(2, 3), ports(3)):
        world.truth = truth
        world.wake()
        await trio.sleep(1)
    await trio.sleep(200)
    assert world.told == [Listeners(full=True, added=[]), Listeners(full=False, added=sorted(ports(3)))]


async def test_a_failed_dump_is_tried_again(
    autojump_clock: Clock, world: World, detector: PortDetector
) -> None:
    world.failures = [OSError("netlink"), ImportError("pyroute2")]
    before = len(world.dumps)
    world.wake()
    started = trio.current_time()
    await settled()
    assert world.dumps[before + 2] - started == pytest.approx(2 * RETRY_AFTER)


async def test_polling_is_quick_after_a_change_and_slow_otherwise(
    autojump_clock: Clock, world: World, nursery: trio.Nursery
) -> None:
    detector = PortDetector()
    nursery.start_soon(detector.follow, world.dump, open_polling)
    await trio.sleep(100)
    assert detector.detection == "polling"
    assert world.dumps[1] - world.dumps[0] == pytest.approx(POLL_FASTEST)
    assert world.dumps[-1] - world.dumps[-2] == pytest.approx(POLL_SLOWEST)
    world.truth = ports(80)
    before = len(world.dumps)
    await trio.sleep(2 * POLL_SLOWEST)
    gaps = [later - earlier for earlier, later in pairwise(world.dumps[before:])]
    assert min(gaps) == pytest.approx(POLL_FASTEST)


def test_real_listeners_come_and_go_with_tracefs(in_namespace: Scenario, tracing: Path) -> None:
    result = in_namespace("follow_tracefs")
    assert (result["detection"], result["fulls"]) == ("tracefs", 1)
    assert result["slowest"] < 2


def test_real_listeners_come_and_go_with_polling(in_namespace: Scenario) -> None:
    result = in_namespace("follow_polling")
    assert (result["detection"], result["fulls"]) == ("polling", 1)
    assert result["slowest"] < 2


def test_silence_connections_and_containers_cost_no_dumps(in_namespace: Scenario, tracing: Path) -> None:
    result = in_namespace("storms")
    silent, *after = result["counts"]
    assert after == [silent] * 3
    assert result["notices"] == 2


def test_real_udp_servers_come_and_go_with_tracefs(in_namespace: Scenario, tracing: Path) -> None:
    result = in_namespace("follow_udp_tracefs")
    assert (result["detection"], result["fulls"]) == ("tracefs", 1)
    assert result["slowest"] < 2


def test_real_udp_servers_come_and_go_with_polling(in_namespace: Scenario) -> None:
    result = in_namespace("follow_udp_polling")
    assert (result["detection"], result["fulls"]) == ("polling", 1)
    assert result["slowest"] < 2


def test_udp_clients_cost_no_dumps_and_those_that_bind_few(in_namespace: Scenario, tracing: Path) -> None:
    result = in_namespace("udp_storms")
    silent, clients, containers, binding = result["counts"]
    assert clients == containers == silent
    # At 0, 0.05, 0.15, 0.35, 0.75 and 1.55 s, and then one a second, for as long as it took.
    assert 1 <= binding - containers <= 6 + max(0.0, result["seconds"] - 1.55)
    assert result["seconds"] < 30
    assert result["notices"] == 2


def test_a_udp_server_that_connects_stays_until_it_closes(in_namespace: Scenario, tracing: Path) -> None:
    result = in_namespace("udp_connected")
    assert result["told"] == [[["0.0.0.0", 5300], ["127.0.0.1", 5301]]]
    assert result["notices"] == 4, "it was never said to have gone"


def test_churn_ends_in_the_truth(in_namespace: Scenario, tracing: Path) -> None:
    assert in_namespace("churn")["dumps"] <= 110


def test_where_tracefs_is_refused_polling_takes_over(in_namespace: Scenario) -> None:
    assert in_namespace("unsure_wakes")["detection"] == "polling"
