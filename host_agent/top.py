"""``agentctl top``: looks at an instance again and again, and shows how busy it is.

The law: the terminal is given back as it was found; nothing is asked of an instance that nobody looks at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import trio
from rich.console import Console
from rich.live import Live

from host_agent.client import RESTART_TIME, ConnectionLost, all_forwards, connected
from host_agent.disk_room import allocated
from host_agent.errors import UserError
from host_agent.instance_load import Load, Look, ProcessUsage, between
from host_agent.load_view import page
from host_agent.paths import InstancePaths
from protocol.api import Forward, GetMounts, GetStatus, GetUsage, InstanceStatus
from protocol.errors import ErrorCode, RemoteFailure
from protocol.link import Link

#: Who listens is asked for when a port is new, since that costs the guest most, but not more often than this, seconds.
OWNERS_AGAIN = 10.0

#: Before a host agent that was lost is looked for again, seconds.
RETRY = 0.1

HELP = "q ends"

#: Keys that end it, beside ^C.
_QUIT = frozenset(b"qQ\x04")


class Looker:
    """Looks through one connection."""

    def __init__(self, paths: InstancePaths, link: Link) -> None:
        self._paths = paths
        self._link = link
        self._owned: dict[tuple[object, ...], Forward] = {}
        self._owners_at = float("-inf")

    async def look(self) -> Look:
        """Everything that is known now. Raises ``UserError`` when the connection is lost."""
        status = await self._link.request(GetStatus())
        try:
            usage = await self._link.request(GetUsage())
        except RemoteFailure as error:
            if error.code is not ErrorCode.UNSUPPORTED:
                raise
            message = "the running instance is of an older agentctl, which does not say what it uses"
            raise UserError(message, "restart it: agentctl stop, then agentctl up") from None
        now = time.monotonic()
        mounts = (await self._link.request(GetMounts())).mounts
        forwards = await self._forwards()
        return Look(
            at=now,
            time=time.time(),
            status=status,
            usage=usage,
            mounts=mounts,
            forwards=forwards,
            processes=_processes(status),
            disk_allocated=allocated(self._paths.data_disk),
            disk_free=shutil.disk_usage(self._paths.directory).free,
        )

    async def _forwards(self) -> list[Forward]:
        rows = await all_forwards(self._link)
        is_due = trio.current_time() >= self._owners_at + OWNERS_AGAIN
        if is_due and not all(_key(row) in self._owned for row in rows):
            self._owners_at = trio.current_time()
            rows = await all_forwards(self._link, owners=True)
            self._owned = {_key(row): row for row in rows}
        known = (self._owned.get(_key(row)) for row in rows)
        return [row if owner is None else _named(row, owner) for row, owner in zip(rows, known, strict=True)]


def _key(row: Forward) -> tuple[object, ...]:
    return row.proto, row.guest_address, row.guest_port


def _named(row: Forward, owner: Forward) -> Forward:
    return replace(row, process=owner.process, container=owner.container)


def _processes(status: InstanceStatus) -> dict[str, ProcessUsage]:
    pids = {"qemu": status.qemu_pid, "host-agent": status.agent_pid, "file-server": status.file_server_pid}
    found = {}
    for name, pid in pids.items():
        with contextlib.suppress(psutil.Error):
            if pid:
                process = psutil.Process(pid)
                times = process.cpu_times()
                found[name] = ProcessUsage(pid, times.user + times.system, process.memory_info().rss)
    return found


async def once(paths: InstancePaths, interval: float) -> Load:
    """How busy it is during ``interval`` seconds. Raises ``UserError`` when it does not run, or stops meanwhile."""
    async with connected(paths, patience=RESTART_TIME) as link:
        looker = Looker(paths, link)
        before = await looker.look()
        await trio.sleep(interval)
        return between(before, await looker.look())


async def follow(
    paths: InstancePaths, interval: float, tell: Callable[[Load], None], *, at_once: bool = False
) -> None:
    """Call ``tell`` every ``interval`` seconds until the instance has ended, which is a ``UserError``.

    A host agent that is killed is waited for. ``at_once``: also before anything can be known of what flows.
    """
    while True:
        with contextlib.suppress(ConnectionLost):
            async with connected(paths, patience=RESTART_TIME) as link:
                looker = Looker(paths, link)
                before = await looker.look()
                if at_once:
                    tell(between(before, before))
                while True:
                    await trio.sleep(interval)
                    now = await looker.look()
                    tell(between(before, now))
                    before = now
        await trio.sleep(RETRY)


async def live(paths: InstancePaths, interval: float) -> None:
    """Show it on the terminal until a key ends it. Raises ``UserError`` when the instance has ended."""
    with _keys_at_once(), Live(console=Console(highlight=False), screen=True, auto_refresh=False) as screen:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_key, nursery.cancel_scope)
            await follow(
                paths, interval, lambda load: screen.update(page(load, HELP), refresh=True), at_once=True
            )


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    """Keys come without Enter and are not shown; ^C still is a signal."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


async def _end_on_key(scope: trio.CancelScope) -> None:
    descriptor = sys.stdin.fileno()
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        keys = os.read(descriptor, 64)
        if not keys or not _QUIT.isdisjoint(keys):
            scope.cancel()
            return
