"""Disks of the test's own: a file for a device, resize2fs by a name that is found first."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from guest_agent import data_disk
from guest_agent.data_disk import DataDisk, capacity, trim
from protocol.api import GrowDisk, TrimDisks
from protocol.errors import ErrorCode, RpcError

MIB = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(b"")
    os.truncate(path, 4 * MIB)
    return path


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mount"
    path.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda looked_at: looked_at == path)
    return path


@pytest.fixture
def disk(device: Path, mount: Path) -> DataDisk:
    return DataDisk(device, mount, ())


@pytest.fixture
def resize2fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes down what it was called with; what it does then the test may replace."""
    program = tmp_path / "bin" / "resize2fs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def _become(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")


async def test_the_filesystem_is_told_to_fill_its_disk(
    disk: DataDisk, device: Path, mount: Path, resize2fs: Path, tmp_path: Path
) -> None:
    assert (await disk.grow(GrowDisk(4 * MIB))).size == os.statvfs(mount).f_blocks * os.statvfs(
        mount
    ).f_frsize
    assert (tmp_path / "called").read_text() == f"{device}\n"


async def test_a_disk_that_is_just_becoming_larger_is_waited_for(
    disk: DataDisk, device: Path, resize2fs: Path, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.grow, GrowDisk(8 * MIB))
        await trio.sleep(0.2)
        assert not (tmp_path / "called").exists()
        os.truncate(device, 8 * MIB)
    assert (tmp_path / "called").exists()


async def test_a_disk_that_does_not_become_larger_is_an_error(
    disk: DataDisk, resize2fs: Path, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(RpcError, match=f"has {4 * MIB} bytes, and not {8 * MIB}"):
        await disk.grow(GrowDisk(8 * MIB))
    assert not (tmp_path / "called").exists()


async def test_what_resize2fs_complains_about_is_told(disk: DataDisk, resize2fs: Path) -> None:
    _become(resize2fs, "echo first >&2; echo 'resize2fs: no room' >&2; exit 1")
    with pytest.raises(RpcError, match="resize2fs failed: resize2fs: no room"):
        await disk.grow(GrowDisk(4 * MIB))


async def test_without_a_data_disk_there_is_nothing_to_do(device: Path, tmp_path: Path) -> None:
    disk = DataDisk(device, tmp_path, ())
    for asked in (disk.grow(GrowDisk(1)), disk.trim(TrimDisks())):
        with pytest.raises(RpcError, match="not mounted") as caught:
            await asked
        assert caught.value.code is ErrorCode.UNREACHABLE


async def test_free_space_is_trimmed_of_all_disks(
    device: Path, mount: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ioctl(descriptor: int, request: int, argument: bytearray, mutate: bool) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        asked.append((path, request, struct.unpack("=QQQ", argument)))
        if path == str(tmp_path / "broken"):
            raise OSError(95, "Operation not supported")
        argument[:] = struct.pack("=QQQ", 0, 1000, 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    others = (tmp_path / "broken", tmp_path / "root")
    for other in others:
        other.mkdir()
    assert (await DataDisk(device, mount, others).trim(TrimDisks())).trimmed == 2000
    everything = (0, (1 << 64) - 1, 0)
    # FITRIM of linux/fs.h: _IOWR('X', 121, 24 bytes).
    assert asked == [(str(path), 0xC0185879, everything) for path in (mount, *others)]


async def test_a_disk_that_cannot_be_trimmed_is_an_error(
    disk: DataDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(mount: Path) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(data_disk, "trim", refused)
    with pytest.raises(RpcError, match="Operation not supported"):
        await disk.trim(TrimDisks())


def test_a_filesystem_without_such_a_disk_says_so() -> None:
    with pytest.raises(OSError):
        trim(Path("/proc"))


def test_the_size_of_a_file_is_that_of_a_disk(device: Path) -> None:
    assert capacity(device) == 4 * MIB
