from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.files import (
    KILL_PRIVILEGE,
    ROOT,
    SET_ATIME,
    SET_ATIME_NOW,
    SET_GID,
    SET_MODE,
    SET_MTIME,
    SET_MTIME_NOW,
    SET_SIZE,
    SET_UID,
    GetAttributes,
    GetFilesystemSize,
    GetXattr,
    ListXattr,
    MakeSymlink,
    RemoveXattr,
    SetAttributes,
    SetXattr,
)
from tests.fileserver.served import NOBODY, Served, attr, ordinary_user, serving

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as share:
        yield share


@pytest.fixture
def file(share: Served) -> int:
    (share.path / "f").write_bytes(b"0123456789")
    os.chmod(share.path / "f", 0o644)
    return share.node("f")


def test_attributes_of_the_root(share: Served) -> None:
    found = attr(share.ask(GetAttributes, ROOT))
    assert (found.ino, found.mode) == (os.stat(share.path).st_ino, os.stat(share.path).st_mode)


def test_mode_is_exact_and_the_type_stays(share: Served, file: int) -> None:
    assert attr(share.ask(SetAttributes, file, SET_MODE, mode=stat.S_IFDIR | 0o4751)).mode == 0o104751
    assert attr(share.ask(SetAttributes, ROOT, SET_MODE, mode=0o1777)).mode == 0o041777


@pytest.mark.parametrize("size", [0, 5, 10, 1 << 40])
def test_size(share: Served, file: int, size: int) -> None:
    found = attr(share.ask(SetAttributes, file, SET_SIZE, size=size))
    assert found.size == os.stat(share.path / "f").st_size == size
    assert found.blocks <= 8


def test_size_of_what_has_none(share: Served, file: int) -> None:
    os.mkfifo(share.path / "fifo")
    assert share.refused(SetAttributes, ROOT, SET_SIZE, size=0) == "EISDIR"
    assert share.refused(SetAttributes, share.node("fifo"), SET_SIZE, size=0) == "ENXIO"
    assert share.refused(SetAttributes, file, SET_SIZE, size=-1) == "EINVAL"
    assert share.refused(SetAttributes, file, SET_SIZE, size=1 << 70) == "EINVAL"


def test_times(share: Served, file: int) -> None:
    share.ask(SetAttributes, file, SET_ATIME | SET_MTIME, atime_ns=1, mtime_ns=-1)
    found = os.stat(share.path / "f")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1, -1)
    share.ask(SetAttributes, file, SET_ATIME, atime_ns=7 * 10**9)
    found = os.stat(share.path / "f")
    assert (found.st_atime_ns, found.st_mtime_ns) == (7 * 10**9, -1)
    share.ask(SetAttributes, file, SET_ATIME | SET_ATIME_NOW | SET_MTIME | SET_MTIME_NOW, atime_ns=1)
    found = os.stat(share.path / "f")
    assert time.time() - found.st_atime < 10
    assert time.time() - found.st_mtime < 10
    assert share.refused(SetAttributes, file, SET_MTIME, mtime_ns=1 << 100) == "EINVAL"


def test_times_of_a_symlink_are_its_own(share: Served, file: int) -> None:
    link = share.ask(MakeSymlink, ROOT, b"link", b"f").node
    before = os.stat(share.path / "f").st_mtime_ns
    assert attr(share.ask(SetAttributes, link, SET_MTIME, mtime_ns=5 * 10**9)).mtime == 5
    assert os.stat(share.path / "f").st_mtime_ns == before


def test_all_at_once(share: Served, file: int) -> None:
    found = attr(
        share.ask(
            SetAttributes, file, SET_MODE | SET_SIZE | SET_MTIME | SET_UID | SET_GID, mode=0o600, size=3,
            mtime_ns=9 * 10**9, uid=os.getuid(), gid=os.getgid(),
        )
    )  # fmt: skip
    assert (found.mode, found.size, found.mtime) == (0o100600, 3, 9)


@needs_root
def test_root_gives_files_away(share: Served, file: int) -> None:
    found = attr(share.ask(SetAttributes, file, SET_UID | SET_GID, uid=NOBODY, gid=NOBODY))
    assert (found.uid, found.gid) == (NOBODY, NOBODY)
    assert attr(share.ask(SetAttributes, file, SET_UID, uid=0)).gid == NOBODY
    assert share.refused(SetAttributes, file, SET_UID, uid=0xFFFFFFFF) == "EINVAL"


def test_an_ordinary_user_is_told_the_truth() -> None:
    with ordinary_user() as place, serving(place) as share:
        (place / "f").touch()
        node = share.node("f")
        assert share.refused(SetAttributes, node, SET_UID, uid=NOBODY + 1) == "EPERM"
        share.ask(SetAttributes, node, SET_UID, uid=os.geteuid())
        assert share.refused(SetAttributes, share.node("f"), SET_GID, gid=NOBODY + 1) == "EPERM"


@pytest.mark.parametrize(("mode", "left"), [(0o6755, 0o755), (0o2644, 0o2644), (0o4644, 0o644)])
def test_privilege_is_dropped_when_asked(share: Served, file: int, mode: int, left: int) -> None:
    os.chmod(share.path / "f", mode)
    found = attr(share.ask(SetAttributes, file, SET_SIZE | KILL_PRIVILEGE, size=1))
    assert stat.S_IMODE(found.mode) == left


def test_privilege_of_a_directory_stays(share: Served) -> None:
    share.ask(SetAttributes, ROOT, SET_MODE, mode=0o2755)
    found = share.ask(SetAttributes, ROOT, SET_MTIME_NOW | KILL_PRIVILEGE)
    assert stat.S_IMODE(attr(found).mode) == 0o2755


def test_user_xattrs(share: Served, file: int) -> None:
    share.ask(SetXattr, file, b"user.a", b"\0\xff")
    share.ask(SetXattr, file, b"user.\xfe", b"")
    assert share.ask(GetXattr, file, b"user.a").data == b"\0\xff"
    assert sorted(share.ask(ListXattr, file).data.split(b"\0")) == [b"", b"user.a", b"user.\xfe"]
    assert os.getxattr(share.path / "f", "user.a") == b"\0\xff"
    assert share.refused(SetXattr, file, b"user.a", b"x", 1) == "EEXIST"
    assert share.refused(SetXattr, file, b"user.b", b"x", 2) == "ENODATA"
    share.ask(RemoveXattr, file, b"user.a")
    assert share.refused(GetXattr, file, b"user.a") == "ENODATA"
    assert share.refused(RemoveXattr, file, b"user.a") == "ENODATA"


def test_other_xattrs_are_out_of_reach(share: Served, file: int) -> None:
    for name in (b"security.capability", b"trusted.x", b"system.posix_acl_access", b"", b"user"):
        assert share.refused(SetXattr, file, name, b"x") == "ENOTSUP"
        assert share.refused(GetXattr, file, name) == "ENODATA"
        assert share.refused(RemoveXattr, file, name) == "ENODATA"
    if os.geteuid() == 0:
        os.setxattr(share.path / "f", "trusted.hidden", b"x")
    assert share.ask(ListXattr, file).data == b""


def test_xattrs_that_cannot_be(share: Served, file: int) -> None:
    assert share.refused(SetXattr, file, b"user." + b"n" * 300, b"x") == "ERANGE"
    assert share.refused(SetXattr, file, b"user.a\0b", b"x") == "EINVAL"
    assert share.refused(SetXattr, file, b"user.a", b"x" * 70000) in ("E2BIG", "ENOSPC")
    link = share.ask(MakeSymlink, ROOT, b"link", b"f").node
    assert share.refused(SetXattr, link, b"user.a", b"x") == "EPERM"


def test_the_size_of_the_filesystem(share: Served) -> None:
    found, expected = share.ask(GetFilesystemSize, ROOT), os.statvfs(share.path)
    assert (found.blocks, found.frsize, found.namelen) == (expected.f_blocks, expected.f_frsize, 255)
    assert found.files == expected.f_files


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give files to anybody")
def test_what_the_guests_root_gives_to_itself_is_ours(share: Served) -> None:
    (share.path / "f").write_text("x")
    node = share.node("f")
    answer = attr(share.ask(SetAttributes, node, SET_UID | SET_GID, uid=0, gid=0))
    assert (answer.uid, answer.gid) == (os.geteuid(), os.getegid())
    assert share.refused(SetAttributes, node, SET_UID, uid=os.geteuid() + 1) == "EPERM"
