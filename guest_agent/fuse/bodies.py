"""What each FUSE operation asks, and what it is answered: the bodies behind ``abi``'s headers. Pure; bytes and tuples.

Source: include/uapi/linux/fuse.h, as ``abi`` says, whose law is this module's: a parse is one precompiled
``struct`` and a plain tuple, in the order of the kernel's fields without its padding; times are in ns.
"""

from __future__ import annotations

import struct
from typing import Final, cast

from guest_agent.fuse.abi import RESEND_BIT
from protocol.files import ATTR, ATTRIBUTES, ENTRY, FOREVER, NAME

FATTR_FH: Final = 1 << 6
FATTR_LOCKOWNER: Final = 1 << 9
FATTR_CTIME: Final = 1 << 10
"""Bits of SETATTR's ``valid`` beyond those that protocol.files names."""
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
RELEASE_FLUSH: Final = 1 << 0
RELEASE_FLOCK_UNLOCK: Final = 1 << 1
GETATTR_FH: Final = 1 << 0
LK_FLOCK: Final = 1 << 0
WRITE_CACHE: Final = 1 << 0
WRITE_LOCKOWNER: Final = 1 << 1
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0
OPEN_KILL_SUIDGID: Final = 1 << 0


# --- requests ----------------------------------------------------------------------------------------

_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_TWO_U32 = struct.Struct("<II")
_FORGET_ONE = struct.Struct("<QQ")
_GETATTR = struct.Struct("<I4xQ")
_SETATTR = struct.Struct("<I4xQQQQQQIIII4xII4x")
_MKNOD = struct.Struct("<III4x")
_RENAME2 = struct.Struct("<QI4x")
_CREATE = struct.Struct("<IIII")
_READ = struct.Struct("<QQIIQI4x")
_RELEASE = struct.Struct("<QIIQ")
_FLUSH = struct.Struct("<Q8xQ")
_FSYNC = struct.Struct("<QI4x")
_LK = struct.Struct("<QQQQIII4x")
_FALLOCATE = struct.Struct("<QQQI4x")
_LSEEK = struct.Struct("<QqI4x")
_COPY_FILE_RANGE = struct.Struct("<QQQQQQQ")
_IOCTL = struct.Struct("<QIIQII")
_NS = 1_000_000_000


def _names(body: memoryview) -> tuple[bytes, bytes]:
    """Two NUL-terminated names."""
    first, second, _ = bytes(body).split(b"\0", 2)
    return first, second


def parse_name(body: memoryview) -> bytes:
    """LOOKUP, UNLINK, RMDIR, REMOVEXATTR: the name."""
    return bytes(body[:-1])


def parse_forget(body: memoryview) -> int:
    """FORGET: lookups given back."""
    return cast(int, _U64.unpack_from(body)[0])


def parse_batch_forget(body: memoryview) -> tuple[list[int], list[int]]:
    """BATCH_FORGET: nodes, and the lookups of each that are given back."""
    count = _U32.unpack_from(body)[0]
    pairs = list(_FORGET_ONE.iter_unpack(body[8 : 8 + 16 * count]))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def parse_getattr(body: memoryview) -> tuple[int, int]:
    """GETATTR: flags (``GETATTR_FH``), fh."""
    return cast("tuple[int, int]", _GETATTR.unpack_from(body))


def parse_setattr(body: memoryview) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    """SETATTR: valid (FATTR_*), fh, size, lock owner, atime, mtime, ctime (ns), mode, uid, gid."""
    valid, fh, size, owner, atime, mtime, ctime, ansec, mnsec, cnsec, mode, uid, gid = _SETATTR.unpack_from(
        body
    )
    return (
        valid, fh, size, owner, _time(atime, ansec), _time(mtime, mnsec), _time(ctime, cnsec), mode, uid, gid,
    )  # fmt: skip


def _time(seconds: int, nanoseconds: int) -> int:
    """ns since the epoch; the kernel's seconds are an s64 in a u64."""
    return (seconds - (seconds >> 63 << 64)) * _NS + nanoseconds


def parse_symlink(body: memoryview) -> tuple[bytes, bytes]:
    """SYMLINK: the name, what it points to."""
    return _names(body)


def parse_mknod(body: memoryview) -> tuple[int, int, int, bytes]:
    """MKNOD: mode (umask applied), rdev, umask, name."""
    mode, rdev, umask = _MKNOD.unpack_from(body)
    return mode, rdev, umask, bytes(body[16:-1])


def parse_mkdir(body: memoryview) -> tuple[int, int, bytes]:
    """MKDIR: mode (umask applied), umask, name."""
    mode, umask = _TWO_U32.unpack_from(body)
    return mode, umask, bytes(body[8:-1])


def parse_rename(body: memoryview) -> tuple[int, int, bytes, bytes]:
    """RENAME: the new directory, flags (always 0), old name, new name."""
    return (_U64.unpack_from(body)[0], 0, *_names(body[8:]))


def parse_rename2(body: memoryview) -> tuple[int, int, bytes, bytes]:
    """RENAME2: the new directory, flags (RENAME_*), old name, new name."""
    newdir, flags = _RENAME2.unpack_from(body)
    return (newdir, flags, *_names(body[16:]))


def parse_link(body: memoryview) -> tuple[int, bytes]:
    """LINK: the node to be linked, its new name (in the request's node)."""
    return _U64.unpack_from(body)[0], bytes(body[8:-1])


def parse_open(body: memoryview) -> tuple[int, int]:
    """OPEN, OPENDIR: open(2)'s flags, ``OPEN_KILL_SUIDGID``."""
    return cast("tuple[int, int]", _TWO_U32.unpack_from(body))


def parse_create(body: memoryview) -> tuple[int, int, int, int, bytes]:
    """CREATE, TMPFILE: open(2)'s flags, mode (umask applied), umask, ``OPEN_KILL_SUIDGID``, name (for
    TMPFILE it means nothing)."""
    flags, mode, umask, open_flags = _CREATE.unpack_from(body)
    return flags, mode, umask, open_flags, bytes(body[16:-1])


def parse_read(body: memoryview) -> tuple[int, int, int, int, int, int]:
    """READ, READDIR, READDIRPLUS: fh, offset, size, read flags, lock owner, the file's open(2) flags."""
    return cast("tuple[int, int, int, int, int, int]", _READ.unpack_from(body))


def parse_write(body: memoryview) -> tuple[int, int, int, int, int, int, memoryview]:
    """WRITE: fh, offset, size, WRITE_* flags, lock owner, the file's open(2) flags (O_APPEND is one), the
    data, which lies in the buffer that ``body`` does."""
    fh, offset, size, write_flags, owner, flags = _READ.unpack_from(body)
    return fh, offset, size, write_flags, owner, flags, body[40 : 40 + size]


def parse_release(body: memoryview) -> tuple[int, int, int, int]:
    """RELEASE, RELEASEDIR: fh, the file's open(2) flags, RELEASE_* flags, lock owner."""
    return cast("tuple[int, int, int, int]", _RELEASE.unpack_from(body))


def parse_flush(body: memoryview) -> tuple[int, int]:
    """FLUSH: fh, lock owner."""
    return cast("tuple[int, int]", _FLUSH.unpack_from(body))


def parse_fsync(body: memoryview) -> tuple[int, int]:
    """FSYNC, FSYNCDIR: fh, ``FSYNC_FDATASYNC``."""
    return cast("tuple[int, int]", _FSYNC.unpack_from(body))


def parse_setxattr(body: memoryview) -> tuple[int, bytes, bytes]:
    """SETXATTR: XATTR_* flags, name, value."""
    size, flags = _TWO_U32.unpack_from(body)
    rest = bytes(body[8:])
    end = rest.index(b"\0")
    return flags, rest[:end], rest[end + 1 : end + 1 + size]


def parse_getxattr(body: memoryview) -> tuple[int, bytes]:
    """GETXATTR: room for the value in bytes (0: only its size is asked for), name."""
    return _U32.unpack_from(body)[0], bytes(body[8:-1])


def parse_listxattr(body: memoryview) -> int:
    """LISTXATTR: room for the names in bytes (0: only their size is asked for)."""
    return cast(int, _U32.unpack_from(body)[0])


def parse_lk(body: memoryview) -> tuple[int, int, int, int, int, int, int]:
    """GETLK, SETLK, SETLKW: fh, lock owner, start, end (inclusive), type (F_*LCK), pid, ``LK_FLOCK``."""
    return cast("tuple[int, int, int, int, int, int, int]", _LK.unpack_from(body))


def parse_access(body: memoryview) -> int:
    """ACCESS: access(2)'s mask. It does not come with default_permissions."""
    return cast(int, _U32.unpack_from(body)[0])


def parse_interrupt(body: memoryview) -> int:
    """INTERRUPT: the ``unique`` (without ``RESEND_BIT``) of the request whose caller has had a signal."""
    return cast(int, _U64.unpack_from(body)[0]) & ~RESEND_BIT


def parse_fallocate(body: memoryview) -> tuple[int, int, int, int]:
    """FALLOCATE: fh, offset, length, fallocate(2)'s mode."""
    return cast("tuple[int, int, int, int]", _FALLOCATE.unpack_from(body))


def parse_lseek(body: memoryview) -> tuple[int, int, int]:
    """LSEEK: fh, offset, whence (SEEK_DATA, SEEK_HOLE)."""
    return cast("tuple[int, int, int]", _LSEEK.unpack_from(body))


def parse_copy_file_range(body: memoryview) -> tuple[int, int, int, int, int, int, int]:
    """COPY_FILE_RANGE: fh, offset, node to copy to, its fh, its offset, length, flags."""
    return cast("tuple[int, int, int, int, int, int, int]", _COPY_FILE_RANGE.unpack_from(body))


def parse_ioctl(body: memoryview) -> tuple[int, int, int, int, int, int]:
    """IOCTL: fh, flags, command, argument, bytes in, bytes out."""
    return cast("tuple[int, int, int, int, int, int]", _IOCTL.unpack_from(body))


# --- replies -----------------------------------------------------------------------------------------

_NODE = struct.Struct("<Q8x")
_ATTR_VALID = struct.Struct("<QI4x")
_OPEN_OUT = struct.Struct("<QI4x")
_STATFS_OUT = struct.Struct("<QQQQQIII28x")
_LK_OUT = struct.Struct("<QQII")


TICK: Final = 4
"""Beside the bits of a ``promise``: the attributes may be used for a tick of the kernel's clock (4 ms)."""

_TICK_NS: Final = 1
"""Which the kernel rounds up."""


def _seconds(valid: int, bit: int) -> int:
    return FOREVER if valid & bit else 0


def _tick_ns(valid: int) -> int:
    return _TICK_NS if valid & TICK and not valid & ATTRIBUTES else 0


_ENTRY_TIMES: Final = tuple(
    ENTRY.pack(0, 0, _seconds(valid, NAME), _seconds(valid, ATTRIBUTES), 0, _tick_ns(valid))[16:]
    for valid in range(8)
)
_ATTR_TIMES: Final = tuple(
    _ATTR_VALID.pack(_seconds(valid, ATTRIBUTES), _tick_ns(valid)) for valid in range(8)
)


def entry_out(node: int, attr: bytes, valid: int = 0) -> bytes:
    """LOOKUP, SYMLINK, MKNOD, MKDIR, LINK: a node and its ``protocol.files.ATTR``. ``valid``: what of it may be used
    without asking, as in a ``promise`` of protocol.files, and ``TICK``."""
    return _NODE.pack(node) + _ENTRY_TIMES[valid] + attr


ABSENT: Final = _NODE.pack(0) + _ENTRY_TIMES[NAME] + bytes(ATTR.size)
"""LOOKUP: there is no such name, until the kernel is told."""


def attr_out(attr: bytes, valid: int = 0) -> bytes:
    """GETATTR, SETATTR; ``valid`` as above."""
    return _ATTR_TIMES[valid] + attr


def open_out(fh: int, flags: int = 0) -> bytes:
    """OPEN, OPENDIR: the handle, and FOPEN_* flags."""
    return _OPEN_OUT.pack(fh, flags)


def create_out(node: int, attr: bytes, fh: int, flags: int = 0, valid: int = 0) -> bytes:
    """CREATE, TMPFILE."""
    return entry_out(node, attr, valid) + _OPEN_OUT.pack(fh, flags)


def write_out(size: int) -> bytes:
    """WRITE, COPY_FILE_RANGE: bytes taken."""
    return _U64.pack(size)


def statfs_out(
    blocks: int, bfree: int, bavail: int, files: int, ffree: int, bsize: int, namelen: int, frsize: int
) -> bytes:
    """STATFS: the fields of ``protocol.files.FilesystemSize`` in their order."""
    return _STATFS_OUT.pack(blocks, bfree, bavail, files, ffree, bsize, namelen, frsize)


def getxattr_out(size: int) -> bytes:
    """GETXATTR, LISTXATTR that asked for the size; otherwise the reply is the bytes themselves."""
    return _U64.pack(size)


def lk_out(start: int, end: int, kind: int, pid: int) -> bytes:
    """GETLK: the lock in the way, ``kind`` F_UNLCK if there is none."""
    return _LK_OUT.pack(start, end, kind, pid)


def lseek_out(offset: int) -> bytes:
    """LSEEK."""
    return _U64.pack(offset)
