"""Port detection: wake-up -> dump -> picture; and for each link session the notices it needs.

The law: what is sent is always derived from a picture of the truth, never from a wake-up; while
nothing changes there are neither dumps nor notices. A session that begins is sent everything; one
that is slow gets several changes as one difference, so nothing queues up for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from guest_agent import sockdiag, tracefs
from guest_agent.listeners import Snapshot, notices
from protocol.api import Listeners

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

    async def wait(self, known_ports: Collection[int]) -> None: ...

    def settle(self, changed: bool) -> None: ...


class PollingWakes:
    """Wakes by the clock, often after a change and seldom otherwise."""

    detection = "polling"
    confirm_after = math.inf

    def __init__(self) -> None:
        self._interval = POLL_FASTEST

    async def wait(self, known_ports: Collection[int]) -> None:
        await trio.sleep(self._interval)

    def settle(self, changed: bool) -> None:
        self._interval = POLL_FASTEST if changed else min(POLL_SLOWEST, self._interval * POLL_FACTOR)


@asynccontextmanager
async def open_polling() -> AsyncIterator[Wakes]:
    yield PollingWakes()


Dump = Callable[[], Awaitable[Snapshot]]
OpenWakes = Callable[[], AbstractAsyncContextManager[Wakes]]


class PortDetector:
    """The current picture, kept true by ``run``, and any number of sessions that follow it."""

    def __init__(self) -> None:
        self.detection = "starting"
        """What ``GuestInfo.port_detection`` says: starting, tracefs or polling."""
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
        confirm_at = -math.inf
        while True:
            woken = False
            with trio.move_on_at(confirm_at):
                await wakes.wait({listener.port for listener in self._picture or ()})
                woken = True
            started = trio.current_time()
            wakes.settle(await self._read(dump))
            now = trio.current_time()
            confirm_at = now + wakes.confirm_after if woken else math.inf
            # Under constant change detection takes no more than half a core.
            await trio.sleep(now - started)

    async def _read(self, dump: Dump) -> bool:
        """Take a new picture; True if it differs. A failure is reported and tried again."""
        while True:
            try:
                picture = await dump()
            except Exception as error:
                log.warning("ports.dump error=%r", error)
                await trio.sleep(RETRY_AFTER)
            else:
                break
        if picture == self._picture:
            return False
        self._picture = picture
        self._changed.set()
        self._changed = trio.Event()
        return True

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
