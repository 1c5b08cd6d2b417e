"""Threads that hang, threads that are not needed, and results that come together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest
import trio

from fileserver.workers import STUCK, Completions, Workers, waiting

#: Seconds for what takes milliseconds.
SOON = 10.0


def ended(workers: Workers) -> list[str]:
    """Close, and wait for the last word."""
    words: list[str] = []
    workers.close(lambda: words.append("last"))
    assert workers.wait_closed(SOON)
    return words


def test_a_share_that_hangs_takes_its_own_threads_only() -> None:
    hung, other = Workers("hung", 3), Workers("other", 3)
    release, begun = threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        begun.release()
        release.wait(SOON)

    for _ in range(10):
        hung.submit(hang)
    for _ in range(3):
        assert begun.acquire(timeout=SOON)
    assert not begun.acquire(blocking=False), "as many as there are threads, and no more"
    answer: SimpleQueue[int] = SimpleQueue()
    other.submit(lambda: answer.put(1))
    assert answer.get(timeout=SOON) == 1
    release.set()
    assert ended(hung) == ended(other) == ["last"]
    for _ in range(7):
        assert begun.acquire(blocking=False), "and all were done in the end"


def test_where_all_threads_are_stuck_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fileserver.workers.STUCK", 0.0)
    workers = Workers("stuck", 2, 5)
    release = threading.Event()
    begun = threading.Semaphore(0)

    def hang() -> None:
        begun.release()
        release.wait(SOON)

    for _ in range(8):
        workers.submit(hang)
    for _ in range(5):
        assert begun.acquire(timeout=SOON)
    assert not begun.acquire(blocking=False)
    release.set()
    assert ended(workers) == ["last"]


def test_what_waits_behind_stuck_threads_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is submitted: a guest's only program waits for it."""
    now = 1000.0
    monkeypatch.setattr("fileserver.workers.time.monotonic", lambda: now)
    workers = Workers("stuck", 1)
    release, answer = threading.Event(), SimpleQueue[int]()
    workers.submit(lambda: release.wait(SOON))
    workers.submit(lambda: answer.put(1))
    workers.relieve()
    assert threads_of("stuck") == 1
    now += STUCK
    workers.relieve()
    assert answer.get(timeout=SOON) == 1
    release.set()
    assert ended(workers) == ["last"]


def test_who_waits_for_a_program_of_the_host_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fileserver.workers.MOST_WAITING", 2)
    workers = Workers("waits", 1)
    release, begun, answer = threading.Event(), threading.Semaphore(0), SimpleQueue[int]()

    def wait() -> None:
        with waiting():
            begun.release()
            release.wait(SOON)

    workers.submit(wait)
    workers.submit(lambda: answer.put(1))
    workers.submit(wait)
    workers.submit(lambda: answer.put(2))
    assert (answer.get(timeout=SOON), answer.get(timeout=SOON)) == (1, 2)
    for _ in range(3):
        workers.submit(wait)
    for _ in range(3):
        assert begun.acquire(timeout=SOON)
    assert not begun.acquire(timeout=0.05), "two are replaced, the third is the last thread"
    release.set()
    assert ended(workers) == ["last"]


def test_threads_that_are_replaced_at_the_end_all_end() -> None:
    workers = Workers("ends", 1)
    close, release, answer = threading.Event(), threading.Event(), SimpleQueue[int]()

    def wait() -> None:
        close.wait(SOON)
        with waiting():
            release.wait(SOON)

    workers.submit(wait)
    words: list[str] = []
    workers.submit(lambda: answer.put(1))
    workers.close(lambda: words.append("last"))
    close.set()
    assert answer.get(timeout=SOON) == 1, "also when nothing else is served any more"
    assert words == []
    release.set()
    assert workers.wait_closed(SOON)
    assert words == ["last"]


def test_elsewhere_one_just_waits() -> None:
    with waiting():
        assert threads_of("MainThread") == 1


def threads_of(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_threads_are_started_when_there_is_work_for_them() -> None:
    workers = Workers("lazy", 6)
    idents: SimpleQueue[int] = SimpleQueue()
    seen = set()
    for _ in range(50):
        workers.submit(lambda: idents.put(threading.get_ident()))
        seen.add(idents.get(timeout=SOON))
    assert len(seen) <= 2, "one after another needs one thread; two if it has not yet said that it is free"
    assert ended(workers) == ["last"]


def test_a_thread_survives_what_it_runs() -> None:
    workers = Workers("robust", 1)
    answer: SimpleQueue[int] = SimpleQueue()

    def fail() -> None:
        raise ValueError("a bug")

    workers.submit(fail)
    workers.submit(lambda: answer.put(1))
    assert answer.get(timeout=SOON) == 1
    assert ended(workers) == ["last"]


def test_workers_that_never_worked_end_as_well() -> None:
    assert ended(Workers("idle")) == ["last"]


async def test_results_come_to_trio_together() -> None:
    batches: list[list[int]] = []
    here = threading.get_ident()
    threads: set[int] = set()

    def handle(items: list[int]) -> None:
        threads.add(threading.get_ident())
        batches.append(items)

    completions = Completions(handle)
    for number in range(100):
        completions.put(number)
    assert batches == []
    await until(lambda: batches)
    assert batches == [list(range(100))]
    assert threads == {here}


async def test_no_result_is_left_behind() -> None:
    """Four threads put as fast as they can while trio takes."""
    taken: list[int] = []
    completions: Completions[int] = Completions(taken.extend)

    def put() -> None:
        for number in range(2000):
            completions.put(number)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(trio.to_thread.run_sync, put)
    await until(lambda: len(taken) == 8000)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(SOON):
        while not condition():
            await trio.sleep(0.001)
