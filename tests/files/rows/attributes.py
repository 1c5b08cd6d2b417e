"""Modes, owners, times, extended attributes, the filesystem's size, and access by the mode's bits."""

from __future__ import annotations

import ctypes
import os
import stat
import time

from .table import LIBC, NOBODY, attempt, checked, in_child, opened, row, rows, text, write_file

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_SYMLINK_NOFOLLOW = 0x100
AS_ROOT = os.geteuid() == 0


class Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


def utimens(name: str, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    pair = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    checked(LIBC.utimensat(-100, name.encode(), pair, flags))


def recent(seconds: float) -> bool:
    return abs(seconds - time.time()) < 3600


@rows(
    "chmod", [(f"{mode:o}", mode) for mode in (0, 0o7, 0o400, 0o644, 0o755, 0o1755, 0o2755, 0o4755, 0o7777)]
)
def _chmod(mode: int) -> object:
    write_file("file")
    os.mkdir("directory")
    outcomes = []
    for name in ("file", "directory"):
        outcomes += [attempt(os.chmod, name, mode), oct(os.stat(name).st_mode)]
    with opened("directory", os.O_RDONLY) as fd:
        os.fchmod(fd, mode ^ 0o100)
    return [*outcomes, oct(os.stat("directory").st_mode)]


@row
def chmod_of_links_and_nothing() -> object:
    write_file("file")
    os.symlink("file", "link")
    os.symlink("nowhere", "dangling")
    outcomes = [attempt(os.chmod, name, 0o600) for name in ("link", "dangling", "missing")]
    return [*outcomes, oct(os.stat("file").st_mode), oct(os.lstat("link").st_mode)]


@row
def chmod_changes_ctime_only() -> object:
    write_file("file")
    os.utime("file", (1, 2))
    before = os.stat("file")
    time.sleep(0.02)
    os.chmod("file", 0o600)
    after = os.stat("file")
    return [after.st_mtime, after.st_ctime_ns > before.st_ctime_ns]


TIMES = {
    "nanoseconds": ((1_000_000_000, 123_456_789), (1_100_000_000, 987_654_321)),
    "omit atime": ((0, UTIME_OMIT), (5, 6)),
    "omit mtime": ((5, 6), (0, UTIME_OMIT)),
    "omit both": ((0, UTIME_OMIT), (0, UTIME_OMIT)),
    "before 1970": ((-5, 500_000_000), (-1, 0)),
    "after 2038": ((2**31 + 5, 1), (2**32 + 7, 2)),
    "nanosecond out of range": ((1, 1_000_000_000), (1, -1)),
}


@rows("utimensat", [(name, *times) for name, times in TIMES.items()])
def _utimens(atime: tuple[int, int], mtime: tuple[int, int]) -> object:
    write_file("file", b"x")
    os.utime("file", ns=(42, 43))
    outcome = attempt(utimens, "file", atime, mtime)
    status = os.stat("file")
    return [outcome, status.st_atime_ns, status.st_mtime_ns]


@row
def utimensat_now() -> object:
    write_file("file")
    os.utime("file", (1, 1))
    utimens("file", (0, UTIME_NOW), (0, UTIME_OMIT))
    first = os.stat("file")
    utimens("file", (0, UTIME_OMIT), (0, UTIME_NOW))
    second = os.stat("file")
    os.utime("file")
    return [recent(first.st_atime), first.st_mtime, recent(second.st_mtime), recent(os.stat("file").st_mtime)]


@row
def utimensat_of_other_things() -> object:
    os.mkdir("directory")
    os.symlink("nowhere", "link")
    os.mkfifo("fifo")
    for name in ("directory", "link", "fifo"):
        utimens(name, (7, 8), (9, 10), AT_SYMLINK_NOFOLLOW)
    times = [os.lstat(name).st_mtime_ns for name in ("directory", "link", "fifo")]
    return [*times, attempt(utimens, "link", (1, 1), (1, 1)), attempt(utimens, "missing", (1, 1), (1, 1))]


@row
def what_changes_a_files_mtime() -> object:
    outcomes = []
    for change in ("write", "append", "truncate", "same size", "read", "rename", "link"):
        write_file("file", b"content")
        os.utime("file", (1, 1))
        match change:
            case "write" | "append":
                with opened("file", os.O_RDWR | (os.O_APPEND if change == "append" else 0)) as fd:
                    os.write(fd, b"x")
            case "truncate":
                os.truncate("file", 3)
            case "same size":
                os.truncate("file", 7)
            case "read":
                text("file")
            case "rename":
                os.rename("file", "other")
                os.rename("other", "file")
            case "link":
                os.link("file", "other")
                os.unlink("other")
        outcomes.append([change, recent(os.stat("file").st_mtime)])
    return outcomes


@row
def what_changes_a_directorys_mtime() -> object:
    outcomes = []
    for change in ("create", "unlink", "mkdir", "rename", "write", "chmod"):
        os.mkdir(change)
        write_file(f"{change}/file", b"x")
        os.utime(change, (1, 1))
        match change:
            case "create":
                write_file("create/new")
            case "unlink":
                os.unlink("unlink/file")
            case "mkdir":
                os.mkdir("mkdir/new")
            case "rename":
                os.rename("rename/file", "rename/other")
            case "write":
                write_file("write/file", b"longer")
            case "chmod":
                os.chmod("chmod/file", 0o600)
        outcomes.append([change, recent(os.stat(change).st_mtime)])
    return outcomes


@row
def a_new_files_times_are_now() -> object:
    write_file("file")
    status = os.stat("file")
    return [recent(status.st_atime), recent(status.st_mtime), recent(status.st_ctime)]


@row
def a_written_file_is_not_older_than_one_before_it() -> object:
    """What make(1) relies on."""
    times = []
    for index in range(30):
        write_file(f"file{index}", b"x")
        times.append(os.stat(f"file{index}").st_mtime_ns)
    return times == sorted(times)


@row
def links_of_directories() -> object:
    os.mkdir("a")
    counts = [os.stat("a").st_nlink]
    for name in ("a/b", "a/c"):
        os.mkdir(name)
        counts.append(os.stat("a").st_nlink)
    os.rmdir("a/b")
    return [*counts, os.stat("a").st_nlink]


@row
def an_inode_number_stays() -> object:
    write_file("file")
    with opened("file") as fd:
        numbers = {os.stat("file").st_ino, os.fstat(fd).st_ino, *(entry.inode() for entry in os.scandir())}
        os.write(fd, b"content")
    return [len(numbers), os.stat("file").st_ino in numbers, os.stat(".").st_dev == os.stat("file").st_dev]


@row
def blocks_and_block_size() -> object:
    write_file("file", b"x" * 100_000)
    with opened("file") as fd:
        os.fsync(fd)
    status = os.stat("file")
    return [status.st_blocks * 512 >= 100_000, status.st_blksize >= 512]


# --- owners ----------------------------------------------------------------------------------------


@row
def chown_to_oneself() -> object:
    write_file("file")
    os.symlink("file", "link")
    own = os.stat("file")
    outcomes = [
        attempt(os.chown, "file", *pair) for pair in ((own.st_uid, own.st_gid), (-1, -1), (own.st_uid, -1))
    ]
    return [
        *outcomes,
        attempt(os.lchown, "link", own.st_uid, own.st_gid),
        attempt(os.chown, "missing", -1, -1),
    ]


@row
def chown_by_an_ordinary_user() -> object:
    os.chmod(".", 0o777)

    def act() -> object:
        write_file("file")
        own = os.getuid()
        return [attempt(os.chown, "file", *pair) for pair in ((0, -1), (-1, 0), (own, -1), (-1, os.getgid()))]

    return in_child(act, user=NOBODY) if AS_ROOT else "needs root"


@row
def chown_by_root() -> object:
    if not AS_ROOT:
        return "needs root"
    write_file("file")
    os.mkdir("directory")
    os.symlink("file", "link")
    os.chmod("file", 0o6755)
    outcomes = []
    for name in ("file", "directory", "link"):
        os.lchown(name, 1234, 4321)
        status = os.lstat(name)
        outcomes.append([status.st_uid, status.st_gid, oct(status.st_mode)])
    return outcomes


@row
def a_file_belongs_to_who_makes_it() -> object:
    if not AS_ROOT:
        return "needs root"
    os.chmod(".", 0o777)

    def act() -> object:
        write_file("file")
        os.mkdir("directory")
        os.symlink("x", "link")
        return [os.lstat(name).st_uid == NOBODY for name in ("file", "directory", "link")]

    return in_child(act, user=NOBODY)


# --- extended attributes ---------------------------------------------------------------------------


@row
def xattrs_of_a_file() -> object:
    write_file("file")
    os.setxattr("file", "user.one", b"first")
    os.setxattr("file", "user.empty", b"")
    os.setxattr("file", "user.one", b"\0second\xff")
    values = [os.getxattr("file", "user.one").hex(), os.getxattr("file", "user.empty").hex()]
    names = sorted(name for name in os.listxattr("file") if name.startswith("user."))
    os.removexattr("file", "user.one")
    return [
        values,
        names,
        attempt(os.getxattr, "file", "user.one"),
        attempt(os.removexattr, "file", "user.one"),
    ]


@row
def xattr_flags() -> object:
    write_file("file")
    calls = [
        ("user.a", b"1", os.XATTR_REPLACE),
        ("user.a", b"2", os.XATTR_CREATE),
        ("user.a", b"3", os.XATTR_CREATE),
        ("user.a", b"4", os.XATTR_REPLACE),
        ("user.a", b"5", 4),
    ]
    return [[attempt(os.setxattr, "file", *call) for call in calls], os.getxattr("file", "user.a").decode()]


@row
def xattrs_of_other_things() -> object:
    os.mkdir("directory")
    os.symlink("directory", "link")
    os.mkfifo("fifo")
    return [
        attempt(os.setxattr, "directory", "user.x", b"d"),
        attempt(lambda: os.getxattr("directory", "user.x").decode()),
        attempt(os.setxattr, "link", "user.x", b"l", follow_symlinks=False),
        attempt(os.setxattr, "fifo", "user.x", b"f"),
        attempt(os.getxattr, "missing", "user.x"),
    ]


@row
def xattr_names_and_sizes() -> object:
    write_file("file")
    outcomes = [
        attempt(os.setxattr, "file", name, b"x")
        for name in ("user." + "n" * 250, "user." + "n" * 251, "user.", "plain")
    ]
    os.setxattr("file", "user.big", b"v" * 2000)
    return [
        *outcomes,
        len(os.getxattr("file", "user.big")),
        attempt(os.setxattr, "file", "user.big", b"v" * 65537),
    ]


@row
def xattrs_move_with_their_file() -> object:
    write_file("file")
    os.setxattr("file", "user.note", b"kept")
    os.rename("file", "moved")
    with opened("moved") as fd:
        os.unlink("moved")
        return os.getxattr(fd, "user.note").decode()


@rows(
    "xattr of namespace",
    [(name, name) for name in ("trusted.x", "security.x", "security.capability", "system.posix_acl_access")],
)
def _namespaces(name: str) -> object:
    write_file("file")
    return [attempt(os.getxattr, "file", name), attempt(os.setxattr, "file", name, b"value")]


# --- the filesystem --------------------------------------------------------------------------------


@row
def size_of_the_filesystem() -> object:
    write_file("file")
    with opened("file") as fd:
        by_descriptor = os.fstatvfs(fd)
    size = os.statvfs(".")
    return [
        size.f_namemax,
        size.f_bsize > 0,
        size.f_frsize > 0,
        0 <= size.f_bavail <= size.f_bfree <= size.f_blocks,
        size.f_blocks > 0,
        by_descriptor.f_blocks == size.f_blocks,
    ]


# --- access by the bits of the mode ----------------------------------------------------------------


@rows("as another user, a file of mode", [(f"{mode:o}", mode) for mode in range(8)])
def _other(mode: int) -> object:
    if not AS_ROOT:
        return "needs root"
    write_file("file", b"#!/bin/sh\nexit 0\n")
    os.chmod("file", 0o700 | mode)
    return in_child(probe_file, user=NOBODY)


@rows("as its owner, a file of mode", [(f"{mode:o}", mode) for mode in range(8)])
def _owner(mode: int) -> object:
    write_file("file", b"#!/bin/sh\nexit 0\n")
    if AS_ROOT:
        os.chown("file", NOBODY, NOBODY)
    os.chmod("file", mode << 6 | 0o77)
    return in_child(probe_file, user=NOBODY if AS_ROOT else None)


def probe_file() -> object:
    return [
        *(os.access("file", way) for way in (os.R_OK, os.W_OK, os.X_OK)),
        attempt(lambda: text("file")[:2]),
        attempt(os.truncate, "file", 17),
        attempt(os.chmod, "file", os.stat("file").st_mode & 0o7777),
        attempt(os.utime, "file"),
        attempt(os.utime, "file", (1, 1)),
        attempt(os.setxattr, "file", "user.x", b"x"),
    ]


@rows("as another user, a directory of mode", [(f"{mode:o}", mode) for mode in (*range(8), 0o1007, 0o1003)])
def _directory(mode: int) -> object:
    if not AS_ROOT:
        return "needs root"
    os.mkdir("directory")
    write_file("directory/file", b"content")
    os.mkdir("directory/below")
    os.chmod("directory", 0o700 | mode)

    def act() -> object:
        return [
            attempt(lambda: sorted(os.listdir("directory"))),
            attempt(lambda: text("directory/file")),
            attempt(lambda: os.stat("directory/missing") and None),
            attempt(write_file, "directory/new"),
            attempt(os.rename, "directory/new", "directory/newer"),
            attempt(os.unlink, "directory/newer"),
            attempt(os.rename, "directory/file", "directory/renamed"),
            attempt(os.unlink, "directory/renamed"),
            attempt(os.rmdir, "directory/below"),
            attempt(os.chdir, "directory"),
        ]

    return in_child(act, user=NOBODY)


@row
def by_its_group() -> object:
    if not AS_ROOT:
        return "needs root"
    write_file("file", b"content")
    os.chown("file", 1234, NOBODY)
    os.chmod("file", 0o040)
    return in_child(probe_file, user=NOBODY)


@row
def root_may() -> object:
    if not AS_ROOT:
        return "needs root"
    write_file("file", b"content")
    os.mkdir("directory")
    os.chmod("file", 0)
    os.chmod("directory", 0)
    return [
        text("file"),
        attempt(write_file, "directory/new"),
        os.access("file", os.X_OK),
        stat.filemode(os.stat("file").st_mode),
    ]


@row
def setgid_is_dropped_by_a_stranger_to_the_group() -> object:
    if not AS_ROOT:
        return "needs root"
    write_file("file")
    os.chown("file", NOBODY, 4321)
    in_child(lambda: os.chmod("file", 0o2755), user=NOBODY)
    return oct(os.stat("file").st_mode)
