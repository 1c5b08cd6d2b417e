"""The FUSE kernel ABI: the framing of what is read from /dev/fuse and written to it, INIT, and notifications. Pure.

What each operation asks and is answered is in ``bodies``.

Source: include/uapi/linux/fuse.h, protocol 7.31 (Linux 5.4) to 7.45 (Linux 6.18), for little-endian
machines. Requests are parsed as laid out by a kernel that was answered with ``negotiate``'s flags:
no SETXATTR_EXT, no SECURITY_CTX, no CREATE_SUPP_GROUP, hence no extensions behind a request's body.

The law: this is the path of every request, and an emulated guest is 10 to 20 times slower than its host.
So a parse is one precompiled ``struct``. The kernel is trusted to send whole structures.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from protocol.bulk import Run

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
    | Init.DO_READDIRPLUS
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.NO_OPENDIR_SUPPORT
    | Init.HANDLE_KILLPRIV_V2
    | Init.INIT_EXT
    | Init.HAS_RESEND
)
"""Asked for on every connection, and taken where the kernel has it. Left out, with the reason:
WRITEBACK_CACHE ignores a size that changed remotely; AUTO_INVAL_DATA drops the cache at each write of our
own; ATOMIC_O_TRUNC loses the truncation where OPEN is not sent; DONT_MASK would leave the umask to us."""

WANTED_FOR_LOCKS: Final = int(Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
"""On top where locks are to reach the server; otherwise the kernel keeps them itself."""

IN_HEADER: Final = struct.Struct("<IIQQIII4x")
"""len, opcode, unique, nodeid, uid, gid, pid; then the length of extensions, always 0 here."""
OUT_HEADER: Final = struct.Struct("<IiQ")
"""len of all, -errno (or the code of a notification), unique (0 for a notification)."""


class Request:
    """One request. ``unique`` is without ``RESEND_BIT``, which is ``resent``; ``pid`` is the caller's TID,
    0 if it is not of our pid namespace. ``body`` is what follows the header, valid until the handler returns
    or awaits: the buffer is then read into again.
    """

    __slots__ = ("body", "gid", "nodeid", "opcode", "pid", "resent", "run", "uid", "unique")

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
        self.run: Run | None = None
        """The data of a WRITE, if it lies in memory that the host reads (``landing``); else it is in ``body``."""

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


# --- INIT --------------------------------------------------------------------------------------------

_INIT = struct.Struct("<IIII")
_U32 = struct.Struct("<I")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")


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

_NOTIFY_INODE = struct.Struct("<IiQQqq")
_NOTIFY_ENTRY = struct.Struct("<IiQQII")


def inval_inode(node: int, offset: int, length: int) -> bytes:
    """Forget a node's attributes and its data from ``offset`` on, ``length`` bytes, or all for 0. With an
    ``offset`` below 0 only the attributes."""
    return _NOTIFY_INODE.pack(_NOTIFY_INODE.size, Notify.INVAL_INODE, 0, node, offset, length)


_EXPIRE_ONLY: Final = 1


def inval_entry(parent: int, name: bytes, *, expire: bool = False) -> bytes:
    """Forget what a name stands for (or that there is none), and what is mounted there. With ``expire`` only ask for it
    when it is used next (FUSE_EXPIRE_ONLY, Linux 6.2; before that the same as without)."""
    size = _NOTIFY_ENTRY.size + len(name) + 1
    flags = _EXPIRE_ONLY if expire else 0
    return _NOTIFY_ENTRY.pack(size, Notify.INVAL_ENTRY, 0, parent, len(name), flags) + name + b"\0"


RESEND: Final = OUT_HEADER.pack(OUT_HEADER.size, Notify.RESEND, 0)
"""Send everything again that a server has read and not answered, with ``RESEND_BIT`` (Linux 6.9)."""
