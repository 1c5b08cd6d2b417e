"""A VM that runs, a disk with as much room as the test says, and a QEMU that tells what the test wants."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.lowlevel
import trio.testing

from host_agent import vm_watch
from host_agent.disk_room import ENOUGH_MORE, LITTLE_ROOM
from host_agent.qmp import QmpClosed, QmpEvent
from host_agent.vm import VirtualMachine
from host_agent.vm_watch import INTERVAL, RESUME_SPACE, VmWatch

Usage = namedtuple("Usage", "total used free")
PLENTY = 100 << 30


class Qemu:
    """``told`` is where its events come from; it closes that connection when the test does."""

    def __init__(self) -> None:
        self.state = "running"
        self.resumed = 0
        self.connections = 0
        self.tell, self.told = trio.open_memory_channel[QmpEvent](8)

    async def run_state(self) -> str:
        await trio.lowlevel.checkpoint()
        return self.state

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        self.resumed += 1
        self.state = "running"

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[QmpEvent]]:
        await trio.lowlevel.checkpoint()
        self.connections += 1
        yield self.told

    def says(self, name: str) -> None:
        self.tell.send_nowait(QmpEvent(name, {}, 0.0))


class Watched:
    def __init__(self, folder: Path) -> None:
        self.qemu = Qemu()
        self.events: list[str] = []
        self.went_on = 0
        self.watch = VmWatch(folder / "data.img", lambda: 60 << 30, self._say, self._resumed)

    def _say(self, kind: str, message: str, **fields: str) -> None:
        self.events.append(kind)

    def _resumed(self) -> None:
        self.went_on += 1

    async def run(self) -> None:
        await self.watch.run(cast(VirtualMachine, self.qemu))


@pytest.fixture
def watched(folder: Path) -> Watched:
    return Watched(folder)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes; the last counts."""
    free = [PLENTY]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free[-1]))
    return free


async def test_little_room_is_told_once_and_so_is_its_end(
    watched: Watched, room: list[int], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    nursery.start_soon(watched.run)
    await trio.sleep(1)
    assert (watched.events, watched.watch.state.value) == ([], "")
    for free in (LITTLE_ROOM - 1, LITTLE_ROOM + 1, 1, LITTLE_ROOM + ENOUGH_MORE - 1):
        room.append(free)
        await trio.sleep(2 * INTERVAL)
        assert (watched.events, watched.watch.state.value) == (["disk-low"], "low")
    room.append(LITTLE_ROOM + ENOUGH_MORE)
    await trio.sleep(2 * INTERVAL)
    assert (watched.events, watched.watch.state.value) == (["disk-low", "disk-has-room"], "")


async def test_a_vm_that_qemu_has_stopped_goes_on_once_there_is_room(
    watched: Watched, room: list[int], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    nursery.start_soon(watched.run)
    await trio.sleep(1)
    room.append(RESUME_SPACE - 1)
    watched.qemu.state = "io-error"
    watched.qemu.says("STOP")
    await trio.testing.wait_all_tasks_blocked()
    assert (watched.events, watched.qemu.resumed) == (["disk-full"], 0)  # at once, not at the next look
    room.append(PLENTY)
    await trio.sleep(INTERVAL + 1)
    assert (watched.events, watched.qemu.resumed) == (["disk-full", "disk-has-room"], 1)


async def test_that_a_vm_goes_on_is_told_at_once(
    watched: Watched, room: list[int], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    nursery.start_soon(watched.run)
    await trio.sleep(1)
    for number, event in enumerate(("BALLOON_CHANGE", "RESUME", "STOP", "RESUME")):
        watched.qemu.says(event)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.went_on == (0, 1, 1, 2)[number]


async def test_a_monitor_that_ends_is_opened_again(
    watched: Watched, room: list[int], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    nursery.start_soon(watched.run)
    await trio.sleep(1)
    watched.qemu.tell.close()
    await trio.sleep(3 * INTERVAL)
    assert watched.qemu.connections >= 3


async def test_that_there_is_no_second_monitor_is_logged_once(
    watched: Watched,
    room: list[int],
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @asynccontextmanager
    async def events() -> AsyncIterator[AsyncIterator[QmpEvent]]:
        await trio.lowlevel.checkpoint()
        raise QmpClosed("no monitor")
        yield

    monkeypatch.setattr(watched.qemu, "events", events)
    caplog.set_level("INFO")
    nursery.start_soon(watched.run)
    await trio.sleep(10 * INTERVAL)
    assert caplog.text.count("does not tell") == 1


async def test_without_a_monitor_or_a_disk_it_looks_again(
    watched: Watched,
    room: list[int],
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def no_answer() -> str:
        await trio.lowlevel.checkpoint()
        raise QmpClosed("gone")

    room.append(0)
    with monkeypatch.context() as broken:
        broken.setattr(watched.qemu, "run_state", no_answer)
        nursery.start_soon(watched.run)
        await trio.sleep(3 * INTERVAL)
        assert watched.events == []
    with monkeypatch.context() as broken:
        broken.setattr(vm_watch.DiskRoom, "of", _unreadable)
        await trio.sleep(3 * INTERVAL)
        assert watched.events == []
    await trio.sleep(INTERVAL + 1)
    assert watched.events == ["disk-low"]


def _unreadable(disk: Path, size: int) -> None:
    raise OSError("Input/output error")
