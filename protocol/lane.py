"""The express lane: descriptors whose events are handled where they are seen, many to one turn of trio.

A turn of trio costs 30 us, and 500 in an emulated guest; a byte that is forwarded there and back would need a dozen.
So one task of trio's waits for all descriptors at once (an epoll set is itself a descriptor that one can wait for),
calls what belongs to each event, and then, if something was passed on, stays for a moment, since the answer to it
comes soon: after the turns of the peer's, so for as long as a few turns take here.

The laws: a callback neither waits nor raises (one that does is a bug, and loses its descriptor, not all others
theirs); other tasks wait for ``BUDGET`` and a stay at the most; while nothing is passed on, nobody stays, and nothing
is polled.
"""

from __future__ import annotations

import logging
import select
import selectors
from collections.abc import Callable
from time import perf_counter
from typing import Final

import trio

log = logging.getLogger(__name__)

READABLE: Final = 1
WRITABLE: Final = 4
"""EPOLLIN and EPOLLOUT. An error or the end of a descriptor comes as both."""

BUDGET: Final = 0.002
"""Seconds of events in a row before other tasks have their turn."""

STAY: Final = 8
"""Turns of trio that a stay may cost. A byte there and back over a link takes some five where nothing else happens."""

LONGEST_STAY: Final = 0.004
"""Seconds to stay for another event at the most, however slow a turn is."""

_FD_SETSIZE: Final = 1024
"""select(2) takes no descriptors from there on."""

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

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        return [(key.fd, _from_selector(mask)) for key, mask in self._selector.select(timeout)]

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


class Lane:
    """The descriptors that are served together: those of one link, or of a process. ``run`` serves them."""

    def __init__(self) -> None:
        self._set = _Epoll() if hasattr(select, "epoll") else _Kqueue()
        self._watched: dict[int, tuple[int, OnEvent]] = {}
        self._stay = 0.0
        self._stopped = self._expected = False
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
        await self._measure()
        while True:
            await trio.lowlevel.wait_readable(self._set.fileno())
            self.turn()

    async def _measure(self) -> None:
        """Find out what a turn of trio costs here, which decides how long to stay."""
        costs = []
        for _ in range(5):
            start = perf_counter()
            await trio.lowlevel.checkpoint()
            costs.append(perf_counter() - start)
        self._stay = min(LONGEST_STAY, STAY * min(costs))

    def stop(self) -> None:
        """(For callbacks.) Let ``turn`` return: somebody must have a turn of trio's."""
        self._stopped = True

    def expect(self) -> None:
        """(For callbacks.) Something was passed on that will be answered soon."""
        self._expected = True

    def turn(self) -> None:
        """Handle what is ready, and what becomes ready soon."""
        self._stopped = self._expected = False
        poll, watched = self._set.poll, self._watched
        end = perf_counter() + BUDGET
        events = poll(0)
        while events:
            for descriptor, ready in events:
                if (known := watched.get(descriptor)) is not None:
                    try:
                        known[1](ready)
                    except Exception:
                        log.exception("lane.callback descriptor=%d", descriptor)
                        self.forget(descriptor)
            if self._stopped or perf_counter() > end:
                return
            expected, self._expected = self._expected, False
            if not (events := poll(0)) and expected:
                events = self._linger()

    def _linger(self) -> list[tuple[int, int]]:
        """Events, if there are some soon."""
        # epoll_wait(2) rounds up to milliseconds.
        descriptor = self._set.fileno()
        if descriptor >= _FD_SETSIZE or not select.select([descriptor], [], [], self._stay)[0]:
            return []
        return self._set.poll(0)
