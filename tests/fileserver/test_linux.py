from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fileserver import linux
from tests.fileserver.served import refused


@pytest.fixture
def directory(tmp_path: Path):
    descriptor = os.open(tmp_path, os.O_PATH)
    yield descriptor
    os.close(descriptor)


def test_statx_says_what_stat_says(tmp_path: Path, directory: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "file", ns=(-1_500_000_000, 3_000_000_007))
    expected = os.stat(tmp_path / "file")

    status = linux.statx(directory, b"file")

    assert (status.device, status.ino) == (expected.st_dev, expected.st_ino)
    assert (status.size, status.blocks, status.mode) == (5000, expected.st_blocks, expected.st_mode)
    assert (status.mtime, status.mtime_nsec) == (3, 7)
    assert (status.atime, status.atime_nsec) == ((1 << 64) - 2, 500_000_000)
    assert status.ctime * 10**9 + status.ctime_nsec == expected.st_ctime_ns


def test_statx_does_not_follow(tmp_path: Path, directory: int) -> None:
    (tmp_path / "link").symlink_to("/")
    assert linux.statx(directory, b"link").kind == stat.S_IFLNK
    descriptor = linux.open_entry(directory, b"link")
    assert linux.fstatx(descriptor).kind == stat.S_IFLNK
    os.close(descriptor)


def test_birth_is_that_of_the_file(tmp_path: Path, directory: int) -> None:
    (tmp_path / "file").touch()
    before = linux.statx(directory, b"file").birth_ns()
    (tmp_path / "file").write_text("changed")
    assert linux.statx(directory, b"file").birth_ns() == before


def test_attr_encodes_a_device_number_as_the_kernel_does() -> None:
    status = linux.fstatx(0)._replace(rdev_major=259, rdev_minor=0x12345)
    rdev = int.from_bytes(status.attr(1)[76:80], "little")
    assert rdev == 0x45 | 259 << 8 | 0x123 << 20


@pytest.mark.parametrize(("flags", "expected"), [(0, "0"), (linux.RENAME_NOREPLACE, "EEXIST")])
def test_renameat2_over_a_file(tmp_path: Path, directory: int, flags: int, expected: str) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert refused(lambda: linux.renameat2(directory, b"a", directory, b"b", flags)) == expected
    assert (tmp_path / "b").read_text() == ("a" if expected == "0" else "b")


def test_renameat2_exchanges(tmp_path: Path, directory: int) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    linux.renameat2(directory, b"a", directory, b"b", linux.RENAME_EXCHANGE)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["b", "a"]


def test_fallocate_keeps_the_size(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        linux.fallocate(file.fileno(), linux.FALLOC_FL_KEEP_SIZE, 0, 1 << 16)
        assert os.fstat(file.fileno()).st_size == 0
        assert os.fstat(file.fileno()).st_blocks >= 128
        assert refused(lambda: linux.fallocate(file.fileno(), 0, 0, -1)) == "EINVAL"


def test_set_times_of_a_symlink_and_only_one_of_two(tmp_path: Path, directory: int) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    descriptor = linux.open_entry(directory, b"link")
    linux.set_times(descriptor, 1, -1, now=(False, False))
    linux.set_times(descriptor, None, 5_000_000_001, now=(False, False))
    status = linux.fstatx(descriptor)
    assert (status.atime, status.atime_nsec, status.mtime, status.mtime_nsec) == (0, 1, 5, 1)
    os.close(descriptor)


def test_set_times_refuses_what_does_not_fit() -> None:
    with pytest.raises(OverflowError):
        linux.set_times(0, 1 << 100, None, now=(False, False))


def test_read_directory_has_types_and_any_names(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("x")
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    long, foreign = b"n" * 255, b"\xff\xfe\n "
    for name in (long, foreign):
        os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT))
    descriptor = os.open(tmp_path, os.O_RDONLY)
    entries = {entry.name: entry for entry in linux.read_directory(descriptor)}
    os.close(descriptor)
    assert set(entries) == {b"file", b"directory", b"link", b"fifo", b"socket", long, foreign}
    kinds = {name: entry.kind for name, entry in entries.items()}
    assert (kinds[b"file"], kinds[b"directory"], kinds[b"link"]) == (8, 4, 10)
    assert (kinds[b"fifo"], kinds[b"socket"]) == (1, 12)
    assert entries[b"file"].ino == os.stat(tmp_path / "file").st_ino


def test_filesystem_type_of_proc() -> None:
    descriptor = os.open("/proc", os.O_PATH)
    assert linux.filesystem_type(descriptor) == 0x9FA0
    os.close(descriptor)
