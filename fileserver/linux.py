"""The system calls that Python does not wrap, or not well enough: statx, renameat2, fallocate, utimensat, getdents64.

Each raises ``OSError`` and releases the GIL while it waits. Layouts are the kernel's (include/uapi/linux/stat.h,
fs/readdir.c), little-endian or big as the machine is. glibc 2.30 or later.

A file is reached again through ``/proc/self/fd/N`` of an O_PATH descriptor: that names an inode, not a path, so
nothing can be swapped under it, and a symlink is not followed but is itself the object.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import threading
from ctypes import POINTER, c_char_p, c_int, c_long, c_size_t, c_ssize_t, c_uint, c_void_p
from typing import Any, Final, NamedTuple

from protocol.files import ATTR

_libc: Final = ctypes.CDLL(None, use_errno=True)

AT_EMPTY_PATH: Final = 0x1000
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_NO_AUTOMOUNT: Final = 0x800
_STATX_BASIC_STATS_AND_BTIME: Final = 0xFFF
_STATX_BTIME: Final = 0x800

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

_O_PATH_ENTRY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

# struct statx: mask, blksize, nlink, uid, gid, mode, ino, size, blocks, four times (seconds, ns), rdev, dev.
# Seconds are read unsigned, as ATTR has them.
_STATX: Final = struct.Struct("=II8xIIIH2xQQQ8xQI4xQI4xQI4xQI4xIIII")
_STATX_SIZE: Final = 256
_DIRENT64: Final = struct.Struct("=QqHB")
_DIRENTS: Final = 1 << 18


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", c_long), ("tv_nsec", c_long))


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype = result
    function.argtypes = arguments
    return function


_statx = _function("statx", c_int, c_int, c_char_p, c_int, c_uint, c_void_p)
_renameat2 = _function("renameat2", c_int, c_int, c_char_p, c_int, c_char_p, c_uint)
_fallocate = _function("fallocate64", c_int, c_int, c_int, ctypes.c_int64, ctypes.c_int64)
_utimensat = _function("utimensat", c_int, c_int, c_char_p, POINTER(_Timespec), c_int)
_getdents64 = _function("getdents64", c_ssize_t, c_int, c_void_p, c_size_t)
_fstatfs = _function("fstatfs", c_int, c_int, c_void_p)


def failure(number: int) -> OSError:
    """The error that the guest gets as ``number``."""
    return OSError(number, os.strerror(number))


def _failed() -> OSError:
    return failure(ctypes.get_errno())


class Status(NamedTuple):
    """What statx(2) tells of a file. Seconds are unsigned 64-bit, two's complement before 1970."""

    mask: int
    blksize: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    atime: int
    atime_nsec: int
    btime: int
    btime_nsec: int
    ctime: int
    ctime_nsec: int
    mtime: int
    mtime_nsec: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int

    @property
    def device(self) -> int:
        return os.makedev(self.dev_major, self.dev_minor)

    @property
    def kind(self) -> int:
        """The type, as S_IFMT of the mode."""
        return stat.S_IFMT(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def birth_ns(self) -> int:
        return self.btime * 1_000_000_000 + self.btime_nsec if self.mask & _STATX_BTIME else 0

    def attr(self, ino: int, owner: tuple[int, int] | None = None) -> bytes:
        """As the guest's kernel takes it, with ``ino`` as its inode number, and ``owner`` (user, group) as another."""
        (_, blksize, nlink, uid, gid, mode, _, size, blocks, atime, atime_nsec, _, _, ctime, ctime_nsec,
         mtime, mtime_nsec, major, minor, _, _) = self  # fmt: skip
        uid, gid = (uid, gid) if owner is None else owner
        rdev = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12) if major or minor else 0
        return ATTR.pack(
            ino, size, blocks, atime, mtime, ctime, atime_nsec, mtime_nsec, ctime_nsec, mode, nlink, uid, gid,
            rdev & 0xFFFFFFFF, blksize, 0,
        )  # fmt: skip


class _Scratch(threading.local):
    """Where the kernel writes to: one per thread, made once (a fresh one costs as much as the call)."""

    def __init__(self) -> None:
        self.statx = ctypes.create_string_buffer(_STATX_SIZE)
        self.statx_address = ctypes.addressof(self.statx)
        self.times = (_Timespec * 2)()


_scratch = _Scratch()
_new_tuple = tuple.__new__


def statx(directory: int, name: bytes) -> Status:
    """The entry ``name`` itself, also if it is a symlink."""
    scratch = _scratch
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    if _statx(directory, name, flags, _STATX_BASIC_STATS_AND_BTIME, scratch.statx_address):
        raise _failed()
    return _new_tuple(Status, _STATX.unpack_from(scratch.statx))


def fstatx(descriptor: int) -> Status:
    """The file behind a descriptor of any kind."""
    scratch = _scratch
    if _statx(descriptor, b"", AT_EMPTY_PATH, _STATX_BASIC_STATS_AND_BTIME, scratch.statx_address):
        raise _failed()
    return _new_tuple(Status, _STATX.unpack_from(scratch.statx))


def magic_link(descriptor: int) -> bytes:
    """The path that means what ``descriptor`` refers to."""
    return b"/proc/self/fd/%d" % descriptor


def path_of(descriptor: int) -> bytes:
    """Where the kernel sees what ``descriptor`` refers to, with " (deleted)" behind it if it was. Raises ENAMETOOLONG
    for a path of more than PATH_MAX bytes."""
    return os.readlink(magic_link(descriptor))


def open_entry(directory: int, name: bytes) -> int:
    """An O_PATH descriptor of the entry ``name`` itself. Nothing is followed, read, woken up or waited for."""
    return os.open(name, _O_PATH_ENTRY, dir_fd=directory)


def reopen(descriptor: int, flags: int) -> int:
    """Open what ``descriptor`` refers to again, with other flags. Permissions are checked by the kernel."""
    return os.open(magic_link(descriptor), flags | os.O_CLOEXEC)


def renameat2(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    if _renameat2(old_directory, old, new_directory, new, flags):
        raise _failed()


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if max(offset, length) >= 1 << 63:  # ctypes would cut it off
        raise OverflowError("more than off_t")
    if _fallocate(descriptor, mode, offset, length):
        raise _failed()


def set_times(descriptor: int, atime_ns: int | None, mtime_ns: int | None, *, now: tuple[bool, bool]) -> None:
    """utimensat(2) of what an O_PATH descriptor refers to. ns since the epoch; None leaves a time alone, ``now``
    (atime, mtime) sets it to the present, for which write permission is enough."""
    times = _scratch.times
    _fill(times[0], atime_ns, now[0])
    _fill(times[1], mtime_ns, now[1])
    if _utimensat(-100, magic_link(descriptor), times, 0):
        raise _failed()


def _fill(time: _Timespec, ns: int | None, now: bool) -> None:
    if now or ns is None:
        time.tv_nsec = UTIME_NOW if now else UTIME_OMIT
        return
    seconds, time.tv_nsec = divmod(ns, 1_000_000_000)
    if not -(1 << 63) <= seconds < 1 << 63:
        raise OverflowError("a time of more than 64 bits")
    time.tv_sec = seconds


class DirectoryEntry(NamedTuple):
    """``kind`` is DT_*: S_IFMT of the mode, shifted right by 12; 0 if the filesystem does not tell."""

    ino: int
    kind: int
    name: bytes


def read_directory(descriptor: int) -> list[DirectoryEntry]:
    """All entries but ``.`` and ``..``, of a directory that was just opened for reading."""
    buffer = ctypes.create_string_buffer(_DIRENTS)
    address = ctypes.addressof(buffer)
    entries: list[DirectoryEntry] = []
    while True:
        filled = _getdents64(descriptor, address, _DIRENTS)
        if filled < 0:
            raise _failed()
        if filled == 0:
            return entries
        entries += _entries(ctypes.string_at(address, filled))


def _entries(block: bytes) -> list[DirectoryEntry]:
    entries = []
    at = 0
    header = _DIRENT64.size
    while at < len(block):
        ino, _, length, kind = _DIRENT64.unpack_from(block, at)
        name = block[at + header : block.index(b"\0", at + header)]
        if name not in (b".", b".."):
            entries.append(DirectoryEntry(ino, kind, name))
        at += length
    return entries


def filesystem_type(descriptor: int) -> int:
    """f_type of statfs(2): the first word of its answer, as an unsigned 32-bit number."""
    buffer = ctypes.create_string_buffer(512)
    if _fstatfs(descriptor, ctypes.addressof(buffer)):
        raise _failed()
    word: int = c_long.from_buffer(buffer).value
    return word & 0xFFFFFFFF
