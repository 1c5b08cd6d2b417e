"""Memory for a VM: made, found in the process that has it, mapped where a guest says, and nothing left of it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import bulk_filesystem, bulk_memory
from host_agent.bulk_memory import SIZE, NoBulkMemory, placement
from host_agent.cleanup import clean_up
from host_agent.paths import InstancePaths
from protocol.bulk import SLOT
from protocol.region import FILE_SIZE

PAGE = 4096
START = bulk_filesystem.FILE_START

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")

HOLDER = """
import os, sys
os.open(sys.argv[1], os.O_RDWR)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def qemu(path: Path) -> Iterator[int]:
    """The pid of a process that has opened ``path``, as QEMU does."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def descriptors() -> list[str]:
    return [bulk_memory._link(path) for path in Path("/proc/self/fd").iterdir()]


@on_linux
def test_all_of_it_is_there_with_its_filesystem(instance: InstancePaths) -> None:
    with bulk_memory.created(instance) as memory:
        status = memory.path.stat()
        assert (status.st_size, memory.size) == (SIZE, SIZE)
        assert status.st_blocks * 512 >= SIZE, "a page that is not there yet could not be had later"
        assert status.st_mode & 0o777 == 0o600
        content = memory.path.read_bytes()
        for offset, block in bulk_filesystem.blocks(SIZE, FILE_SIZE):
            assert content[offset : offset + len(block)] == block
        assert list(instance.directory.iterdir()) == []
    assert not memory.path.exists()
    assert bulk_memory._LINK not in descriptors()


@on_linux
def test_nobody_takes_away_what_is_mapped(instance: InstancePaths) -> None:
    with bulk_memory.created(instance) as memory:
        descriptor = os.open(memory.path, os.O_RDWR)
        try:
            for size in (0, SIZE + PAGE):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        finally:
            os.close(descriptor)


@on_linux
def test_it_is_found_in_qemu_and_lives_as_long(instance: InstancePaths) -> None:
    with bulk_memory.created(instance) as memory:
        with qemu(memory.path) as pid:
            found = bulk_memory.find(instance, pid)
            assert found is not None
            assert found.samefile(memory.path)
    with bulk_memory.created(instance) as memory, qemu(memory.path) as pid:
        found = bulk_memory.find(instance, pid)
        assert found is not None
        region = bulk_memory.map_region(memory.path, [START, FILE_SIZE])
        region.view(200)[:5] = b"hello"
        region.close()
        same = bulk_memory.map_region(found, [START, FILE_SIZE])
        assert bytes(same.view(200)[:5]) == b"hello"
        with found.open("rb") as file:
            file.seek(START + 200 * SLOT)
            assert file.read(5) == b"hello"
        same.close()
    assert not found.exists()


@on_linux
def test_a_qemu_without_it_or_none_at_all_has_none(instance: InstancePaths) -> None:
    with qemu(Path(os.devnull)) as pid:
        assert bulk_memory.find(instance, pid) is None
    assert bulk_memory.find(instance, pid) is None


@on_linux
@pytest.mark.parametrize("missing", ["memfd_create", "posix_fallocate"])
def test_no_memory_is_a_reason_and_leaves_nothing(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, missing, refuse)
    with pytest.raises(NoBulkMemory, match="no 64 MiB of memory for it: No space left on device"):
        with bulk_memory.created(instance):
            pass
    assert bulk_memory._LINK not in descriptors()


def test_elsewhere_it_is_a_file_that_the_cleanup_takes(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert bulk_memory.find(instance, os.getpid()) is None
    instance.bulk_memory.write_bytes(b"of an earlier VM")
    with bulk_memory.created(instance) as memory:
        assert memory.path == instance.bulk_memory
    assert memory.path.stat().st_mode & 0o777 == 0o600
    assert memory.path.stat().st_blocks * 512 >= SIZE
    found = bulk_memory.find(instance, os.getpid())
    assert found is not None
    region = bulk_memory.map_region(found, [START, FILE_SIZE])
    region.view(0)[:2] = b"ok"
    region.close()
    monkeypatch.undo()
    clean_up(instance)
    assert not instance.bulk_memory.exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo '  memdev=<link<memory-backend>>'", ""),
        ("echo \"Device 'virtio-pmem-pci' not found\" >&2", "qemu-system-x86_64 has no virtio-pmem-pci"),
        ("exit 1", "qemu-system-x86_64 has no virtio-pmem-pci"),
    ],
)
async def test_a_qemu_is_asked_for_the_device(tmp_path: Path, script: str, reason: str) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    try:
        await bulk_memory.check_device(program)
        said = ""
    except NoBulkMemory as refused:
        said = str(refused)
    assert said == reason


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64")
async def test_the_real_one_has_it() -> None:
    await bulk_memory.check_device(Path(str(shutil.which("qemu-system-x86_64"))))


# --- what a guest may say --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extents", "start"),
    [
        ([START, FILE_SIZE], START),
        ([0, FILE_SIZE], 0),
        ([SIZE - FILE_SIZE, FILE_SIZE], SIZE - FILE_SIZE),
        ([START, SLOT, START + SLOT, FILE_SIZE - SLOT], START),
        ([START, PAGE, START + PAGE, PAGE, START + 2 * PAGE, FILE_SIZE - 2 * PAGE], START),
    ],
)
def test_a_file_in_one_piece_has_a_place(extents: list[int], start: int) -> None:
    assert placement(extents, SIZE) == start


@pytest.mark.parametrize(
    ("extents", "sentence"),
    [
        ([], "with 0 numbers"),
        ([START], "with 1 numbers"),
        ([START, PAGE, START + PAGE], "with 3 numbers"),
        ([START, PAGE] * 65, "with 130 numbers"),
        ([START + 512, FILE_SIZE], "does not consist of pages"),
        ([START, FILE_SIZE + 1], "does not consist of pages"),
        ([-PAGE, FILE_SIZE], "does not consist of pages"),
        ([START + FILE_SIZE, -FILE_SIZE], "does not consist of pages"),
        ([START, PAGE, START + 2 * PAGE, FILE_SIZE - PAGE], "not in one piece"),
        ([START, SLOT, START, FILE_SIZE - SLOT], "not in one piece"),
        ([START + SLOT, FILE_SIZE - SLOT, START, SLOT], "not in one piece"),
        ([START, 0, START, FILE_SIZE], "not in one piece"),
        ([START, FILE_SIZE - PAGE], f"has {FILE_SIZE - PAGE} bytes instead of {FILE_SIZE}"),
        ([START, FILE_SIZE + PAGE], f"has {FILE_SIZE + PAGE} bytes instead of {FILE_SIZE}"),
        ([START, 1 << 63], "instead of"),
        ([SIZE - FILE_SIZE + PAGE, FILE_SIZE], "ends behind its device"),
        ([1 << 62, FILE_SIZE], "ends behind its device"),
    ],
)
def test_any_other_is_refused(extents: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        placement(extents, SIZE)


@given(st.lists(st.integers() | st.integers(0, SIZE // PAGE).map(lambda page: page * PAGE), max_size=8))
def test_whatever_it_says_the_mapping_is_in_the_device(extents: list[int]) -> None:
    try:
        start = placement(extents, SIZE)
    except ValueError:
        return
    assert 0 <= start <= SIZE - FILE_SIZE


@on_linux
def test_a_lie_maps_nothing(instance: InstancePaths) -> None:
    with bulk_memory.created(instance) as memory:
        before = len(descriptors())
        with pytest.raises(ValueError):
            bulk_memory.map_region(memory.path, [START + PAGE, FILE_SIZE + PAGE])
        assert len(descriptors()) == before


def test_memory_that_has_gone_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bulk_memory.map_region(tmp_path / "gone", [START, FILE_SIZE])
