"""Which mounts come, go and stay; the kernel's part is played. (tests/guest_agent/test_files.py has the real one.)"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from guest_agent import fdstore
from guest_agent.fdstore import StoredConnection, StoredDescriptor
from guest_agent.fuse import mounting, mounts
from guest_agent.fuse.device import Handle
from guest_agent.fuse.host import Host
from guest_agent.fuse.mounting import Mount, MountError, MountSpec
from guest_agent.fuse.mounts import Mounts, disturbed, mounting_order, parse_stored_name
from guest_agent.fuse.notifier import Notifiers
from protocol.files import MountStage, Share

A, AB, ABC, B = Share(1, "/a"), Share(2, "/a/b"), Share(3, "/a/b/c"), Share(4, "/b")


class Connection:
    """A mount that the kernel has greeted, unless ``kernel.silent``."""

    def __init__(self, kernel: Kernel, spec: MountSpec, device: int) -> None:
        self.fd = 0
        self.spec = spec
        self.device = device
        self.initialized = trio.Event()
        self.over = trio.Event()
        self._kernel = kernel

    async def serve(self, handle: Handle) -> None:
        if not self._kernel.silent:
            self.initialized.set()
        await self.over.wait()

    def stored_as(self) -> StoredConnection:
        return StoredConnection(self.spec.share, self.device)

    def unmount(self) -> None:
        self._kernel.log.append(f"unmount {self.spec.path}")
        self._kernel.mounted = [one for one in self._kernel.mounted if one is not self]
        trio.from_thread.run_sync(self.over.set)

    def close(self) -> None:
        self._kernel.log.append(f"close {self.spec.path}")


class Kernel:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.mounted: list[Connection] = []
        self.refuse: set[str] = set()
        self.silent = False
        self.gate: trio.Event | None = None
        self._device = 40

    def mount(self, spec: MountSpec) -> Connection:
        if self.gate is not None:
            trio.from_thread.run(self.gate.wait)
        if spec.path in self.refuse:
            raise MountError(f"{spec.path} is refused")
        self.log.append(f"mount {spec.path}")
        self._device += 1
        self.mounted.append(connection := Connection(self, spec, self._device))
        return connection

    def read_mounts(self) -> list[Mount]:
        return [
            Mount(one.device, "/", one.spec.path, False, mounting.FILE_SYSTEM, one.spec.source)
            for one in self.mounted
        ]

    def take_log(self) -> list[str]:
        log, self.log = [line for line in self.log if not line.startswith("close")], []
        return log


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names in the descriptor store."""
    names: list[str] = []
    monkeypatch.setattr(fdstore, "store", lambda fd, name: names.append(name))
    monkeypatch.setattr(fdstore, "remove", lambda name: name in names and names.remove(name))
    return names


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(mounts, "_mount_afresh", kernel.mount)
    monkeypatch.setattr(mounting, "read_mounts", kernel.read_mounts)
    return kernel


@pytest.fixture
async def arranged(kernel: Kernel, stored: list[str]) -> AsyncIterator[Mounts]:
    async with trio.open_nursery() as nursery:
        yield Mounts(Host(), Notifiers(), nursery)
        nursery.cancel_scope.cancel()


def test_what_a_change_disturbs() -> None:
    assert disturbed([A, AB, ABC, B], ["/a"]) == [AB, ABC]
    assert disturbed([A, AB, ABC, B], ["/a/b", "/b"]) == [ABC]
    assert disturbed([A, B], []) == []


def test_the_outermost_first() -> None:
    assert mounting_order([ABC, B, AB, A]) == [A, B, AB, ABC]
    assert mounting_order([B, ABC, A, AB], innermost_first=True) == [ABC, AB, B, A]


def test_the_name_of_a_descriptor_says_all() -> None:
    connection = StoredConnection(7, 44, 41, 0x80, True)
    assert parse_stored_name(f"{connection.name()},salt=3fffff") == (connection, 0x3FFFFF)
    assert parse_stored_name(connection.name()) is None
    assert parse_stored_name("stored") is None


async def test_a_descriptor_that_nobody_can_serve_is_given_up(arranged: Mounts, stored: list[str]) -> None:
    stored.append("of-another-version")
    ours, theirs = os.pipe()
    arranged.adopt([StoredDescriptor("of-another-version", theirs)])
    assert stored == []
    assert os.read(ours, 1) == b""  # the other end was closed
    os.close(ours)


async def test_reports_are_in_the_order_asked_for(arranged: Mounts, kernel: Kernel) -> None:
    reports = await arranged.arrange([AB, B, A])
    assert [report.share for report in reports] == [2, 4, 1]
    assert kernel.take_log() == ["mount /a", "mount /b", "mount /a/b"]


async def test_what_stays_is_left_alone(arranged: Mounts, kernel: Kernel, stored: list[str]) -> None:
    await arranged.arrange([A, B])
    kernel.take_log()
    await arranged.arrange([B, A])
    assert kernel.take_log() == []
    await arranged.arrange([B])
    assert kernel.take_log() == ["unmount /a"]
    await wait_all_tasks_blocked()
    assert [name.split(",")[1] for name in stored] == ["share=4"]


async def test_what_a_change_would_hide_is_mounted_anew(arranged: Mounts, kernel: Kernel) -> None:
    await arranged.arrange([ABC, B])
    kernel.take_log()
    await arranged.arrange([A, ABC, B])
    assert kernel.take_log() == ["unmount /a/b/c", "mount /a", "mount /a/b/c"]
    await arranged.arrange([ABC, B])
    assert kernel.take_log() == ["unmount /a/b/c", "unmount /a", "mount /a/b/c"]


async def test_a_share_that_has_changed_is_mounted_anew(arranged: Mounts, kernel: Kernel) -> None:
    await arranged.arrange([B])
    kernel.take_log()
    await arranged.arrange([Share(4, "/b", read_only=True)])
    assert kernel.take_log() == ["unmount /b", "mount /b"]


async def test_one_that_fails_again_and_again_disturbs_nobody(arranged: Mounts, kernel: Kernel) -> None:
    kernel.refuse = {"/a"}
    for _ in range(2):
        failed, inner = await arranged.arrange([A, AB])
        assert (failed.stage, failed.reason) == (MountStage.FAILED, "/a is refused")
        assert inner.stage is MountStage.MOUNTED
    assert kernel.take_log() == ["mount /a/b"]
    kernel.refuse = set()
    failed, _ = await arranged.arrange([A, AB])
    assert failed.stage is MountStage.FAILED  # it would hide the other now
    (mounted,) = await arranged.arrange([A])
    assert mounted.stage is MountStage.MOUNTED


async def test_no_device_is_a_sentence(
    arranged: Mounts, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(spec: MountSpec) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/dev/fuse")

    monkeypatch.setattr(mounts, "_mount_afresh", refuse)
    (report,) = await arranged.arrange([A])
    assert report.reason == "FUSE does not work in the guest: /dev/fuse: No such file or directory"


async def test_a_kernel_that_says_nothing(
    arranged: Mounts, kernel: Kernel, stored: list[str], autojump_clock: MockClock
) -> None:
    kernel.silent = True
    (report,) = await arranged.arrange([A])
    assert report.stage is MountStage.FAILED
    assert kernel.take_log() == ["mount /a", "unmount /a"]
    assert stored == []


async def test_what_was_begun_is_finished_though_nobody_waits(
    arranged: Mounts, kernel: Kernel, stored: list[str]
) -> None:
    kernel.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arranged.arrange, [A, B])
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    kernel.gate.set()
    reports = await arranged.arrange([A, B])
    assert [report.stage for report in reports] == [MountStage.MOUNTED] * 2
    assert kernel.take_log() == ["mount /a", "mount /b"]
    assert len(stored) == 2


async def test_an_aborted_mount_is_replaced(arranged: Mounts, kernel: Kernel, stored: list[str]) -> None:
    await arranged.arrange([A])
    (before,) = stored
    kernel.mounted[0].over.set()
    while kernel.log[-1] != "mount /a" or len(kernel.log) < 3:
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    (after,) = stored
    assert before != after
    assert kernel.take_log() == ["mount /a", "unmount /a", "mount /a"]


async def test_a_mount_that_somebody_took_off_stays_off_until_it_is_asked_for(
    arranged: Mounts, kernel: Kernel, stored: list[str]
) -> None:
    await arranged.arrange([A])
    kernel.mounted.pop().over.set()
    await wait_all_tasks_blocked()
    assert (kernel.take_log(), stored) == (["mount /a"], [])
    await arranged.arrange([A])
    assert kernel.take_log() == ["mount /a"]


async def test_the_end_takes_the_outermost_off_first(
    arranged: Mounts, kernel: Kernel, stored: list[str]
) -> None:
    await arranged.arrange([ABC, A, B])
    kernel.take_log()
    await arranged.unmount_all()
    assert kernel.take_log() == ["unmount /a", "unmount /b", "unmount /a/b/c"]
    assert stored == []
