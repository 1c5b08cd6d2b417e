"""Port detection: wake-up -> dump -> picture; and for each link session the notices it needs.

The law: what is sent is always derived from a picture of the truth, never from a wake-up; while
nothing changes there are neither dumps nor notices. A session that begins is sent everything; one
that is slow gets several changes as one difference, so nothing queues up for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from guest_agent import sockdiag, tracefs
from guest_agent.edges import NOTHING, Known
from guest_agent.listeners import ALL_PROTOS, Protos, Snapshot, notices
from protocol.api import Listeners, Proto

log = logging.getLogger(__name__)

POLL_FASTEST, POLL_SLOWEST, POLL_FACTOR = 0.1, 1.0, 1.25
"""Seconds between dumps where nothing wakes us: after a change, and when nothing has happened for
long (reached after about 5 s)."""

RETRY_AFTER = 1.0
"""Seconds until a dump that failed is tried again, with a new socket."""


class Wakes(Protocol):
    """What says when to read the truth."""

    detection: str
    confirm_after: float
    """Seconds from a wake-up to one more dump, infinity if the first tells all."""

    async def wait(self, known: Known) -> Protos:
        """Return when the truth may differ from ``known``, with the protocols it may differ in."""

    def settle(self, read: Protos, changed: Protos) -> None:
        """These protocols were read, for whatever reason, and in those the truth was another."""


class PollingWakes:
    """Wakes by the clock, often after a change and seldom otherwise."""

    detection = "polling"
    confirm_after = math.inf

    def __init__(self) -> None:
        self._interval = POLL_FASTEST

    async def wait(self, known: Known) -> Protos:
        await trio.sleep(self._interval)
        return ALL_PROTOS

    def settle(self, read: Protos, changed: Protos) -> None:
        self._interval = POLL_FASTEST if changed else min(POLL_SLOWEST, self._interval * POLL_FACTOR)


@asynccontextmanager
async def open_polling() -> AsyncIterator[Wakes]:
    yield PollingWakes()


Dump = Callable[[Protos], Awaitable[Snapshot]]
OpenWakes = Callable[[], AbstractAsyncContextManager[Wakes]]


class PortDetector:
    """The current picture, kept true by ``run``, and any number of sessions that follow it."""

    def __init__(self) -> None:
        self.detection = "starting"
        """What ``GuestInfo.port_detection`` says: starting, tracefs or polling."""
        self.dumps = 0
        """How often the truth was asked for; it does not grow while nothing changes."""
        self._picture: Snapshot | None = None
        self._changed = trio.Event()

    async def run(self) -> None:
        """Detect until cancelled, with tracefs if there is one and by polling otherwise."""
        async with sockdiag.open_dumper() as dumper:
            await self.follow(dumper.listeners, tracefs.open_wakes, open_polling)

    async def follow(self, dump: Dump, *sources: OpenWakes) -> None:
        """Keep the picture true with the first source of wake-ups that works, then the next one."""
        for open_wakes in sources:
            try:
                async with open_wakes() as wakes:
                    self.detection = wakes.detection
                    log.info("ports.detection source=%s", wakes.detection)
                    await self._follow(dump, wakes)
            except OSError as error:
                log.warning("ports.detection source=%s error=%s", self.detection, error)

    async def _follow(self, dump: Dump, wakes: Wakes) -> None:
        confirm, confirm_at = ALL_PROTOS, -math.inf
        while True:
            woken: Protos = NOTHING
            with trio.move_on_at(confirm_at):
                woken = await wakes.wait(
                    {(listener.proto, listener.port) for listener in self._picture or ()}
                )
            started = trio.current_time()
            read = woken or confirm
            changed = await self._read(dump, read)
            wakes.settle(read, changed)
            now = trio.current_time()
            # Of UDP a vain wake-up, of which there may be many, says nothing that needs to be confirmed.
            if needed := woken & (changed | {Proto.TCP}):
                confirm, confirm_at = (
                    needed | (confirm if confirm_at < math.inf else NOTHING),
                    now + wakes.confirm_after,
                )
            elif not woken:
                confirm, confirm_at = NOTHING, math.inf
            # Under constant change detection takes no more than half a core.
            await trio.sleep(now - started)

    async def _read(self, dump: Dump, protos: Protos) -> Protos:
        """Take a new picture of ``protos``; returns in which it differs. A failure is reported and tried again."""
        while True:
            self.dumps += 1
            try:
                seen = await dump(protos)
            except Exception as error:
                log.warning("ports.dump error=%r", error)
                await trio.sleep(RETRY_AFTER)
            else:
                break
        before = self._picture or frozenset()
        picture = seen | {listener for listener in before if listener.proto not in protos}
        if picture == self._picture:
            return NOTHING
        changed = (
            protos if self._picture is None else frozenset(listener.proto for listener in before ^ picture)
        )
        self._picture = picture
        self._changed.set()
        self._changed = trio.Event()
        return changed

    async def announce(self, notify: Callable[[Listeners], Awaitable[None]]) -> None:
        """Tell one session everything, then every change, until cancelled or ``notify`` raises."""
        told: Snapshot | None = None
        while True:
            changed, picture = self._changed, self._picture
            if picture is not None:
                for notice in notices(told, picture):
                    await notify(notice)
                told = picture
            await changed.wait()
