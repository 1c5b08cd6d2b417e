"""The lane over real descriptors: what is called for which event, and what it leaves alone. Nothing here sleeps."""

from __future__ import annotations

import errno
import os
import select
import selectors
import signal
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
from protocol.lane import BUDGET, READABLE, WRITABLE, Lane, OnEvent

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


def test_what_is_still_ready_is_called_again(
    lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "BUDGET", 60.0)
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


def test_a_callback_may_watch_more(lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "BUDGET", 60.0)
    end, later = bench.ready(), bench.ready()

    def watch() -> None:
        lane.watch(later.fileno(), READABLE, bench.note(later))

    lane.watch(end.fileno(), READABLE, bench.note(end, then=watch))
    lane.turn()
    assert bench.called == [end.fileno(), later.fileno()], "what was watched meanwhile has its turn as well"


def test_what_callbacks_say_to_each_other_is_heard_in_the_same_turn(
    lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "BUDGET", 60.0)
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

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        self.timeouts.append(timeout)
        events: list[tuple[int, int]] = self._set.poll(0, most)
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._set, name)


def test_a_turn_without_events_is_one_look(lane: Lane) -> None:
    polls = Polls(lane)
    lane.turn()
    assert polls.timeouts == [0.0]


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


async def test_other_tasks_have_a_turn_between_any_two_of_a_lane_that_is_always_busy(
    lane: Lane, bench: Bench
) -> None:
    end = bench.pair()[0]
    turns = calls = most = 0

    def always(ready: int) -> None:
        nonlocal calls
        calls += 1

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


# --- staying ---------------------------------------------------------------------------------------


class Turns(trio.abc.Instrument):
    """How often trio has looked for its own events."""

    def __init__(self) -> None:
        self.count = 0
        trio.lowlevel.add_instrument(self)

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stay that no test ends by waiting for its end."""
    monkeypatch.setattr(lane_module, "STAY", 20.0)


def far_away(descriptor: int, echoes: int) -> threading.Thread:
    """Somebody in another thread who answers each byte with one, ``echoes`` times."""

    def answer() -> None:
        for _ in range(echoes):
            select.select([descriptor], [], [], 20)
            os.write(descriptor, os.read(descriptor, 1))

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


async def test_who_is_answered_a_thousand_times_takes_no_turn_of_trio(
    lane: Lane, bench: Bench, patience: None
) -> None:
    end, other = bench.pair()
    over, turns, seen = trio.Event(), Turns(), []

    def ask_again(ready: int) -> None:
        end.recv(1)
        seen.append(turns.count)
        if len(seen) == 1000:
            over.set()
        else:
            end.send(b"x")

    lane.watch(end.fileno(), READABLE, ask_again)
    thread = far_away(other.fileno(), 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        end.send(b"x")
        with trio.fail_after(20):
            await over.wait()
        nursery.cancel_scope.cancel()
    thread.join()
    assert len(seen) == 1000
    assert seen[-1] - seen[0] < 10


class Deaf(lane_module._Epoll):
    """A set that hears of nothing and knows only what it finds ready when it asks, as long as that is so.

    So it is with a virtio-serial port when another set has asked first: that took the buffer from the ring, and the
    interrupt that comes then finds nothing there and wakes nobody up. Trio's events are heard.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trio, _ = lane_module._inner_trio()
        self._known: set[int] = set()
        really_register, really_modify = self.register, self.modify

        def register(descriptor: int, events: int) -> None:
            really_register(descriptor, events)
            self._ask(descriptor)

        def modify(descriptor: int, events: int) -> None:
            really_modify(descriptor, events)
            self._ask(descriptor)

        self.register, self.modify, self.poll = register, modify, self._poll_deafly

    def _ask(self, descriptor: int) -> None:
        if descriptor != self._trio and select.select([descriptor], [], [], 0)[0]:
            self._known.add(descriptor)

    def _poll_deafly(self, timeout: float, most: int) -> list[tuple[int, int]]:
        self._known = {each for each in self._known if select.select([each], [], [], 0)[0]}
        heard, _, _ = select.select([self._trio], [], [], 0 if self._known else timeout)
        return [(descriptor, READABLE) for descriptor in [*self._known, *heard]][:most]


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    """A lane whose own set hears, and no other that it makes."""
    lane = Lane()
    monkeypatch.setattr(lane_module, "_Epoll", Deaf)
    yield lane
    lane.close()


needs_epoll = pytest.mark.skipif(not hasattr(select, "epoll"), reason="nobody stays without epoll")


@needs_epoll
async def test_what_only_the_lane_s_own_set_knows_of_is_handled(deaf: Lane) -> None:
    """**Seen:** a files agent that was told by trio, found nothing in a set of its own that had the port as well, and
    was told again at once, for up to 5 s: until the next message of the host's, a heartbeat."""
    with ExitStack() as stack:
        bench = Bench(deaf, stack)
        end, other = bench.pair()
        deaf.watch(end.fileno(), READABLE, bench.note(end))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaf.run)
            for count in range(1, 4):
                await trio.testing.wait_all_tasks_blocked(0.01)
                other.send(b"x")
                with trio.fail_after(5):
                    while len(bench.diary) < count:
                        await trio.sleep(0.001)
            nursery.cancel_scope.cancel()


@needs_epoll
async def test_nor_does_what_comes_behind_it_wait_for_the_end_of_the_stay(deaf: Lane) -> None:
    with ExitStack() as stack:
        end, other = Bench(deaf, stack).pair()
        over, turns, seen = trio.Event(), Turns(), []

        def take_one(ready: int) -> None:
            end.recv(1)
            seen.append(turns.count)
            if len(seen) == 3:
                over.set()

        deaf.watch(end.fileno(), READABLE, take_one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaf.run)
            await trio.testing.wait_all_tasks_blocked(0.01)
            other.send(b"xxx")
            with trio.fail_after(5):
                await over.wait()
            nursery.cancel_scope.cancel()
    assert len(set(seen)) == 1, "one stay"


async def enter(lane: Lane, bench: Bench, nursery: trio.Nursery, then: Callable[[], None]) -> None:
    """Have the lane serve an event in its task; it stays when that is done, if nobody else has anything to do."""
    end, other = bench.pair()
    lane.watch(end.fileno(), READABLE, bench.note(end, then=then))
    nursery.start_soon(lane.run)
    other.send(b"x")


async def test_a_task_that_can_run_does_not_wait_for_who_stays(
    lane: Lane, bench: Bench, patience: None
) -> None:
    woken = trio.Event()
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        await enter(lane, bench, nursery, woken.set)
        await woken.wait()
        nursery.cancel_scope.cancel()
    assert perf_counter() - start < 10


async def test_nor_does_one_that_could_run_before_the_lane_did(
    lane: Lane, bench: Bench, patience: None
) -> None:
    """Trio takes all tasks that can run in one turn, in any order: who comes after the lane is in no queue any more."""
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        end, other = bench.pair()
        lane.watch(end.fileno(), READABLE, bench.note(end))
        nursery.start_soon(lane.run)
        for _ in range(50):
            other.send(b"x")
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert perf_counter() - start < 10


async def test_nor_does_one_that_waits_for_a_descriptor(lane: Lane, bench: Bench, patience: None) -> None:
    mine, far = bench.pair()
    start = perf_counter()
    later = threading.Timer(0.05, lambda: far.send(b"x"))
    async with trio.open_nursery() as nursery:
        await enter(lane, bench, nursery, later.start)
        await trio.lowlevel.wait_readable(mine)
        nursery.cancel_scope.cancel()
    later.join()
    assert perf_counter() - start < 10


async def test_nor_does_one_that_waits_for_a_thread(lane: Lane, bench: Bench, patience: None) -> None:
    begun = threading.Event()
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        await enter(lane, bench, nursery, begun.set)
        await trio.to_thread.run_sync(begun.wait, 20)
        nursery.cancel_scope.cancel()
    assert perf_counter() - start < 10


async def test_nor_does_one_that_sleeps(lane: Lane, bench: Bench, patience: None) -> None:
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        await enter(lane, bench, nursery, lambda: None)
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert perf_counter() - start < 10
    assert bench.diary


async def test_nor_does_one_whose_deadline_a_callback_brings_forward(
    lane: Lane, bench: Bench, patience: None
) -> None:
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope(deadline=trio.current_time() + 60) as nap:

            def wake_soon() -> None:
                nap.deadline = trio.current_time() + 0.05

            await enter(lane, bench, nursery, wake_soon)
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    assert perf_counter() - start < 10


async def test_nor_does_a_signal(lane: Lane, bench: Bench, patience: None) -> None:
    start = perf_counter()
    with trio.open_signal_receiver(signal.SIGUSR1) as received:
        later = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        async with trio.open_nursery() as nursery:
            await enter(lane, bench, nursery, later.start)
            assert await anext(aiter(received)) == signal.SIGUSR1
            nursery.cancel_scope.cancel()
    later.join()
    assert perf_counter() - start < 10


async def test_two_lanes_of_a_run_talk_to_each_other(lane: Lane, bench: Bench, patience: None) -> None:
    """Who stays is told of the other's events, which are trio's; neither keeps the other from staying for ever."""
    second = Lane()
    one, other = bench.pair()
    over, count = trio.Event(), 0

    def answer(end: socket.socket) -> OnEvent:
        def on_event(ready: int) -> None:
            nonlocal count
            count += 1
            end.send(end.recv(1))
            if count == 200:
                over.set()

        return on_event

    lane.watch(one.fileno(), READABLE, answer(one))
    second.watch(other.fileno(), READABLE, answer(other))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        nursery.start_soon(second.run)
        one.send(b"x")
        with trio.fail_after(20):
            await over.wait()
        nursery.cancel_scope.cancel()
    second.close()
    assert count >= 200


async def test_a_stay_ends_where_events_do_not(lane: Lane, bench: Bench) -> None:
    """Who is cancelled as an event comes is not woken up by that."""
    end = bench.pair()[0]
    calls = 0

    def always(ready: int) -> None:
        nonlocal calls
        calls += 1

    lane.watch(end.fileno(), WRITABLE, always)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        while calls < 10:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert calls < 1_000_000


async def test_a_stay_ends_where_nothing_happens(
    lane: Lane, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "STAY", 0.001)
    polls, turns = Polls(lane), Turns()
    async with trio.open_nursery() as nursery:
        await enter(lane, bench, nursery, lambda: None)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(bench.diary) == 1
        before = len(polls.timeouts), turns.count
        await trio.sleep(0.05)
        assert len(polls.timeouts) == before[0], "nothing is polled"
        assert turns.count - before[1] < 5
        nursery.cancel_scope.cancel()


async def test_what_is_changed_while_it_stays_is_changed_at_once(
    lane: Lane, bench: Bench, patience: None
) -> None:
    """Watched, watched for something else and forgotten by callbacks, which the stay that calls them must see."""
    first, second = bench.ready(), bench.ready()
    over, diary = trio.Event(), []

    def on_second(ready: int) -> None:
        diary.append(ready)
        if ready == READABLE:
            lane.watch(second.fileno(), WRITABLE, on_second)
        else:
            lane.forget(second.fileno())
            end, far = bench.pair()
            lane.watch(end.fileno(), READABLE, lambda ready: over.set())
            far.send(b"x")

    def on_first() -> None:
        lane.forget(first.fileno())
        lane.watch(second.fileno(), READABLE, on_second)

    lane.watch(first.fileno(), READABLE, bench.note(first, reads=False, then=on_first))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        with trio.fail_after(10):
            await over.wait()
        nursery.cancel_scope.cancel()
    assert len(bench.diary) == 1
    assert diary == [READABLE, WRITABLE]


async def test_without_a_way_to_hear_of_trio_s_events_nobody_stays(
    lane: Lane, bench: Bench, patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "_inner_trio", lambda: (-1, lambda: -1.0))
    mine, far = bench.pair()
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        await enter(lane, bench, nursery, lambda: far.send(b"x") and None)
        await trio.lowlevel.wait_readable(mine)
        nursery.cancel_scope.cancel()
    assert perf_counter() - start < 10
    assert bench.diary


async def test_this_trio_is_one_that_is_known() -> None:
    descriptor, next_deadline = lane_module._inner_trio()
    assert os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[eventpoll]"
    with trio.move_on_after(60):
        assert 0 < next_deadline() - trio.current_time() <= 60
        await trio.lowlevel.checkpoint()


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
    assert not set(os.listdir("/dev/fd")) - before


def test_a_machine_without_epoll_gets_what_stands_in_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    lane = Lane()
    assert isinstance(lane._set, lane_module._Kqueue)
    assert isinstance(lane._set._selector, selectors.BaseSelector)
    lane.close()
