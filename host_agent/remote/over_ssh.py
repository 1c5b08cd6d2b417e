"""The way that users have: asyncssh in a thread of its own, and the agent of this checkout brought over it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from host_agent.remote import payload
from host_agent.remote.daemon import Installed
from host_agent.remote.install import install as bring
from host_agent.remote.machine import Address
from host_agent.remote.prompts import Asked
from host_agent.remote.record import Attached
from host_agent.remote.ssh_thread import opened
from host_agent.remote.way import Way


@asynccontextmanager
async def open_way(attached: Attached, asked: Asked) -> AsyncIterator[Way]:
    """As ``daemon.OpenWay``."""
    async with opened(Address.parse(attached.address), asked) as way:
        yield way


async def install(way: Way, progress: Callable[[str], None]) -> Installed:
    """As ``daemon.Install``. Raises ``UserError``."""
    packed = await trio.to_thread.run_sync(payload.build)  # which takes a second
    return await bring(way, packed, progress)
