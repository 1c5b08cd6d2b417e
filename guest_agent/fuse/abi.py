"""The FUSE kernel ABI: what is read from /dev/fuse and what is written to it. Pure; bytes in, tuples out.

Source: include/uapi/linux/fuse.h, protocol 7.31 (Linux 5.4) to 7.45 (Linux 6.18), for little-endian
machines. Requests are parsed as laid out by a kernel that was answered with ``negotiate``'s flags:
no SETXATTR_EXT, no SECURITY_CTX, no CREATE_SUPP_GROUP, hence no extensions behind a request's body.

The law: this is the path of every request, and an emulated guest is 10 to 20 times slower than its host.
So a parse is one precompiled ``struct`` and a plain tuple, in the order of the kernel's fields without its
padding; times are in ns. The kernel is trusted to send whole structures.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, cast

MAJOR: Final = 7
MINOR: Final = 41
"""What we speak (Linux 6.12); the smaller minor of the two sides counts."""
MINOR_LEAST: Final = 31
"""Linux 5.4. Older kernels lay out INIT, and more, differently."""

MAX_WRITE: Final = 1 << 20
"""Bytes in one WRITE or READ: 256 pages, the kernel's own limit (fs.fuse.max_pages_limit)."""
MAX_PAGES: Final = 256
BUFFER_BYTES: Final = MAX_WRITE + (64 << 10)
"""A whole request: the data, its headers and, with room to spare, the longest names and xattr values
(64 KiB, XATTR_SIZE_MAX, is the most of any request but WRITE)."""
MAX_BACKGROUND: Final = 64
"""READs ahead and other requests without a waiting process in flight at once; the kernel's default is 12."""

RESEND_BIT: Final = 1 << 63
"""FUSE_UNIQUE_RESEND: a request that a server before us has read. It must be in the reply as well."""


class Opcode(IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


NO_REPLY: Final = frozenset({int(Opcode.FORGET), int(Opcode.BATCH_FORGET), int(Opcode.INTERRUPT)})
"""Requests that must not be answered. (An INTERRUPT may be, with EAGAIN, to get it again.)"""


class Notify(IntEnum):
    """enum fuse_notify_code, those in use here."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    RESEND = 7


class Init(IntFlag):
    """The flags of INIT, as one number of 64 bits: ``flags`` and, above them, ``flags2``."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


WANTED: Final = int(
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.NO_OPEN_SUPPORT
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.HANDLE_KILLPRIV_V2
    | Init.INIT_EXT
    | Init.HAS_RESEND
)
"""Asked for on every connection, and taken where the kernel has it. Left out, with the reason:
WRITEBACK_CACHE ignores a size that changed remotely; AUTO_INVAL_DATA drops the cache at each write of our
own; ATOMIC_O_TRUNC loses the truncation where OPEN is not sent; DONT_MASK would leave the umask to us."""

WANTED_FOR_LOCKS: Final = int(Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
"""On top where locks are to reach the server; otherwise the kernel keeps them itself."""

# Flags inside of requests and replies.
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

IN_HEADER: Final = struct.Struct("<IIQQIII4x")
"""len, opcode, unique, nodeid, uid, gid, pid; then the length of extensions, always 0 here."""
OUT_HEADER: Final = struct.Struct("<IiQ")
"""len of all, -errno (or the code of a notification), unique (0 for a notification)."""


class Request:
    """One request. ``unique`` is without ``RESEND_BIT``, which is ``resent``; ``pid`` is the caller's TID,
    0 if it is not of our pid namespace. ``body`` is what follows the header, valid until the handler returns
    or awaits: the buffer is then read into again.
    """

    __slots__ = ("body", "gid", "nodeid", "opcode", "pid", "resent", "uid", "unique")

    def __init__(
        self,
        opcode: int,
        unique: int,
        nodeid: int,
        uid: int,
        gid: int,
        pid: int,
        body: memoryview,
        resent: bool = False,
    ) -> None:
        self.opcode = opcode
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.body = body
        self.resent = resent

    def __repr__(self) -> str:
        name = Opcode(self.opcode).name if self.opcode in _OPCODES else str(self.opcode)
        again = " resent" if self.resent else ""
        return f"<{name} unique={self.unique} node={self.nodeid} pid={self.pid} {len(self.body)} B{again}>"


_OPCODES = frozenset(map(int, Opcode))


def parse_request(message: memoryview) -> Request:
    """A whole message as it was read. Raises ``struct.error`` if it is shorter than a header."""
    _, opcode, unique, nodeid, uid, gid, pid = IN_HEADER.unpack_from(message)
    if unique < RESEND_BIT:
        return Request(opcode, unique, nodeid, uid, gid, pid, message[40:])
    return Request(opcode, unique - RESEND_BIT, nodeid, uid, gid, pid, message[40:], True)


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
_INIT = struct.Struct("<IIII")
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

_ENTRY = struct.Struct("<Q32x")
_ENTRY_VALID = struct.Struct("<QQQQII")
_ATTR_VALID = struct.Struct("<QI4x")
_OPEN_OUT = struct.Struct("<QI4x")
_STATFS_OUT = struct.Struct("<QQQQQIII28x")
_LK_OUT = struct.Struct("<QQII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_NOTIFY_INODE = struct.Struct("<IiQQqq")
_NOTIFY_ENTRY = struct.Struct("<IiQQII")


def entry_out(node: int, attr: bytes, entry_ns: int = 0, attr_ns: int = 0) -> bytes:
    """LOOKUP, SYMLINK, MKNOD, MKDIR, LINK: a node, its ``protocol.files.ATTR``, and for how long the name
    and the attributes may be used without asking (ns). Node 0: there is no such name."""
    if entry_ns or attr_ns:
        times = (entry_ns // _NS, attr_ns // _NS, entry_ns % _NS, attr_ns % _NS)
        return _ENTRY_VALID.pack(node, 0, *times) + attr
    return _ENTRY.pack(node) + attr


_ATTR_AT_ONCE_STALE = bytes(16)


def attr_out(attr: bytes, attr_ns: int = 0) -> bytes:
    """GETATTR, SETATTR."""
    if attr_ns:
        return _ATTR_VALID.pack(attr_ns // _NS, attr_ns % _NS) + attr
    return _ATTR_AT_ONCE_STALE + attr


def open_out(fh: int, flags: int = 0) -> bytes:
    """OPEN, OPENDIR: the handle, and FOPEN_* flags."""
    return _OPEN_OUT.pack(fh, flags)


def create_out(node: int, attr: bytes, fh: int, flags: int = 0) -> bytes:
    """CREATE, TMPFILE."""
    return entry_out(node, attr) + _OPEN_OUT.pack(fh, flags)


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


# --- INIT --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What a connection speaks: the minor version and the flags (``Init``) that both sides have."""

    minor: int
    flags: int


class Unsupported(Exception):
    """The kernel speaks a protocol that we do not."""


def parse_init(body: memoryview) -> tuple[int, int, int, int]:
    """INIT: major, minor, max_readahead (bytes), flags (64 bits)."""
    major, minor, readahead, flags = _INIT.unpack_from(body)
    if flags & Init.INIT_EXT and len(body) >= 20:
        flags |= _U32.unpack_from(body, 16)[0] << 32
    return major, minor, readahead, flags


def negotiate(major: int, minor: int, flags: int, wanted: int) -> Negotiated:
    """What to use of what the kernel offers. Raises ``Unsupported``."""
    if major != MAJOR or minor < MINOR_LEAST:
        raise Unsupported(f"the kernel speaks FUSE {major}.{minor}; {MAJOR}.{MINOR_LEAST} or newer is needed")
    return Negotiated(min(minor, MINOR), flags & wanted)


def init_out(negotiated: Negotiated) -> bytes:
    """INIT: the reply."""
    return _INIT_OUT.pack(
        MAJOR,
        negotiated.minor,
        MAX_WRITE,  # max_readahead; the smaller of this and the mount's read_ahead_kb counts
        negotiated.flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,  # congestion_threshold, in the proportion of the kernel's own 12 and 9
        MAX_WRITE,
        1,  # time_gran, ns
        MAX_PAGES,
        0,  # map_alignment
        negotiated.flags >> 32,
        0,  # max_stack_depth
        0,  # request_timeout: none, patience is the server's own
    )


# --- notifications -----------------------------------------------------------------------------------


def inval_inode(node: int, offset: int, length: int) -> bytes:
    """Forget a node's attributes and its data from ``offset`` on, ``length`` bytes, or all for 0. With an
    ``offset`` below 0 only the attributes."""
    return _NOTIFY_INODE.pack(_NOTIFY_INODE.size, Notify.INVAL_INODE, 0, node, offset, length)


def inval_entry(parent: int, name: bytes) -> bytes:
    """Forget what a name stands for (or that there is none)."""
    size = _NOTIFY_ENTRY.size + len(name) + 1
    return _NOTIFY_ENTRY.pack(size, Notify.INVAL_ENTRY, 0, parent, len(name), 0) + name + b"\0"


RESEND: Final = OUT_HEADER.pack(OUT_HEADER.size, Notify.RESEND, 0)
"""Send everything again that a server has read and not answered, with ``RESEND_BIT`` (Linux 6.9)."""
