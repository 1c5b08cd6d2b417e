from __future__ import annotations

from guest_agent.fuse.distance import SAMPLES, USUAL, Distance
from guest_agent.fuse.host import Host
from protocol.files import GetAttributes
from tests.guest_agent.fuse.script import ScriptedLink


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def trip(distance: Distance, clock: Clock, seconds: float) -> None:
    call = object()
    distance.sent(call)
    clock.now += seconds
    distance.answered(call)


def test_before_the_first_answer_it_is_near() -> None:
    distance = Distance()
    assert not distance.is_far
    assert distance.scaled(4, 64) == 4


def test_the_least_of_some_round_trips_counts() -> None:
    clock = Clock()
    distance = Distance(clock)
    for seconds in (0.5, 0.1, 3.0):
        trip(distance, clock, seconds)
    assert round(distance.round_trip, 6) == 0.1
    for _ in range(SAMPLES):
        trip(distance, clock, 0.3)
    assert round(distance.round_trip, 6) == 0.3, "the way has become longer"


def test_what_is_asked_ahead_grows_with_it_up_to_a_limit() -> None:
    distance = Distance()
    asked = []
    for round_trip in (0.0, USUAL, 0.02, 0.1, 10.0):
        distance.round_trip = round_trip
        asked.append(distance.scaled(4, 64))
    assert asked == [4, 4, 16, 64, 64]


def test_one_call_is_timed_at_a_time() -> None:
    clock = Clock()
    distance = Distance(clock)
    first, second = object(), object()
    distance.sent(first)
    clock.now += 1
    distance.sent(second)
    distance.answered(second)
    assert distance.round_trip == 0
    clock.now += 1
    distance.answered(first)
    assert distance.round_trip == 2


def test_another_session_may_have_another_way() -> None:
    clock = Clock()
    distance = Distance(clock)
    trip(distance, clock, 0.001)
    lost = object()
    distance.sent(lost)
    distance.begin()
    distance.answered(lost)
    trip(distance, clock, 0.1)
    assert round(distance.round_trip, 6) == 0.1


def test_it_is_measured_by_what_is_asked() -> None:
    clock = Clock()
    host, link = Host(lambda _: False, Distance(clock)), ScriptedLink()
    host.attach(link)
    host.ask(GetAttributes(1, 2, 1)).begin(lambda _: None)
    clock.now += 0.02
    link.take().answer()
    assert host.is_far
    assert host.scaled(4, 64) == 16
    assert not Host().may_be_far
    assert Host().scaled(4, 64) == 4
