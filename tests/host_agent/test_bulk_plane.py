"""What a guest offers is used only if it is the same memory, and that of the VM that runs now."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from host_agent import bulk_filesystem, bulk_memory
from host_agent.bulk_plane import HostPlane, plane
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from protocol.bulk import MARK_SIZE, SLOT, Bulk
from protocol.region import CONTROL, FILE_SIZE, FILES, Plane, Region
from protocol.session import Role

START = bulk_filesystem.FILE_START
EXTENTS = [START, FILE_SIZE]
MARK = b"0123456789abcdef"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


@contextmanager
def vm(paths: InstancePaths) -> Iterator[Path]:
    """A process that holds new memory as QEMU does, and is known for the instance's; where the memory can be opened."""
    with ExitStack() as stack:
        with bulk_memory.created(paths) as made:
            descriptor = os.open(made.path, os.O_RDWR)
            process = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor])
            stack.callback(process.wait)
            stack.callback(process.kill)
            os.close(descriptor)
        ProcessIdentity.of_child(process.pid).write(paths.qemu_identity)
        found = bulk_memory.find(paths, process.pid)
        assert found is not None
        yield found


class Guest:
    """The other end: it maps the memory of its VM."""

    def __init__(self, path: Path, name: Plane = FILES) -> None:
        self.region = bulk_memory.map_region(path, EXTENTS)
        self.name = name
        self.bulk = Bulk()
        self.bulk.attach(*self.region.halves(name, Role.GUEST))

    def marks(self, mark: bytes = MARK) -> None:
        self.region.mark(self.name)[: len(mark)] = mark


def sends(guest: Bulk, host: Bulk, content: bytes) -> bytes:
    """What the host sees of it."""
    run = guest.take(len(content))
    assert run is not None
    run.view[: len(content)] = content
    run.length = len(content)
    loan = host.receive([run.first, run.length])
    seen = bytes(loan.view)
    loan.release()
    run.give_back()
    return seen


def agree(host: HostPlane | Bulk, guest: Guest) -> bool:
    """A session begins."""
    bulk = host.bulk if isinstance(host, HostPlane) else host
    accepted = bulk.accept(EXTENTS, MARK)
    if accepted:
        bulk.begin(guest.bulk.busy())
        guest.bulk.begin(bulk.busy())
    return accepted


@pytest.mark.parametrize("name", [CONTROL, FILES])
def test_both_see_the_same_bytes(instance: InstancePaths, name: Plane) -> None:
    with vm(instance) as path:
        guest, host = Guest(path, name), plane(name, instance)
        guest.marks()
        assert agree(host, guest)
        assert host.free == guest.bulk.free == name.slots
        assert sends(guest.bulk, host, b"to the host" * 1000) == b"to the host" * 1000
        assert sends(host, guest.bulk, b"to the guest" * 1000) == b"to the guest" * 1000


def test_the_planes_do_not_touch_each_other(instance: InstancePaths) -> None:
    with vm(instance) as path:
        guests = [Guest(path, CONTROL), Guest(path, FILES)]
        for guest in guests:
            guest.marks(bytes([guest.name.number]) * MARK_SIZE)
        hosts = [plane(CONTROL, instance), plane(FILES, instance)]
        for number, (host, guest) in enumerate(zip(hosts, guests, strict=True)):
            assert host.accept(EXTENTS, bytes([number]) * MARK_SIZE)
            assert not host.accept(EXTENTS, bytes([1 - number]) * MARK_SIZE), "another plane's mark"
            host.begin(b"")
            guest.bulk.begin(b"")
        for number, guest in enumerate(guests):
            while (run := guest.bulk.take(SLOT)) is not None:
                run.view[:] = bytes([65 + number]) * SLOT
                run.length = SLOT
                guest.bulk.lend(run)
        for number, (host, guest) in enumerate(zip(hosts, guests, strict=True)):
            for slot in range(guest.name.slots):
                assert bytes(host.receive([slot, SLOT]).view) == bytes([65 + number]) * SLOT


@pytest.mark.parametrize("mark", [b"", MARK[:-1], MARK + b"x", bytes(MARK_SIZE), MARK[::-1]])
def test_another_mark_is_another_memory(
    instance: InstancePaths, caplog: pytest.LogCaptureFixture, mark: bytes
) -> None:
    with vm(instance) as path:
        Guest(path).marks(mark or bytes(MARK_SIZE))
        host = HostPlane(FILES, lambda: path)
        assert not host.bulk.accept(EXTENTS, mark if len(mark) != MARK_SIZE else MARK)
        assert "the guest's memory is another than ours" in caplog.text
        assert host.bulk.free == 0


def test_a_mark_of_an_earlier_session_is_none(instance: InstancePaths) -> None:
    with vm(instance) as path:
        guest, host = Guest(path), HostPlane(FILES, lambda: path)
        guest.marks()
        assert host.bulk.accept(EXTENTS, MARK)
        guest.marks(b"another session.")
        assert not host.bulk.accept(EXTENTS, MARK)
        assert host.bulk.accept(EXTENTS, b"another session.")


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [START],
        [START, FILE_SIZE, 0],
        [START, FILE_SIZE - SLOT],
        [1 << 40, FILE_SIZE],
        [-4096, FILE_SIZE],
        [START + 1, FILE_SIZE],
        [START, SLOT, START + 2 * SLOT, FILE_SIZE - SLOT],
        [1 << 80, FILE_SIZE],
        [START, FILE_SIZE] * 1000,
    ],
)
def test_what_cannot_be_is_a_line_in_the_log_and_no_more(
    instance: InstancePaths, caplog: pytest.LogCaptureFixture, extents: list[int]
) -> None:
    with vm(instance) as path:
        guest, host = Guest(path), HostPlane(FILES, lambda: path)
        guest.marks()
        assert not host.bulk.accept(extents, MARK)
        assert "payloads go inline" in caplog.text
        assert agree(host, guest), "and the next guest is heard"


def test_extents_that_change_are_mapped_anew(instance: InstancePaths) -> None:
    """A guest that was booted again may have its file elsewhere."""
    with vm(instance) as path:
        host = HostPlane(FILES, lambda: path)
        for start in (START, START + (4 << 20), START):
            region = bulk_memory.map_region(path, [start, FILE_SIZE])
            region.mark(FILES)[:MARK_SIZE] = MARK
            assert host.bulk.accept([start, FILE_SIZE], MARK)
            guest = Bulk()
            guest.attach(*region.halves(FILES, Role.GUEST))
            host.bulk.begin(guest.busy())
            guest.begin(host.bulk.busy())
            assert sends(guest, host.bulk, b"%d" % start) == b"%d" % start
            host.bulk.end()
            region.mark(FILES)[:MARK_SIZE] = bytes(MARK_SIZE)


def test_the_same_memory_is_mapped_once(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier session has of it goes on being the same."""
    mapped: list[Region] = []
    real = bulk_memory.map_region

    def count(path: Path, extents: list[int]) -> Region:
        mapped.append(real(path, extents))
        return mapped[-1]

    with vm(instance) as path:
        guest = Guest(path)
        guest.marks()
        monkeypatch.setattr(bulk_memory, "map_region", count)
        host = HostPlane(FILES, lambda: path)
        assert agree(host, guest)
        run = guest.bulk.take(SLOT)
        assert run is not None
        run.view[:5] = b"kept."
        loan = host.bulk.receive([run.first, 5])
        for _ in range(3):
            host.bulk.end()
            guest.bulk.end()
            assert agree(host, guest)
            assert bytes(loan.view) == b"kept."
            assert guest.bulk.free == FILES.slots - 1
        assert len(mapped) == 1
        loan.release()


def test_another_vm_has_another_memory(instance: InstancePaths) -> None:
    host = plane(FILES, instance)
    for number in range(3):
        with vm(instance) as path:
            guest = Guest(path)
            guest.marks()
            assert agree(host, guest)
            assert sends(guest.bulk, host, b"%d" % number) == b"%d" % number
        host.end()


def test_what_is_in_use_of_an_earlier_vm_keeps_the_next_ones_memory_away(
    instance: InstancePaths, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread still writes to a disk that hangs. It neither loses its bytes nor is it given others."""
    host = plane(FILES, instance)
    with vm(instance) as path:
        guest = Guest(path)
        guest.marks()
        assert agree(host, guest)
        run = guest.bulk.take(SLOT)
        assert run is not None
        run.view[:5] = b"kept."
        loan = host.receive([run.first, 5])
        host.end()
    with vm(instance) as path:
        guest = Guest(path)
        guest.marks()
        guest.region.halves(FILES, Role.GUEST)[0][:] = b"x" * FILES.slots * SLOT
        assert not host.accept(EXTENTS, MARK)
        assert "what an earlier VM has sent is still being worked on" in caplog.text
        assert bytes(loan.view) == b"kept."
        loan.release()
        assert agree(host, guest)
        assert sends(guest.bulk, host, b"new") == b"new"


def test_without_a_vm_there_is_none_and_no_word_of_it(
    instance: InstancePaths, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host = plane(FILES, instance)
    assert not host.accept(EXTENTS, MARK)
    with vm(instance) as path:
        Guest(path).marks()
    assert not host.accept(EXTENTS, MARK), "its QEMU has ended"
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            ProcessIdentity.of_child(other.pid).write(instance.qemu_identity)
            assert not host.accept(EXTENTS, MARK), "one that was started with --no-bulk"
        finally:
            other.kill()
    assert not HostPlane(FILES, lambda: None).bulk.accept(EXTENTS, MARK)
    assert "inline" not in caplog.text


def test_memory_that_goes_while_it_is_looked_at(
    instance: InstancePaths, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert not HostPlane(FILES, lambda: tmp_path / "gone").bulk.accept(EXTENTS, MARK)
    assert "payloads go inline" in caplog.text
