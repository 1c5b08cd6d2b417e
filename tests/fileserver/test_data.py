from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fileserver import data, linux
from protocol.files import (
    MAX_DATA,
    ROOT,
    Allocate,
    CopyRange,
    Create,
    GetAttributes,
    Read,
    Seek,
    SetAttributes,
    Sync,
    Write,
)
from tests.fileserver.served import Served, attr, refused, serving

EXT4, NFS = 0xEF53, 0x6969
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO = 1, 2, 8, 16
TERABYTE = 1 << 40


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as share:
        yield share


@pytest.fixture
def file(share: Served) -> int:
    node: int = share.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
    return node


def content(share: Served) -> bytes:
    return (share.path / "f").read_bytes()


def test_what_is_written_is_on_the_host_and_read_back(share: Served, file: int) -> None:
    written = share.ask(Write, file, 3, payload=b"abc")
    assert (written.size, written.offset, attr(written).size) == (3, 3, 6)
    assert content(share) == b"\0\0\0abc"
    assert share.bytes(Read, file, 2, 3) == b"\0ab"
    share.tree.perform(share.call(Write, file, 0), memoryview(b"xyz"))
    assert content(share) == b"xyzabc"


@pytest.mark.parametrize(
    ("offset", "size", "expected"), [(4, 10, b"45"), (6, 10, b""), (TERABYTE, 1, b""), (0, 0, b"")]
)
def test_reading_at_the_end(share: Served, file: int, offset: int, size: int, expected: bytes) -> None:
    share.ask(Write, file, 0, payload=b"012345")
    assert share.bytes(Read, file, offset, size) == expected


def test_the_largest_pieces_and_none_larger(share: Served, file: int) -> None:
    block = os.urandom(MAX_DATA)
    assert share.ask(Write, file, 0, payload=block).size == MAX_DATA
    assert share.bytes(Read, file, 0, MAX_DATA) == block
    assert share.refused(Read, file, 0, MAX_DATA + 1) == "EINVAL"
    assert share.refused(Write, file, 0, payload=block + b"x") == "EINVAL"


@pytest.mark.parametrize("offset", [-1, 1 << 63, 1 << 70])
def test_offsets_that_cannot_be(share: Served, file: int, offset: int) -> None:
    assert share.refused(Read, file, offset, 1) == "EINVAL"
    assert share.refused(Write, file, offset, payload=b"x") == "EINVAL"
    assert share.refused(Allocate, file, 0, offset, 1) in ("EINVAL", "EFBIG")
    assert share.refused(CopyRange, file, offset, file, 0, 1) == "EINVAL"


def test_a_sparse_terabyte(share: Served, file: int) -> None:
    written = share.ask(Write, file, TERABYTE - 1, payload=b"z")
    assert (attr(written).size, attr(written).blocks < 1000) == (TERABYTE, True)
    assert share.bytes(Read, file, TERABYTE // 2, 4096) == bytes(4096)
    assert share.bytes(Read, file, TERABYTE - 2, 10) == b"\0z"
    assert share.ask(Seek, file, 0, os.SEEK_DATA).offset >= TERABYTE - (1 << 20)
    assert share.ask(Seek, file, 0, os.SEEK_HOLE).offset == 0
    assert share.refused(Seek, file, TERABYTE, os.SEEK_DATA) == "ENXIO"
    assert share.refused(Seek, file, 0, os.SEEK_END) == "EINVAL"
    assert share.refused(Seek, file, -1, os.SEEK_DATA) == "ENXIO"


def test_appends_go_to_the_end_wherever_that_is(share: Served, file: int) -> None:
    share.ask(Write, file, 0, payload=b"guest")
    with open(share.path / "f", "ab") as host:
        host.write(b" host")
    written = share.ask(Write, file, 5, True, payload=b" again")
    assert (written.offset, written.size, attr(written).size) == (10, 6, 16)
    assert content(share) == b"guest host again"
    assert share.ask(Write, file, 0, True, payload=b"").size == 0


def test_a_short_write_is_continued(share: Served, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(data.os, "pwrite", lambda fd, rest, offset: pwrite(fd, rest[:3], offset))
    assert share.ask(Write, file, 0, payload=b"0123456789").size == 10
    assert content(share) == b"0123456789"


def test_a_short_append_is_continued(share: Served, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev
    monkeypatch.setattr(data.os, "pwritev", lambda fd, rest, at, flags: pwritev(fd, [rest[0][:4]], at, flags))
    share.ask(Write, file, 0, True, payload=b"0123456789")
    written = share.ask(Write, file, 0, True, payload=b"abcdef")
    assert (written.size, written.offset) == (6, 10)
    assert content(share) == b"0123456789abcdef"


def test_a_short_read_is_continued(share: Served, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    share.ask(Write, file, 0, payload=b"0123456789")
    pread = os.pread
    monkeypatch.setattr(data.os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    assert share.bytes(Read, file, 1, 100) == b"123456789"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_refusal_of_the_disk_reaches_the_writer(
    share: Served, file: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def until_full(descriptor: int, rest: memoryview, offset: int) -> int:
        if offset >= 4:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, rest[:4], offset)

    monkeypatch.setattr(data.os, "pwrite", until_full)
    assert share.ask(Write, file, 0, payload=b"0123456789").size == 4
    assert share.refused(Write, file, 4, payload=b"456789") == errno.errorcode[number]
    assert share.tree.describe().full == (number != errno.EIO)


def on(share: Served, monkeypatch: pytest.MonkeyPatch, filesystem: int) -> None:
    """What the files are on, from now on."""
    monkeypatch.setattr(linux, "filesystem_type", lambda descriptor: filesystem)
    share.tree._core.reach.devices.forget()


def free(share: Served, monkeypatch: pytest.MonkeyPatch, size: int, filesystem: int = EXT4) -> None:
    """Bytes that the filesystem says it has for us."""
    on(share, monkeypatch, filesystem)
    frsize = 4096
    monkeypatch.setattr(
        data.os, "fstatvfs", lambda descriptor: SimpleNamespace(f_bavail=size // frsize, f_frsize=frsize)
    )


def room(share: Served, file: int, *, append: bool = False) -> int:
    written = share.ask(Write, file, 0, append, payload=b"0123456789")
    assert written.size == 10
    told: int = written.room
    return told


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (data.RESERVE, 0),
        (data.RESERVE + 8192, 8192),
        (TERABYTE, TERABYTE - data.RESERVE),
        (1 << 70, data.MAX_ROOM),
    ],
)
@pytest.mark.parametrize("append", [False, True])
def test_what_may_be_written_ahead_is_free_but_for_the_reserve(
    share: Served, file: int, monkeypatch: pytest.MonkeyPatch, size: int, expected: int, append: bool
) -> None:
    free(share, monkeypatch, size)
    assert room(share, file, append=append) == expected


def test_the_room_is_that_of_the_filesystem(
    share: Served, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(share, monkeypatch, EXT4)
    before = os.statvfs(share.path)
    if before.f_bavail * before.f_frsize < 2 * data.RESERVE:
        pytest.skip("there is no room here")
    assert 0 < room(share, file) <= before.f_blocks * before.f_frsize


def test_no_room_where_it_is_seen_too_late_that_there_was_none(
    share: Served, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(share, monkeypatch, TERABYTE, NFS)
    assert room(share, file) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_after_a_short_write_nor_while_the_disk_is_called_full(
    share: Served, file: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(share, monkeypatch, TERABYTE)
    assert room(share, file) > 0
    pwrite = os.pwrite

    def until_full(descriptor: int, rest: memoryview, offset: int) -> int:
        if offset >= 4:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, rest[:4], offset)

    with monkeypatch.context() as patch:
        patch.setattr(data.os, "pwrite", until_full)
        written = share.ask(Write, file, 0, payload=b"0123456789")
        assert (written.size, written.room) == (4, 0)
        assert share.refused(Write, file, 4, payload=b"456789") == errno.errorcode[number]
    assert room(share, file) == 0
    share.tree._fullness.full = False
    assert room(share, file) > 0


def test_no_room_where_a_process_may_write_only_so_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 30, resource.RLIM_INFINITY))
    with serving(tmp_path) as share:
        node = share.ask(Create, ROOT, b"f", 0o644, os.O_RDWR).node
        free(share, monkeypatch, TERABYTE)
        assert room(share, node) == 0


def test_a_write_that_is_done_does_not_fail_because_nobody_knows_how_much_is_free(
    share: Served, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "")

    free(share, monkeypatch, TERABYTE)
    monkeypatch.setattr(data.os, "fstatvfs", failing)
    assert room(share, file) == 0
    assert content(share) == b"0123456789"


def test_devices_fifos_and_directories_have_no_data(share: Served) -> None:
    os.mkfifo(share.path / "fifo")
    fifo = share.node("fifo")
    for kind, fields in ((Read, (0, 1)), (Write, (0,)), (Seek, (0, os.SEEK_DATA)), (Sync, ())):
        assert share.refused(kind, fifo, *fields) == "ENXIO"
    assert share.refused(Read, ROOT, 0, 1) == "EISDIR"
    assert share.refused(Write, ROOT, 0) == "EISDIR"
    assert refused(lambda: share.tree.data_fd_for_locks(fifo, os.O_RDWR)) == "ENXIO"


def test_allocating(share: Served, file: int) -> None:
    share.ask(Write, file, 0, payload=b"x" * 8192)
    assert attr(share.ask(Allocate, file, 0, 0, 1 << 16)).size == 1 << 16
    assert attr(share.ask(Allocate, file, KEEP_SIZE, 0, 1 << 17)).size == 1 << 16
    share.ask(Allocate, file, PUNCH_HOLE | KEEP_SIZE, 4096, 4096)
    assert share.bytes(Read, file, 4095, 2) == b"x\0"
    share.ask(Allocate, file, ZERO, 0, 1)
    assert share.bytes(Read, file, 0, 2) == b"\0x"
    assert share.refused(Allocate, file, COLLAPSE, 0, 4096) == "ENOTSUP"
    assert share.refused(Allocate, file, PUNCH_HOLE, 0, 4096) == "ENOTSUP"


def test_copying(share: Served, file: int) -> None:
    share.ask(Write, file, 0, payload=b"0123456789")
    other = share.ask(Create, ROOT, b"g", 0o644, os.O_RDWR).node
    written = share.ask(CopyRange, file, 2, other, 1, 100)
    assert (written.size, written.offset, attr(written).size) == (8, 1, 9)
    assert (share.path / "g").read_bytes() == b"\0" + b"23456789"
    assert share.refused(CopyRange, file, 0, file, 1, 5) == "EINVAL"
    assert share.refused(CopyRange, file, 0, ROOT, 0, 5) == "EISDIR"


def test_privilege_is_dropped_by_a_write_that_asks(share: Served, file: int) -> None:
    os.chmod(share.path / "f", 0o6755)
    written = share.ask(Write, file, 0, payload=b"x", kill_privilege=True)
    assert stat.S_IMODE(attr(written).mode) == stat.S_IMODE(os.stat(share.path / "f").st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel drops it for others")
def test_privilege_stays_for_a_writer_that_may_keep_it(share: Served, file: int) -> None:
    os.chmod(share.path / "f", 0o4755)
    assert stat.S_IMODE(attr(share.ask(Write, file, 0, payload=b"x")).mode) == 0o4755


def test_sync(share: Served, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(data.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(data.os, "fdatasync", lambda fd: synced.append("data"))
    share.ask(Sync, file)
    share.ask(Sync, ROOT)
    share.ask(Sync, file, True)
    assert synced == [str(share.path / "f"), str(share.path), "data"]


def test_an_error_of_the_disk_reaches_sync(share: Served, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(data.os, "fsync", broken)
    assert share.refused(Sync, file) == "EIO"


def test_a_file_of_a_user_that_may_not_be_read(share: Served, file: int) -> None:
    """As root, modes do not matter; as a user, see test_datafiles."""
    share.ask(Write, file, 0, payload=b"secret")
    share.ask(SetAttributes, file, 1, mode=0)
    assert share.bytes(Read, file, 0, 6) == b"secret"
    assert attr(share.ask(GetAttributes, file)).mode == 0o100000
