"""Threads for what may wait for a disk, and the way back from them to trio.

The laws:
- Each share has its own few threads: a share on a disk that hangs, or on a file server that is away, has all of
  them waiting and takes nothing from the others. They are started when there is work for them.
- Results come back in batches: while one is being handled, the next one gathers. A thread switch costs 20-100 us
  and an entry of the journal's 5, so under load everything that is per batch is nearly free.
- A thread that hangs does not keep the process alive.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

import trio

from protocol.lane import READABLE, Lane

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

#: Threads of one share. The guest's kernel has a few dozen requests under way at most, a disk's own parallelism
#: is not Python's to use, and each thread more is one more to wait for the interpreter's lock.
THREADS: Final = 6
#: Threads of a share of which none has come to an end with anything for ``STUCK`` seconds: what hangs on a dead mount
#: somewhere below it must not stop all the rest.
MOST_THREADS: Final = 48
STUCK: Final = 0.5
#: Threads of one share that may be replaced while they wait for a program of the host (``waiting``).
MOST_WAITING: Final = 16

_current = threading.local()


class WouldWait(Exception):
    """A program of the host has to be waited for, and who does this must not (``without_waiting``)."""


class Workers:
    """Runs functions in ``limit`` threads, or up to ``most`` where those are stuck. They must not raise."""

    def __init__(self, name: str, limit: int = THREADS, most: int = MOST_THREADS) -> None:
        self._name = name
        self._limit = limit
        self._most = most
        self._moved = 0.0  # when a function was last started with all others done, or came to its end
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0
        self._threads = 0
        self._waiting = 0
        self._closing = False
        self._last: Callable[[], object] = lambda: None
        self._closed = threading.Event()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was submitted has been done."""
        return not self._unfinished

    def submit(self, function: Callable[[], object]) -> None:
        """Have ``function`` run, after everything that was submitted before has at least begun."""
        with self._lock:
            self._unfinished += 1
            if self._unfinished == 1:
                self._moved = time.monotonic()
            start = self._take_another()
        self._queue.put(function)
        if start:
            self._start()

    def relieve(self) -> None:
        """To be called once a second: where all threads are stuck, what waits behind them needs one more, also if
        nothing else is submitted."""
        with self._lock:
            start = self._take_another()
        if start:
            self._start()

    def _take_another(self) -> bool:
        """With the lock held: whether there is one thread more from now on."""
        stuck = time.monotonic() - self._moved >= STUCK
        limit = self._most if stuck else self._limit + min(self._waiting, MOST_WAITING)
        more = self._threads < min(limit, self._most, self._unfinished)
        self._threads += more
        if more and self._closing:
            self._queue.put(None)
        return more

    def _start(self) -> None:
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        with self._lock:
            self._waiting += 1
            start = self._take_another()
        if start:
            self._start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def close(self, last: Callable[[], object]) -> None:
        """Let the threads end when all is done that was submitted; the last one does ``last``, alone.

        Nothing may be submitted any more.
        """
        self.submit(lambda: None)  # so that there is a thread
        self._last = last
        with self._lock:
            self._closing = True  # each thread that is started from now on brings its own end with it
            threads = self._threads
        for _ in range(threads):
            self._queue.put(None)

    def wait_closed(self, timeout: float) -> bool:
        """Whether all has come to its end, after ``close``, within ``timeout`` seconds."""
        return self._closed.wait(timeout)

    def _work(self) -> None:
        _current.workers = self
        self._work_until_closed()
        with self._lock:
            self._threads -= 1
            remaining = self._threads
        if not remaining:
            try:
                self._last()
            finally:
                self._closed.set()

    def _work_until_closed(self) -> None:
        while (function := self._queue.get()) is not None:
            try:
                function()
            except Exception:
                logger.exception("worker.failed thread=%s", self._name)
            with self._lock:
                self._unfinished -= 1
                self._moved = time.monotonic()


def waiting() -> contextlib.AbstractContextManager[None]:
    """Around what waits for a program of the host, which may take a minute: another thread does the other work of the
    share meanwhile. It stays afterwards. Raises ``WouldWait`` in ``without_waiting``."""
    if getattr(_current, "never_waits", False):
        raise WouldWait
    workers: Workers | None = getattr(_current, "workers", None)
    return contextlib.nullcontext() if workers is None else workers._replaced()


def without_waiting(function: Callable[[], object]) -> None:
    """Call ``function``, in which ``waiting`` raises: another thread has to do it then."""
    _current.never_waits = True
    try:
        function()
    finally:
        _current.never_waits = False


class Completions(Generic[ItemT]):
    """Items put by any thread come to ``handle`` in the thread of the current trio run, many at a time.

    With a ``lane`` they come there, without a turn of trio's; until ``close``, which whoever serves it must await.
    """

    def __init__(self, handle: Callable[[list[ItemT]], None], lane: Lane | None = None) -> None:
        self._handle = handle
        self._wake: Callable[[], object] = partial(
            trio.lowlevel.current_trio_token().run_sync_soon, self._take
        )
        self._lane = lane
        self._pipe: tuple[int, int] | None = None
        self._closing, self._closed = threading.Lock(), False
        if lane is not None:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._wake = partial(os.write, self._pipe[1], b"x")
            lane.watch(self._pipe[0], READABLE, self._on_readable)
        self._items: deque[ItemT] = deque()
        self._awake = False

    def put(self, item: ItemT) -> None:
        """Hand over an item. Nothing happens when trio's run is over."""
        self._items.append(item)
        if not self._awake:  # else the one who set it has yet to look, and will find the item
            self._awake = True
            with contextlib.suppress(trio.RunFinishedError), self._closing:
                if not self._closed:
                    self._wake()

    def close(self) -> None:
        """Nothing comes any more."""
        with self._closing:
            self._closed = True
        if self._pipe is not None and self._lane is not None:
            self._lane.forget(self._pipe[0])
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _on_readable(self, ready: int) -> None:
        assert self._pipe is not None
        os.read(self._pipe[0], 64)
        self._take()

    def _take(self) -> None:
        self._awake = False
        items: list[ItemT] = []
        while self._items:
            items.append(self._items.popleft())
        if items:
            self._handle(items)
