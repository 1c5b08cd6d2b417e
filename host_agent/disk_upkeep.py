"""The data disk of an instance that runs: it grows while it is in use, and what it does not need is given back.

The law: the new size is remembered before anything has it, so that whoever dies on the way leaves a disk that the next
start finishes; and nothing here, nor in the guest, can make a disk smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import trio

from host_agent import sizes
from host_agent.configuration.config import MAX_DISK
from host_agent.disk_room import DiskRoom, allocated
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.qmp import QmpClosed, QmpError
from host_agent.vm import VirtualMachine
from protocol.api import Disk, GetGuestInfo, GrowDisk, TrimDisks
from protocol.errors import AgentctlProtocolError
from protocol.link import Link
from provision.machine import DATA_NODE

logger = logging.getLogger(__name__)

#: Sizes are whole MiB: a disk has whole sectors.
STEP: Final = 1 << 20

#: Seconds. The kernel writes a few blocks for each 128 MiB that the filesystem grows, all of them in 15 TiB.
GROW_TIME: Final = 300.0

#: Seconds for the guest to look through its disks, and for QEMU to punch holes where they are empty.
TRIM_TIME: Final = 600.0

#: The guest discards what is deleted when it is; what it had still to say when it was killed is made up for after a
#: boot, and then once a day. Seconds.
FIRST_TRIM: Final = 600.0
TRIM_INTERVAL: Final = 86_400.0

#: Seconds for the guest's figures.
INFO_TIME: Final = 2.0


class DiskUpkeep:
    """``link`` and ``vm`` are those of now; ``size`` what is remembered of the disk, by ``remember``."""

    def __init__(
        self,
        paths: InstancePaths,
        link: Callable[[], Link | None],
        vm: Callable[[], VirtualMachine | None],
        size: Callable[[], int],
        remember: Callable[[int], None],
    ) -> None:
        self._paths = paths
        self._link = link
        self._vm = vm
        self._size = size
        self._remember = remember
        self._changing = trio.Lock()

    async def run(self) -> None:
        """Trim now and then, until cancelled."""
        await trio.sleep(FIRST_TRIM)
        while True:
            if (link := self._link()) is not None:
                try:
                    await link.request(TrimDisks(), timeout=TRIM_TIME)
                except AgentctlProtocolError as error:
                    logger.info("the disks could not be trimmed: %s", error)
            await trio.sleep(TRIM_INTERVAL)

    async def report(self) -> Disk:
        """How large things are now."""
        used = None
        if (link := self._link()) is not None:
            try:
                info = await link.request(GetGuestInfo(), timeout=INFO_TIME)
                # Its words: what is free may be more than there is.
                used = max(0, info.data_total - info.data_free) if info.data_total else None
            except AgentctlProtocolError as error:
                logger.info("the guest did not say how much it uses: %s", error)
        return at_rest(self._paths, self._size(), used)

    async def grow(self, size: int) -> Disk:
        """Make it ``size`` bytes large, rounded up to whole MiB. Raises ``UserError``, or ``OSError`` if the size
        cannot be remembered; then nothing has changed."""
        size = whole(size)
        async with self._changing:
            check_growth(self._size(), size)
            if size > self._size():
                self._remember(size)
            await self._grow(size)
        return await self.report()

    async def _grow(self, size: int) -> None:
        """Also if nothing grows: who was interrupted asks again."""
        later = "it is as large at the next start: agentctl stop, then agentctl up"
        vm, link = self._vm(), self._link()
        if vm is None or link is None:
            raise UserError("the VM does not answer just now", later, ExitCode.GUEST)
        try:
            if self._paths.data_disk.stat().st_size < size:
                await vm.resize(DATA_NODE, size)
            await link.request(GrowDisk(size), timeout=GROW_TIME)
        except (QmpClosed, QmpError, AgentctlProtocolError) as error:
            raise UserError(f"the disk could not grow while it is in use: {error}", later) from error

    async def compact(self) -> Disk:
        """Raises ``UserError``."""
        async with self._changing:
            before = _taken(self._paths)
            if (link := self._link()) is None:
                raise UserError(
                    "the VM does not answer just now", "try again, or: agentctl stop", ExitCode.GUEST
                )
            try:
                await link.request(TrimDisks(), timeout=TRIM_TIME)
            except AgentctlProtocolError as error:
                raise UserError(
                    f"the VM could not give anything back: {error}", "see: agentctl logs"
                ) from error
            after = await self.report()
            return replace(after, given_back=max(0, before - _taken(self._paths)))


def at_rest(paths: InstancePaths, size: int, used: int | None = None) -> Disk:
    """What this machine knows of the disk of any instance. Raises ``OSError`` if it has no folder."""
    room = DiskRoom.of(paths.data_disk, size)
    return Disk(
        size=room.size,
        allocated=room.allocated,
        free=room.free,
        used=used,
        overlay=allocated(paths.root_overlay),
    )


def whole(size: int) -> int:
    """``size``, rounded up to what a disk can have."""
    return -(-size // STEP) * STEP


def check_growth(current: int, size: int) -> None:
    """Raise ``UserError`` (RESOURCES) if a disk of ``current`` bytes cannot be made ``size`` bytes large."""
    if size < current:
        raise UserError(
            f"the disk has {sizes.show(current)} and never shrinks; asked for {sizes.show(size)}",
            "what is free in it takes no room here; to see: agentctl disk, to give it back: agentctl disk compact",
            ExitCode.RESOURCES,
        )
    if size > MAX_DISK:
        raise UserError(
            f"the disk can have {sizes.show(MAX_DISK)}; asked for {sizes.show(size)}",
            f"{sizes.flag(MAX_DISK)} or less",
            ExitCode.RESOURCES,
        )


def _taken(paths: InstancePaths) -> int:
    return allocated(paths.data_disk) + allocated(paths.root_overlay)
