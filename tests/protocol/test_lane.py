"""The lane over real descriptors: what is called for which event, and what it leaves alone. Nothing here sleeps."""

from __future__ import annotations

import errno
import os
import select
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import Any

import pytest
import trio
import trio.testing

from protocol import lane as lane_module
from protocol.lane import BUDGET, LONGEST_STAY, READABLE, WRITABLE, Lane, OnEvent

BACKENDS = ["epoll", "selectors"] if hasattr(select, "epoll") else ["selectors"]


@pytest.fixture(params=BACKENDS)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    """One of each kind: the laws are the same, whatever the kernel offers."""
    if request.param == "selectors":
        monkeypatch.setattr(lane_module, "_Epoll", lane_module._Kqueue)
    lane = Lane()
    yield lane
    lane.close()


class Bench:
    """Socket pairs that are closed at the end, and a diary of what was called."""

    def __init__(self, lane: Lane, stack: ExitStack) -> None:
        self.lane = lane
        self.diary: list[tuple[int, int]] = []
        self._stack = stack

    def pair(self) -> tuple[socket.socket, socket.socket]:
        one, other = socket.socketpair()
        for end in (one, other):
            end.setblocking(False)
            self._stack.callback(end.close)
        return one, other

    def ready(self) -> socket.socket:
        """A socket with a byte to read."""
        one, other = self.pair()
        other.send(b"x")
        return one

    def note(
        self, end: socket.socket, *, reads: bool = True, then: Callable[[], None] = lambda: None
    ) -> OnEvent:
        """Writes down what was ready, reads what has come, and does something."""
        number = end.fileno()

        def on_event(ready: int) -> None:
            self.diary.append((number, ready))
            if reads and ready & READABLE:
                end.recv(100)
            then()

        return on_event

    @property
    def called(self) -> list[int]:
        return [descriptor for descriptor, _ in self.diary]


@pytest.fixture
def bench(lane: Lane) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(lane, stack)


# --- watch, modify, forget -------------------------------------------------------------------------


def test_only_what_is_ready_is_called_and_with_what_it_is_ready_for(lane: Lane, bench: Bench) -> None:
    readable, writable, idle = bench.ready(), bench.pair()[0], bench.pair()[0]
    lane.watch(readable.fileno(), READABLE, bench.note(readable))
    lane.watch(idle.fileno(), READABLE, bench.note(idle))
    lane.turn()
    assert bench.diary == [(readable.fileno(), READABLE)]
    bench.diary.clear()
    stop = bench.note(writable, then=lambda: lane.watch(writable.fileno(), 0, stop))
    lane.watch(writable.fileno(), READABLE | WRITABLE, stop)
    lane.turn()
    assert bench.diary == [(writable.fileno(), WRITABLE)]


def test_what_is_still_ready_is_called_again(lane: Lane, bench: Bench) -> None:
    end, calls = bench.ready(), []

    def read_on_the_third_call(ready: int) -> None:
        calls.append(ready)
        if len(calls) == 3:
            end.recv(1)

    lane.watch(end.fileno(), READABLE, read_on_the_third_call)
    lane.turn()
    assert calls == [READABLE] * 3


def test_the_events_and_the_callback_may_change(lane: Lane, bench: Bench) -> None:
    end = bench.ready()
    number = end.fileno()
    lane.watch(number, READABLE, lambda ready: pytest.fail("the old one"))
    lane.watch(number, READABLE, bench.note(end))
    lane.turn()
    assert bench.diary == [(number, READABLE)]
    lane.watch(number, WRITABLE, bench.note(end, then=lambda: lane.forget(number)))
    lane.turn()
    assert bench.diary[1:] == [(number, WRITABLE)]


def test_watching_for_nothing_is_forgetting(lane: Lane, bench: Bench) -> None:
    end = bench.ready()
    lane.watch(end.fileno(), READABLE, bench.note(end))
    lane.watch(end.fileno(), 0, bench.note(end))
    lane.watch(end.fileno(), 0, bench.note(end))
    lane.turn()
    assert bench.diary == []
    lane.watch(end.fileno(), READABLE, bench.note(end))
    lane.turn()
    assert bench.called == [end.fileno()]


def test_forgetting_what_is_not_watched_is_nothing(lane: Lane, bench: Bench) -> None:
    end = bench.ready()
    lane.forget(end.fileno())
    lane.watch(end.fileno(), READABLE, bench.note(end))
    lane.forget(end.fileno())
    lane.forget(end.fileno())
    lane.forget(-1)
    lane.turn()
    assert bench.diary == []


def test_a_descriptor_that_is_not_open_cannot_be_watched_and_is_not_kept(lane: Lane, bench: Bench) -> None:
    with socket.socket() as closed:
        number = closed.fileno()
    with pytest.raises((OSError, ValueError)):
        lane.watch(number, READABLE, lambda ready: None)
    with pytest.raises((OSError, ValueError)):
        lane.watch(-1, READABLE, lambda ready: None)
    lane.forget(number)
    lane.turn()


def test_the_end_of_the_other_side_is_readable(lane: Lane, bench: Bench) -> None:
    end, other = bench.pair()
    other.close()
    lane.watch(end.fileno(), READABLE, bench.note(end, then=lambda: lane.forget(end.fileno())))
    lane.turn()
    assert len(bench.diary) == 1
    assert bench.diary[0][1] & READABLE


def test_the_end_of_a_pipe_s_reader_is_writable(lane: Lane) -> None:
    reader, writer = os.pipe()
    calls: list[int] = []

    def on_event(ready: int) -> None:
        calls.append(ready)
        lane.forget(writer)

    try:
        lane.watch(writer, WRITABLE, on_event)
        os.close(reader)
        lane.turn()
        assert len(calls) == 1
        assert calls[0] & ~READABLE
    finally:
        os.close(writer)


# --- what callbacks may do -------------------------------------------------------------------------


def test_a_callback_may_forget_itself(lane: Lane, bench: Bench) -> None:
    end = bench.ready()
    lane.watch(end.fileno(), READABLE, bench.note(end, reads=False, then=lambda: lane.forget(end.fileno())))
    lane.turn()
    lane.turn()
    assert bench.diary == [(end.fileno(), READABLE)], "it is still readable"


def test_a_callback_may_forget_and_close_itself(lane: Lane, bench: Bench) -> None:
    end, after = bench.ready(), bench.ready()

    def leave() -> None:
        lane.forget(end.fileno())
        end.close()

    lane.watch(end.fileno(), READABLE, bench.note(end, then=leave))
    lane.watch(after.fileno(), READABLE, bench.note(after))
    lane.turn()
    assert len(bench.diary) == 2


def test_who_is_forgotten_by_another_one_in_the_same_batch_is_not_called(lane: Lane, bench: Bench) -> None:
    ends = [bench.ready() for _ in range(5)]

    def forget_the_others(me: socket.socket) -> Callable[[], None]:
        def forget() -> None:
            for end in ends:
                if end is not me:
                    lane.forget(end.fileno())

        return forget

    for end in ends:
        lane.watch(end.fileno(), READABLE, bench.note(end, then=forget_the_others(end)))
    lane.turn()
    assert len(bench.called) == 1


def test_who_is_closed_by_another_one_in_the_same_batch_is_not_called(lane: Lane, bench: Bench) -> None:
    ends = [bench.ready() for _ in range(5)]
    numbers = {end.fileno() for end in ends}

    def close_the_others(me: socket.socket) -> Callable[[], None]:
        def close() -> None:
            for end in ends:
                if end is not me:
                    lane.forget(end.fileno())
                    end.close()

        return close

    for end in ends:
        lane.watch(end.fileno(), READABLE, bench.note(end, then=close_the_others(end)))
    lane.turn()
    assert len(bench.called) == 1
    assert set(lane._watched) == set(bench.called) <= numbers


def test_a_new_descriptor_with_the_number_of_a_closed_one(lane: Lane, bench: Bench) -> None:
    """Both had an event in one batch, and whoever comes first replaces the other one.

    The new one may be called in vain, so callbacks must bear that; the old one's may not be called.
    """
    numbers = [bench.ready().detach() for _ in range(2)]
    fresh, far = bench.pair()
    calls: list[int] = []
    seen: list[bytes] = []

    def on_fresh(ready: int) -> None:
        with suppress(BlockingIOError):
            seen.append(os.read(calls[0] ^ numbers[0] ^ numbers[1], 100))

    def replace_the_other(me: int) -> OnEvent:
        def on_event(ready: int) -> None:
            calls.append(me)
            os.read(me, 100)
            other = me ^ numbers[0] ^ numbers[1]
            lane.forget(other)
            os.dup2(fresh.fileno(), other)
            lane.watch(other, READABLE, on_fresh)

        return on_event

    try:
        for number in numbers:
            lane.watch(number, READABLE, replace_the_other(number))
        lane.turn()
        assert len(calls) == 1
        assert seen == []
        far.send(b"new")
        lane.turn()
        assert seen == [b"new"]
    finally:
        for number in numbers:
            lane.forget(number)
            os.close(number)


def test_a_callback_may_watch_more(lane: Lane, bench: Bench) -> None:
    end, later = bench.ready(), bench.ready()

    def watch() -> None:
        lane.watch(later.fileno(), READABLE, bench.note(later))

    lane.watch(end.fileno(), READABLE, bench.note(end, then=watch))
    lane.turn()
    assert bench.called == [end.fileno(), later.fileno()], "what was watched meanwhile has its turn as well"


def test_what_callbacks_say_to_each_other_is_heard_in_the_same_turn(lane: Lane, bench: Bench) -> None:
    one, other = bench.pair()
    count = 0

    def answer(end: socket.socket) -> OnEvent:
        def on_event(ready: int) -> None:
            nonlocal count
            count += 1
            data = end.recv(100)
            if count < 10:
                end.send(data)

        return on_event

    for end in (one, other):
        lane.watch(end.fileno(), READABLE, answer(end))
    one.send(b"ball")
    lane.turn()
    assert count == 10


# --- the length of a turn --------------------------------------------------------------------------


class Polls:
    """The lane's set, with a note of how long each poll was ready to wait."""

    def __init__(self, lane: Lane) -> None:
        self._set: Any = lane._set
        self.timeouts: list[float] = []
        lane._set = self  # type: ignore[assignment]

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.timeouts.append(timeout)
        events: list[tuple[int, int]] = self._set.poll(0)
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._set, name)


def test_a_turn_without_events_is_one_look(lane: Lane) -> None:
    polls = Polls(lane)
    lane.turn()
    assert polls.timeouts == [0.0]


def test_it_stays_for_what_is_expected(lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes from another thread, at any time after it was asked for."""
    monkeypatch.setattr(lane_module, "BUDGET", 60.0)
    lane._stay = 30.0
    end, other = bench.pair()
    asked = threading.Event()
    answering = threading.Thread(target=lambda: asked.wait(20) and other.send(b"answer"))

    def then() -> None:
        if len(bench.diary) == 1:
            lane.expect()
            asked.set()

    lane.watch(end.fileno(), READABLE, bench.note(end, then=then))
    other.send(b"x")
    answering.start()
    start = perf_counter()
    lane.turn()
    answering.join()
    assert len(bench.diary) == 2
    assert perf_counter() - start < 25, "and not for what comes after it"


def test_it_does_not_stay_for_what_nobody_expects(lane: Lane, bench: Bench) -> None:
    lane._stay = 30.0
    end = bench.ready()
    lane.watch(end.fileno(), READABLE, bench.note(end))
    start = perf_counter()
    lane.turn()
    assert perf_counter() - start < 25


def test_what_was_expected_and_stopped_before_a_turn_is_not_of_that_turn(
    lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "BUDGET", 60.0)
    lane._stay = 0.0005
    end = bench.ready()
    lane.watch(end.fileno(), READABLE, bench.note(end))
    lane.expect()
    lane.stop()
    polls = Polls(lane)
    lane.turn()
    assert polls.timeouts == [0.0, 0.0]


def test_stop_ends_the_turn_after_the_batch(lane: Lane, bench: Bench) -> None:
    ends = [bench.ready() for _ in range(3)]
    for end in ends:
        lane.watch(end.fileno(), READABLE, bench.note(end, then=lane.stop))
    polls = Polls(lane)
    lane.turn()
    assert len(polls.timeouts) == 1
    assert sorted(bench.called) == sorted(end.fileno() for end in ends)


def test_stop_is_stronger_than_expect(lane: Lane, bench: Bench) -> None:
    lane._stay = 30.0
    end = bench.ready()

    def then() -> None:
        lane.stop()
        lane.expect()

    lane.watch(end.fileno(), READABLE, bench.note(end, then=then))
    polls = Polls(lane)
    lane.turn()
    assert len(polls.timeouts) == 1


def test_the_budget_ends_a_turn_that_would_go_on_for_ever(
    lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(lane_module, "perf_counter", lambda: now)
    end = bench.pair()[0]
    calls = 0

    def take_a_quarter(ready: int) -> None:
        nonlocal now, calls
        calls += 1
        now += BUDGET / 4
        lane.expect()
        if calls > 1000:  # or it would never end
            lane.forget(end.fileno())

    lane.watch(end.fileno(), WRITABLE, take_a_quarter)
    lane.turn()
    assert 4 <= calls <= 5
    lane.turn()
    assert 8 <= calls <= 10, "each turn has a budget of its own"


# --- the task --------------------------------------------------------------------------------------


async def test_the_task_waits_while_nothing_happens_and_serves_what_does(lane: Lane, bench: Bench) -> None:
    polls = Polls(lane)
    end, other = bench.pair()
    lane.watch(end.fileno(), READABLE, bench.note(end))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert polls.timeouts == [], "nothing is polled"
        for count in range(1, 4):
            other.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(bench.diary) == count
        late, far = bench.pair()
        lane.watch(late.fileno(), READABLE, bench.note(late))
        far.send(b"x")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert bench.called[-1] == late.fileno(), "what is watched while the task waits is served, too"
        nursery.cancel_scope.cancel()


async def test_what_is_watched_before_the_task_runs_is_served(lane: Lane, bench: Bench) -> None:
    end = bench.ready()
    lane.watch(end.fileno(), READABLE, bench.note(end))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert bench.called == [end.fileno()]


async def test_a_stay_is_no_longer_than_it_may_be(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(lane_module, "perf_counter", lambda: float(next(clock)))
    await lane._measure()
    assert lane._stay <= LONGEST_STAY


async def test_other_tasks_have_a_turn_between_any_two_of_a_lane_that_is_always_busy(
    lane: Lane, bench: Bench
) -> None:
    end = bench.pair()[0]
    turns = calls = most = 0

    def always(ready: int) -> None:
        nonlocal calls
        calls += 1
        lane.stop()  # so that a turn is a call

    lane.watch(end.fileno(), WRITABLE, always)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        while calls == 0:
            await trio.lowlevel.checkpoint()
        while turns < 100:
            before = calls
            await trio.lowlevel.checkpoint()
            most = max(most, calls - before)
            turns += 1
        nursery.cancel_scope.cancel()
    assert calls >= 50
    assert most <= 2, "trio takes the ready tasks in any order, so two may be next to each other"


# --- the end ---------------------------------------------------------------------------------------


def test_close_while_watched_leaves_the_descriptors_open_and_itself_closed(lane: Lane, bench: Bench) -> None:
    ends = [bench.ready() for _ in range(3)]
    for end in ends:
        lane.watch(end.fileno(), READABLE, bench.note(end))
    number = lane._set.fileno()
    lane.close()
    lane.close()
    with pytest.raises(OSError) as caught:
        os.fstat(number)
    assert caught.value.errno == errno.EBADF
    for end in ends:
        lane.forget(end.fileno())
        assert end.recv(10) == b"x"
    lane.watch(ends[0].fileno(), 0, bench.note(ends[0]))
    assert bench.diary == []


def test_a_closed_lane_watches_nothing(lane: Lane, bench: Bench) -> None:
    end = bench.pair()[0]
    lane.close()
    for _ in range(2):
        with pytest.raises((OSError, ValueError)):
            lane.watch(end.fileno(), READABLE, bench.note(end))
        lane.forget(end.fileno())


def test_the_set_is_not_inherited(lane: Lane) -> None:
    number = lane._set.fileno()
    assert not os.get_inheritable(number)
    script = f"import os\ntry: os.fstat({number})\nexcept OSError: print('closed')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], close_fds=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "closed\n", done.stderr


def test_a_thousand_come_and_go(lane: Lane, bench: Bench) -> None:
    before = set(os.listdir("/dev/fd"))
    for _ in range(1000):
        one, other = socket.socketpair()
        with one, other:
            other.send(b"x")
            lane.watch(one.fileno(), READABLE, bench.note(one))
            lane.turn()
            lane.forget(one.fileno())
    assert len(bench.diary) == 1000
    assert not lane._watched
    assert set(os.listdir("/dev/fd")) == before


def test_a_machine_without_epoll_gets_what_stands_in_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    lane = Lane()
    assert isinstance(lane._set, lane_module._Kqueue)
    assert isinstance(lane._set._selector, selectors.BaseSelector)
    lane.close()
