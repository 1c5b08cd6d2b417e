"""The express lane: descriptors whose events are handled where they are seen, many to one turn of trio.

A turn of trio costs 30 us, and 500 in an emulated guest; a byte that is forwarded there and back would need a dozen.
So one task of trio's waits for all descriptors at once (an epoll set is itself a descriptor that one can wait for),
calls what belongs to each event, and then stays: it blocks, in its own turn, until there is another event or trio has
something to do. That is a task that could run, which an instrument tells; an event of its own, since its epoll set is
waited for, too; or a deadline. So who stays is in nobody's way, and the answer to what was passed on finds him awake.

The laws: a callback neither waits nor raises (one that does is a bug, and loses its descriptor, not all others
theirs); a task that can run waits for one batch of events at the most; nothing is polled. And a descriptor is in one
epoll set, that of its lane: asking whether a virtio-serial port is readable takes the buffer out of the ring
(``get_inbuf`` of drivers/char/virtio_console.c), and an interrupt that finds the ring empty wakes nobody up
(``vring_interrupt``). So of what one set has asked about, another one that has the same port may never hear.
"""

from __future__ import annotations

import logging
import math
import select
import selectors
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import trio

log = logging.getLogger(__name__)

READABLE: Final = 1
WRITABLE: Final = 4
"""EPOLLIN and EPOLLOUT. An error or the end of a descriptor comes as both."""

BUDGET: Final = 0.002
"""Seconds of events in a row before trio's own have their turn, where nothing tells of these."""

STAY: Final = 0.05
"""Seconds to stay at the most: who stays does not tell trio that it is idle, which its test clocks wait for, and one
turn of trio's in so long a time costs next to nothing."""

BATCH: Final = 64
"""Events in a row before anybody else is thought of."""

OnEvent = Callable[[int], None]
"""Given what the descriptor is ready for."""


class _Epoll:
    """An epoll set (epoll(7)), which is level-triggered here."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.register, self.modify, self.unregister = (
            self._epoll.register,
            self._epoll.modify,
            self._epoll.unregister,
        )
        self.poll, self.fileno, self.close = self._epoll.poll, self._epoll.fileno, self._epoll.close


class _Kqueue:
    """What stands in for one where there is none (macOS)."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.close = self._selector.close

    def register(self, descriptor: int, events: int) -> None:
        self._selector.register(descriptor, _to_selector(events))

    def modify(self, descriptor: int, events: int) -> None:
        self._selector.modify(descriptor, _to_selector(events))

    def unregister(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def poll(self, timeout: float, most: int = BATCH) -> list[tuple[int, int]]:
        return [(key.fd, _from_selector(mask)) for key, mask in self._selector.select(timeout)][:most]

    def fileno(self) -> int:
        return int(getattr(self._selector, "fileno")())  # noqa: B009  (not in typeshed's base class)


def _to_selector(events: int) -> int:
    return (selectors.EVENT_READ if events & READABLE else 0) | (
        selectors.EVENT_WRITE if events & WRITABLE else 0
    )


def _from_selector(mask: int) -> int:
    return (READABLE if mask & selectors.EVENT_READ else 0) | (
        WRITABLE if mask & selectors.EVENT_WRITE else 0
    )


class _Trio(trio.abc.Instrument):
    """What else there is to do in this run of trio. One for all its lanes."""

    def __init__(self) -> None:
        self._ready: set[trio.lowlevel.Task] = set()
        self.may_run: Callable[[], object] = self._ready.__len__
        """How many tasks could run now, other than the one that asks."""
        self.descriptor, self.next_deadline = _inner_trio()
        """What becomes readable when trio has an event; and when it has something to do without one, in its time."""
        trio.lowlevel.add_instrument(self)

    @classmethod
    def of_this_run(cls) -> _Trio:
        try:
            return _TRIO.get()
        except LookupError:
            _TRIO.set(found := cls())
            return found

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self._ready.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._ready.discard(task)


_TRIO: Final[trio.lowlevel.RunVar[_Trio]] = trio.lowlevel.RunVar("protocol.lane")


def _inner_trio() -> tuple[int, Callable[[], float]]:
    """What trio (0.29 to 0.35) keeps to itself, of the run that this is called in; a negative descriptor where it is
    another trio, or has no epoll set."""
    try:
        from trio._core import _run

        runner: Any = _run.GLOBAL_RUN_CONTEXT.runner
        return runner.io_manager._epoll.fileno(), runner.deadlines.next_deadline
    except (ImportError, AttributeError):
        return -1, lambda: -math.inf


class Lane:
    """The descriptors that are served together: those of one link, or of a process. ``run`` serves them."""

    def __init__(self) -> None:
        self._set = _Epoll() if hasattr(select, "epoll") else _Kqueue()
        self._watched: dict[int, tuple[int, OnEvent]] = {}
        self._closed = False

    # --- descriptors -------------------------------------------------------------------------------

    def watch(self, descriptor: int, events: int, on_event: OnEvent) -> None:
        """Have ``on_event`` called when ``descriptor`` is ready for one of ``events``; 0 is to watch it no more.

        It must be forgotten before it is closed. If its number belonged to another that was ready a moment ago,
        ``on_event`` may be called in vain.
        """
        known = self._watched.get(descriptor)
        if not events:
            self.forget(descriptor)
        elif known is None:
            self._set.register(descriptor, events)
            self._watched[descriptor] = events, on_event
        elif known != (events, on_event):
            self._set.modify(descriptor, events)
            self._watched[descriptor] = events, on_event

    def forget(self, descriptor: int) -> None:
        """Watch it no more; nothing happens if it is not watched."""
        if self._watched.pop(descriptor, None) is not None and not self._closed:
            self._set.unregister(descriptor)

    def close(self) -> None:
        """Watch nothing any more. Nobody may be waiting."""
        if not self._closed:
            self._closed = True
            self._watched.clear()
            self._set.close()

    # --- events ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        others = _Trio.of_this_run()
        await trio.lowlevel.checkpoint()  # until the next turn but one, who could run has done so unseen
        both = _Epoll() if others.descriptor >= 0 else None
        try:
            if both is not None:
                both.register(others.descriptor, READABLE)
                both.register(self._set.fileno(), READABLE)
            while True:
                await trio.lowlevel.wait_readable(self._set.fileno())
                if both is None:
                    self.turn()
                else:
                    self._stay(others, both)
        finally:
            if both is not None:
                both.close()

    def turn(self) -> None:
        """Handle what is ready, until nothing is."""
        end = perf_counter() + BUDGET
        while events := self._set.poll(0, BATCH):
            self._handle(events)
            if perf_counter() > end:
                return

    def _stay(self, others: _Trio, both: _Epoll) -> None:
        """Handle what is ready and what will be, until trio has something to do. ``both`` has the two sets."""
        may_run, next_deadline, poll = others.may_run, others.next_deadline, self._set.poll
        event, event_of_trio = (self._set.fileno(), READABLE), (others.descriptor, READABLE)
        now = trio.current_time()
        to_trio = now - perf_counter()  # whose own clock takes four calls
        # -inf for who was cancelled as he was about to run: that wakes nobody up.
        end = min(trio.current_effective_deadline(), now + STAY)
        # What trio's set has found when it asked need not have come to the ears of ``both``, nor what comes behind it:
        # so the first look is not its, and then it is made to ask.
        self._handle(poll(0, BATCH))
        if may_run():
            return
        both.modify(*event)
        while (left := min(next_deadline(), end) - to_trio - perf_counter()) > 0:
            ready = both.poll(left, 2)
            if event in ready:
                self._handle(poll(0, BATCH))
            if not ready or may_run() or event_of_trio in ready:
                return

    def _handle(self, events: list[tuple[int, int]]) -> None:
        watched = self._watched
        for descriptor, ready in events:
            if (known := watched.get(descriptor)) is not None:
                try:
                    known[1](ready)
                except Exception:
                    log.exception("lane.callback descriptor=%d", descriptor)
                    self.forget(descriptor)
