"""The disk of an instance whose QEMU and guest a test scripts; the order of what happens to them counts."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest
import trio
import trio.testing

from host_agent.configuration.config import MAX_DISK
from host_agent.disk_upkeep import FIRST_TRIM, TRIM_INTERVAL, DiskUpkeep, at_rest
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.qmp import QmpClosed
from host_agent.vm import VirtualMachine
from protocol.api import DiskGrown, DisksTrimmed, GetGuestInfo, GrowDisk, GuestInfo, TrimDisks
from protocol.errors import LinkClosed
from protocol.link import Link

MIB = 1 << 20
SIZE = 64 * MIB


class Instance:
    """``steps`` is what happened, in order."""

    def __init__(self, paths: InstancePaths) -> None:
        self.paths = paths
        self.steps: list[object] = []
        self.size = SIZE
        self.failing: Exception | None = None
        self.there = True
        self.data_free = 400
        with paths.data_disk.open("wb") as disk:
            disk.truncate(SIZE)
        self.upkeep = DiskUpkeep(
            paths,
            lambda: cast(Link, self) if self.there else None,
            lambda: cast(VirtualMachine, self),
            lambda: self.size,
            self.remember,
        )

    def remember(self, size: int) -> None:
        self.steps.append(("remember", size))
        self.size = size

    async def resize(self, node: str, size: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.failing:
            raise self.failing
        self.steps.append(("resize", node, size))
        os.truncate(self.paths.data_disk, size)

    async def request(self, message: object, *, timeout: float) -> Any:
        await trio.lowlevel.checkpoint()
        if self.failing:
            raise self.failing
        match message:
            case GetGuestInfo():
                return GuestInfo(
                    "6.12", 1.0, 1, 1, 1, data_total=1000, data_free=self.data_free, port_detection=""
                )
            case GrowDisk(size):
                self.steps.append(message)
                return DiskGrown(size)
            case TrimDisks():
                self.steps.append(message)
                os.truncate(self.paths.data_disk, 0)
                os.truncate(self.paths.data_disk, self.size)
                return DisksTrimmed(1)


@pytest.fixture
def running(instance: InstancePaths) -> Instance:
    return Instance(instance)


async def test_the_size_is_remembered_before_anything_has_it(running: Instance) -> None:
    disk = await running.upkeep.grow(2 * SIZE - 1)
    assert running.steps == [("remember", 2 * SIZE), ("resize", "data", 2 * SIZE), GrowDisk(2 * SIZE)]
    assert (disk.size, disk.used) == (2 * SIZE, 600)


async def test_who_was_interrupted_asks_again(running: Instance) -> None:
    running.failing = QmpClosed("QEMU closed its monitor")
    with pytest.raises(UserError, match="could not grow while it is in use") as caught:
        await running.upkeep.grow(2 * SIZE)
    assert "next start" in caught.value.hint
    running.failing = None
    await running.upkeep.grow(2 * SIZE)
    await running.upkeep.grow(2 * SIZE)
    assert running.steps == [
        ("remember", 2 * SIZE),
        ("resize", "data", 2 * SIZE),
        GrowDisk(2 * SIZE),
        GrowDisk(2 * SIZE),
    ]


@pytest.mark.parametrize("size", [SIZE - MIB, MAX_DISK + MIB])
async def test_a_disk_never_shrinks_and_has_a_limit(running: Instance, size: int) -> None:
    with pytest.raises(UserError) as caught:
        await running.upkeep.grow(size)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert caught.value.hint
    assert running.steps == []


async def test_a_size_that_cannot_be_remembered_changes_nothing(running: Instance) -> None:
    def full(size: int) -> None:
        raise OSError(28, "No space left on device")

    running.upkeep._remember = full
    with pytest.raises(OSError):
        await running.upkeep.grow(2 * SIZE)
    assert running.steps == []


async def test_without_a_guest_nothing_is_done_now(running: Instance) -> None:
    running.there = False
    with pytest.raises(UserError, match="does not answer"):
        await running.upkeep.grow(2 * SIZE)
    assert running.steps == [("remember", 2 * SIZE)]  # the next start has it
    with pytest.raises(UserError, match="does not answer"):
        await running.upkeep.compact()
    assert (await running.upkeep.report()).used is None


async def test_what_was_given_back_is_told(running: Instance) -> None:
    running.paths.data_disk.write_bytes(os.urandom(4 * MIB))
    running.paths.root_overlay.write_bytes(os.urandom(MIB))
    disk = await running.upkeep.compact()
    assert running.steps == [TrimDisks()]
    assert disk.given_back >= 4 * MIB
    assert (disk.allocated, disk.overlay >= MIB) == (0, True)


async def test_a_guest_that_has_more_free_than_there_is_uses_nothing(running: Instance) -> None:
    running.data_free = (1 << 64) - 1
    assert (await running.upkeep.report()).used == 0


async def test_a_guest_that_cannot_trim_is_a_sentence(running: Instance) -> None:
    running.failing = LinkClosed("gone")
    with pytest.raises(UserError, match="could not give anything back: gone"):
        await running.upkeep.compact()


async def test_disks_are_trimmed_now_and_then(
    running: Instance, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    nursery.start_soon(running.upkeep.run)
    await trio.sleep(FIRST_TRIM - 1)
    assert running.steps == []
    await trio.sleep(2)
    assert running.steps == [TrimDisks()]
    running.failing = LinkClosed("gone")
    await trio.sleep(TRIM_INTERVAL)
    running.failing = None
    running.there = False
    await trio.sleep(TRIM_INTERVAL)
    running.there = True
    assert running.steps == [TrimDisks()]
    await trio.sleep(TRIM_INTERVAL)
    assert running.steps == [TrimDisks()] * 2


def test_a_disk_that_was_never_made_takes_nothing(instance: InstancePaths) -> None:
    disk = at_rest(instance, SIZE)
    assert (disk.size, disk.allocated, disk.used, disk.overlay) == (SIZE, 0, None, 0)
    assert disk.free > 0
