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
from guest_agent.fuse import mountinfo, mounting, mounts
from guest_agent.fuse.device import Handle
from guest_agent.fuse.host import Host
from guest_agent.fuse.landing import Landing
from guest_agent.fuse.mountinfo import Mount
from guest_agent.fuse.mounting import MountError, MountSpec
from guest_agent.fuse.mounts import (
    Mounted,
    Mounts,
    Stored,
    disturbed,
    made_by_us,
    mounting_order,
    parse_stored_name,
    stored_name,
)
from guest_agent.fuse.notifier import Notifiers
from guest_agent.fuse.turns import MAX_WAITING
from protocol.files import MountReport, MountStage, NamesGone, Share, Write
from protocol.lane import Lane

A, AB, ABC, B = Share(1, "/a"), Share(2, "/a/b"), Share(3, "/a/b/c"), Share(4, "/b")


class Connection:
    """A mount that the kernel has greeted, unless ``kernel.silent``."""

    def __init__(self, kernel: Kernel, spec: MountSpec, device: int) -> None:
        self.fd = 0
        self.spec = spec
        self.device = device
        self.initialized = trio.Event()
        self.over = trio.Event()
        self.served = False
        self._kernel = kernel

    async def serve(self, handle: Handle, landing: Landing | None = None, lane: Lane | None = None) -> None:
        if not self._kernel.silent:
            self.initialized.set()
        self.served = True
        try:
            await self.over.wait()
        finally:
            self.served = False

    def stored_as(self) -> StoredConnection:
        return StoredConnection(self.spec.share, self.device)

    def unmount(self) -> None:
        self._kernel.log.append(f"unmount {self.spec.path}")
        self._kernel.mounted = [one for one in self._kernel.mounted if one is not self]
        if not self._kernel.lazy:
            trio.from_thread.run_sync(self.over.set)

    def close(self) -> None:
        self._kernel.log.append(f"close {self.spec.path}")


class Kernel:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.mounted: list[Connection] = []
        self.refuse: set[str] = set()
        self.silent = False
        self.lazy = False
        """Whatever is unmounted is still in use."""
        self.made: list[Connection] = []
        self.gate: trio.Event | None = None
        self.busy: set[str] = set()
        """Paths with files that are open for writing."""
        self._device = 40
        self._trees: dict[int, Connection] = {}

    def mount(self, spec: MountSpec) -> Connection:
        if self.gate is not None:
            trio.from_thread.run(self.gate.wait)
        if spec.path in self.refuse:
            raise MountError(f"{spec.path} is refused")
        self.log.append(f"mount {spec.path}")
        self._device += 1
        connection = Connection(self, spec, self._device)
        self.mounted.append(connection)
        self.made.append(connection)
        return connection

    def end_all(self) -> None:
        """Nobody uses anything any more."""
        self.mounted.clear()
        for connection in self.made:
            connection.over.set()

    def detach(self, path: str) -> int:
        if path in self.refuse:
            raise MountError(f"{path} is refused")
        self.log.append(f"detach {path}")
        (connection,) = [one for one in self.mounted if one.spec.path == path]
        self.mounted.remove(connection)
        tree = os.open("/dev/null", os.O_RDONLY)
        self._trees[tree] = connection
        return tree

    def attach(self, tree: int, spec: MountSpec) -> None:
        os.fstat(tree)
        connection = self._trees.pop(tree)
        assert connection.spec.path == spec.path
        if spec.path in self.refuse:
            trio.from_thread.run_sync(connection.over.set)
            raise MountError(f"{spec.path} is refused")
        self.log.append(f"attach {spec.path} {'ro' if spec.read_only else 'rw'}")
        self.mounted.append(connection)

    def set_read_only(self, path: str, read_only: bool) -> bool:
        if path in self.busy:
            return False
        if path in self.refuse:
            raise MountError(f"{path} is refused")
        self.log.append(f"mode {path} {'ro' if read_only else 'rw'}")
        return True

    def read_mounts(self) -> list[Mount]:
        return [
            Mount(one.device, "/", one.spec.path, False, mountinfo.FILE_SYSTEM, one.spec.source)
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
    monkeypatch.setattr(mountinfo, "read_mounts", kernel.read_mounts)
    for name in ("detach", "attach", "set_read_only"):
        monkeypatch.setattr(mounting, name, getattr(kernel, name))
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
    assert parse_stored_name(f"{connection.name()},salt=3fffff") == Stored(connection, 0x3FFFFF)
    assert parse_stored_name(f"{connection.name()},salt=3,path=1f") == Stored(connection, 3, 0x1F)
    assert parse_stored_name(connection.name()) is None
    assert parse_stored_name("stored") is None


def made(device: int, path: str, share: int = 1) -> Mount:
    return Mount(device, "/", path, False, mountinfo.FILE_SYSTEM, f"{mountinfo.SOURCE_PREFIX}{share}")


async def test_what_we_made_is_told_from_bind_mounts_of_it(kernel: Kernel) -> None:
    """A mount that was detached and attached comes after the bind mounts that were made of it before."""
    connection = Connection(kernel, MountSpec(1, "/a"), 50)
    stored = parse_stored_name(stored_name(Mounted(A, connection, 3)))  # type: ignore[arg-type]
    assert stored is not None
    ours = made(50, "/a")
    others = [made(50, "/var/lib/docker/x"), made(51, "/a"), made(50, "/a", share=2)]
    assert made_by_us(stored, [*others, ours]) == ours
    assert made_by_us(stored, [made(50, "/link/to/a"), *others]) == made(50, "/link/to/a")
    assert made_by_us(stored, others[1:]) is None
    assert made_by_us(Stored(stored.connection, 3), [ours, *others]) == ours


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


async def test_what_a_change_would_hide_gives_way_and_comes_back(
    arranged: Mounts, kernel: Kernel, stored: list[str]
) -> None:
    await arranged.arrange([ABC, B])
    kernel.take_log()
    (before,) = [one for one in kernel.mounted if one.spec.path == ABC.path]
    await arranged.arrange([A, ABC, B])
    assert kernel.take_log() == ["detach /a/b/c", "mount /a", "attach /a/b/c rw"]
    await arranged.arrange([A, AB, ABC, B])
    assert kernel.take_log() == ["detach /a/b/c", "mount /a/b", "attach /a/b/c rw"]
    await arranged.arrange([ABC, B])
    assert kernel.take_log() == ["detach /a/b/c", "unmount /a/b", "unmount /a", "attach /a/b/c rw"]
    assert before in kernel.mounted  # the same superblock
    await wait_all_tasks_blocked()
    assert len(stored) == 2


async def test_several_give_way_the_innermost_first(arranged: Mounts, kernel: Kernel) -> None:
    await arranged.arrange([AB, ABC])
    kernel.take_log()
    await arranged.arrange([A, AB, ABC])
    assert kernel.take_log() == [
        "detach /a/b/c", "detach /a/b", "mount /a", "attach /a/b rw", "attach /a/b/c rw",
    ]  # fmt: skip


async def test_what_cannot_give_way_is_mounted_anew(arranged: Mounts, kernel: Kernel) -> None:
    await arranged.arrange([AB])
    kernel.take_log()
    kernel.refuse = {"/a/b"}
    _, failed = await arranged.arrange([A, AB])
    assert failed.reason == "/a/b is refused"
    assert kernel.take_log() == ["unmount /a/b", "mount /a"]


async def test_what_cannot_come_back_is_mounted_anew(
    arranged: Mounts, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, stored: list[str]
) -> None:
    await arranged.arrange([AB])
    kernel.take_log()

    def refuse(tree: int, spec: MountSpec) -> None:
        raise MountError("no")

    monkeypatch.setattr(mounting, "attach", refuse)
    reports = await arranged.arrange([A, AB])
    assert [report.stage for report in reports] == [MountStage.MOUNTED] * 2
    assert kernel.take_log() == ["detach /a/b", "mount /a", "mount /a/b"]
    await arranged.unmount_all()
    assert kernel.take_log() == ["unmount /a", "unmount /a/b"]


async def test_the_mode_of_a_mount_is_changed_in_its_place(
    arranged: Mounts, kernel: Kernel, stored: list[str]
) -> None:
    await arranged.arrange([B, A, AB])
    kernel.take_log()
    before = list(stored)
    (report, *_) = await arranged.arrange(
        [Share(4, "/b", read_only=True), Share(1, "/a", read_only=True), AB]
    )
    assert report == MountReport(4, MountStage.MOUNTED)
    assert kernel.take_log() == ["mode /a ro", "mode /b ro"]  # and what is inside of it is not disturbed
    await arranged.arrange([Share(4, "/b", read_only=True), A, AB])
    assert kernel.take_log() == ["mode /a rw"]
    assert stored == before
    await arranged.arrange([])
    assert kernel.take_log() == ["unmount /a/b", "unmount /b", "unmount /a"]


async def test_who_writes_does_not_keep_a_mount_from_becoming_read_only(
    arranged: Mounts, kernel: Kernel
) -> None:
    await arranged.arrange([B])
    kernel.take_log()
    kernel.busy = {"/b"}
    (report,) = await arranged.arrange([Share(4, "/b", read_only=True)])
    assert report.stage is MountStage.MOUNTED
    assert kernel.take_log() == ["detach /b", "attach /b ro"]
    kernel.busy = set()
    await arranged.arrange([B])
    assert kernel.take_log() == ["mode /b rw"]


async def test_a_mode_that_cannot_be_changed_is_a_new_mount(
    arranged: Mounts, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, read_only: bool) -> bool:
        raise MountError("no")

    await arranged.arrange([B])
    kernel.take_log()
    monkeypatch.setattr(mounting, "set_read_only", refuse)
    (report,) = await arranged.arrange([Share(4, "/b", read_only=True)])
    assert report.stage is MountStage.MOUNTED
    assert kernel.take_log() == ["unmount /b", "mount /b"]


async def test_a_share_that_has_changed_in_more_is_mounted_anew(arranged: Mounts, kernel: Kernel) -> None:
    await arranged.arrange([B])
    kernel.take_log()
    await arranged.arrange([Share(4, "/b", host_locks=True)])
    assert kernel.take_log() == ["unmount /b", "mount /b"]


async def test_a_mount_whose_mode_was_changed_is_replaced_as_it_should_be(
    arranged: Mounts, kernel: Kernel
) -> None:
    await arranged.arrange([B])
    await arranged.arrange([Share(4, "/b", read_only=True)])
    kernel.take_log()
    kernel.mounted[0].over.set()
    while "mount /b" not in kernel.log:
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    assert kernel.mounted[-1].spec.read_only


async def test_gone_names_are_dropped_wherever_the_share_is_still_in_use(
    arranged: Mounts, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, bytes]] = []
    monkeypatch.setattr(mounts.Volume, "drop_name", lambda self, *name: dropped.append(name))
    kernel.lazy = True
    await arranged.arrange([B])
    await arranged.arrange([Share(4, "/b", host_locks=True)])
    await arranged.drop_names(NamesGone(4, [1], [b"n"]))
    assert dropped == [(1, b"n")] * 2
    kernel.end_all()
    await wait_all_tasks_blocked()
    await arranged.drop_names(NamesGone(4, [1], [b"n"]))
    assert len(dropped) == 2


async def test_no_more_is_taken_from_the_kernel_while_too_much_waits(
    kernel: Kernel, stored: list[str]
) -> None:
    host = Host()
    async with trio.open_nursery() as nursery:
        arranged = Mounts(host, Notifiers(), nursery)
        await arranged.arrange([A, B])
        first, second = kernel.mounted
        assert (first.served, second.served) == (True, True)
        write = Write(A.id, 2, 1, 0)
        host.ask(write, bytes(MAX_WAITING + 1)).begin(lambda outcome: None)
        await wait_all_tasks_blocked()
        assert (first.served, second.served) == (False, True)
        host.give_up()
        await wait_all_tasks_blocked()
        assert (first.served, second.served) == (True, True)
        assert len(stored) == 2
        nursery.cancel_scope.cancel()


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
    while not stored:  # which a thread makes way for
        await trio.lowlevel.checkpoint()
    (after,) = stored
    assert before != after
    assert kernel.take_log() == ["mount /a", "unmount /a", "mount /a"]


async def test_a_share_is_in_use_until_nobody_has_a_mount_of_it(arranged: Mounts, kernel: Kernel) -> None:
    assert arranged.in_use == set()
    await arranged.arrange([A, B])
    assert arranged.in_use == {A.id, B.id}
    kernel.lazy = True
    await arranged.arrange([])
    await arranged.arrange([A])
    assert arranged.in_use == {A.id, B.id}, "programs may be in it"
    await arranged.arrange([])
    kernel.end_all()
    await wait_all_tasks_blocked()
    assert arranged.in_use == set()


async def test_what_a_predecessor_served_is_in_use_at_once(arranged: Mounts) -> None:
    name = f"{StoredConnection(A.id, 44, 41, 0x80).name()},salt=3"
    arranged.adopt([StoredDescriptor(name, os.open("/dev/null", os.O_RDWR))])
    assert arranged.in_use == {A.id}


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
