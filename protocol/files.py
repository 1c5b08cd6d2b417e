"""What the two sides of the files plane say to each other: a guest's FUSE server asks, the host's file server answers.

A ``FileCall`` is one filesystem operation with one result, or an errno (Linux numbers, as errno(3) names
them). On the wire it is a CALL frame: the number of the operation, the fields of the dataclass, and raw
bytes as the payload where an operation has any. Three numbers begin each call: ``share`` (which mount),
``unique`` (the FUSE request it serves; 0 for none) and ``node``.

The laws:
- The host hands out nodes: positive numbers that are never reused for another file while the guest's
  kernel runs. 1 is the root of a share. A node that the host cannot find any more is ESTALE.
- Names are single components of 1 to 255 bytes, any but ``.``, ``..``, ``/`` and NUL. The host checks.
- An ``Entry`` that was sent counts one lookup of its node; ``Forget`` gives lookups back.
- A call of a kind that changes something is done once for each ``unique``, however often it is sent
  (a restarted agent on either side asks again): the same question gets the same answer.
- Fields are only appended, with a default, as everywhere in this package.

Attributes travel as ``bytes`` in the layout of the kernel's ``struct fuse_attr`` (``ATTR``), little-endian:
a guest in emulation passes them on without looking at them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, Generic, TypeVar

from protocol.api import Done, Notice, Request

ResultT = TypeVar("ResultT")

ROOT: Final = 1
"""The node of a share's root."""

MAX_NAME: Final = 255
"""Bytes of one component (NAME_MAX)."""

MAX_DATA: Final = 1 << 20
"""Bytes that one ``Read`` or ``Write`` moves: FUSE's max_write, 256 pages."""

MAX_FILES_PAYLOAD: Final = MAX_DATA
"""The largest payload of a frame on the files plane; a listing comes in several pieces."""

ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime (seconds), atimensec, mtimensec, ctimensec, mode, nlink, uid, gid,
rdev, blksize, flags: ``struct fuse_attr`` of include/uapi/linux/fuse.h, 88 bytes."""

DIRENT: Final = struct.Struct("<QQII")
"""ino, off, namelen, type: ``struct fuse_dirent``; the name follows, padded with NULs to 8 bytes."""


class FileCall(Generic[ResultT]):
    """A filesystem operation. ``CHANGES``: it is done once for each ``unique``."""

    __slots__ = ()
    OP: ClassVar[int]
    RESULT: ClassVar[type]
    CHANGES: ClassVar[bool] = False


# --- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attributes:
    """``attr`` as ``ATTR``. ``stale``: the file's data is not what this guest was last given; drop it."""

    attr: bytes
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A name that exists, and one lookup of its node."""

    node: int
    attr: bytes
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes: a symlink's target, an xattr's value, the NUL-terminated names of xattrs."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """``size`` bytes were taken. ``offset`` is where they went: not where the guest thought, for an append
    to a file that somebody else has made longer. ``attr`` is of the file afterwards."""

    size: int
    offset: int
    attr: bytes


@dataclass(frozen=True, slots=True)
class Position:
    offset: int


@dataclass(frozen=True, slots=True)
class Listing:
    """A piece of a directory. The payload is ``dirents`` bytes of ``DIRENT`` records, then, if attributes
    were asked for, one ``ATTR`` per record in the same order (all zero for a name that went meanwhile).

    Records are in the order of their ``off``, which is a hash of the name: a position stays right while
    names come and go. ``end``: nothing follows. ``.`` and ``..`` are not in it.
    """

    dirents: int
    end: bool


@dataclass(frozen=True, slots=True)
class FilesystemSize:
    """statfs(2): blocks of ``frsize`` bytes, and inodes."""

    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A handle for locks; valid until ``Release``."""

    handle: int


@dataclass(frozen=True, slots=True)
class LockState:
    """What stands in the way of a lock: ``kind`` F_UNLCK if nothing does. ``pid`` is 0 for a host process."""

    kind: int
    start: int
    end: int
    pid: int


# --- names -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lookup(FileCall[Entry]):
    """``node`` is the directory, here and in all calls that take a ``name``."""

    OP: ClassVar[int] = 1
    RESULT: ClassVar[type] = Entry

    share: int
    unique: int
    node: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Forget(FileCall[Done]):
    """Give ``counts[i]`` lookups of ``nodes[i]`` back. ``node`` is not used (0)."""

    OP: ClassVar[int] = 2
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    nodes: list[int]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class MakeNode(FileCall[Entry]):
    """mknod(2) of a regular file, FIFO or socket; devices are EPERM. ``mode`` has the type, and the umask applied."""

    OP: ClassVar[int] = 3
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class MakeDirectory(FileCall[Entry]):
    OP: ClassVar[int] = 4
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class MakeSymlink(FileCall[Entry]):
    OP: ClassVar[int] = 5
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class MakeLink(FileCall[Entry]):
    """A hard link to ``node``, as ``name`` in the directory ``parent``."""

    OP: ClassVar[int] = 6
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Create(FileCall[Entry]):
    """Make and open a regular file. It stays writable to this guest even if ``mode`` says otherwise (open(2)).

    ``flags`` are open(2)'s; without O_EXCL an existing file is taken as it is.
    """

    OP: ClassVar[int] = 7
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    mode: int
    flags: int


@dataclass(frozen=True, slots=True)
class CreateUnnamed(FileCall[Entry]):
    """O_TMPFILE: a file without a name in the directory ``node``; ``MakeLink`` may give it one."""

    OP: ClassVar[int] = 8
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    mode: int
    flags: int


@dataclass(frozen=True, slots=True)
class Unlink(FileCall[Done]):
    OP: ClassVar[int] = 9
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes


@dataclass(frozen=True, slots=True)
class RemoveDirectory(FileCall[Done]):
    OP: ClassVar[int] = 10
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Rename(FileCall[Done]):
    """renameat2(2); ``flags`` 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2), else EINVAL."""

    OP: ClassVar[int] = 11
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    parent: int
    new_name: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ReadLink(FileCall[Content]):
    OP: ClassVar[int] = 12
    RESULT: ClassVar[type] = Content

    share: int
    unique: int
    node: int


@dataclass(frozen=True, slots=True)
class List(FileCall[Listing]):
    """The directory ``node``, from the first name whose ``off`` is greater than ``after`` (0: the start).

    The pieces asked for with one ``handle`` (any number of the guest's, of one directory stream) belong to
    the directory as it was when ``after`` was 0, unless the host has forgotten it, which is never an error.
    """

    OP: ClassVar[int] = 13
    RESULT: ClassVar[type] = Listing

    share: int
    unique: int
    node: int
    handle: int
    after: int
    attributes: bool = False


# --- attributes ------------------------------------------------------------------------------------

SET_MODE: Final = 1 << 0
SET_UID: Final = 1 << 1
SET_GID: Final = 1 << 2
SET_SIZE: Final = 1 << 3
SET_ATIME: Final = 1 << 4
SET_MTIME: Final = 1 << 5
SET_ATIME_NOW: Final = 1 << 7
SET_MTIME_NOW: Final = 1 << 8
KILL_PRIVILEGE: Final = 1 << 11
"""The bits of ``SetAttributes.valid``, numbered as the kernel's FATTR_*; others are ignored."""


@dataclass(frozen=True, slots=True)
class GetAttributes(FileCall[Attributes]):
    OP: ClassVar[int] = 20
    RESULT: ClassVar[type] = Attributes

    share: int
    unique: int
    node: int


@dataclass(frozen=True, slots=True)
class SetAttributes(FileCall[Attributes]):
    """Change what ``valid`` names. Times in ns since the epoch, ``size`` in bytes. With KILL_PRIVILEGE
    setuid and setgid are dropped as well."""

    OP: ClassVar[int] = 21
    RESULT: ClassVar[type] = Attributes
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    valid: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class GetXattr(FileCall[Content]):
    """Only ``user.*`` is passed on; other names are ENODATA, and EOPNOTSUPP to set."""

    OP: ClassVar[int] = 22
    RESULT: ClassVar[type] = Content

    share: int
    unique: int
    node: int
    name: bytes


@dataclass(frozen=True, slots=True)
class SetXattr(FileCall[Done]):
    """``flags``: XATTR_CREATE (1), XATTR_REPLACE (2) or 0."""

    OP: ClassVar[int] = 23
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    value: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ListXattr(FileCall[Content]):
    OP: ClassVar[int] = 24
    RESULT: ClassVar[type] = Content

    share: int
    unique: int
    node: int


@dataclass(frozen=True, slots=True)
class RemoveXattr(FileCall[Done]):
    OP: ClassVar[int] = 25
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes


@dataclass(frozen=True, slots=True)
class GetFilesystemSize(FileCall[FilesystemSize]):
    OP: ClassVar[int] = 26
    RESULT: ClassVar[type] = FilesystemSize

    share: int
    unique: int
    node: int


# --- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read(FileCall[Done]):
    """Up to ``size`` bytes at ``offset``, as the payload; fewer at the end of the file."""

    OP: ClassVar[int] = 30
    RESULT: ClassVar[type] = Done

    share: int
    unique: int
    node: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Write(FileCall[Written]):
    """The payload to ``offset``; with ``append`` to the end of the file, wherever that is now."""

    OP: ClassVar[int] = 31
    RESULT: ClassVar[type] = Written
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    offset: int
    append: bool = False
    kill_privilege: bool = False


@dataclass(frozen=True, slots=True)
class Allocate(FileCall[Attributes]):
    """fallocate(2), its ``mode``."""

    OP: ClassVar[int] = 32
    RESULT: ClassVar[type] = Attributes
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    mode: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Seek(FileCall[Position]):
    """lseek(2) with SEEK_DATA (3) or SEEK_HOLE (4)."""

    OP: ClassVar[int] = 33
    RESULT: ClassVar[type] = Position

    share: int
    unique: int
    node: int
    offset: int
    whence: int


@dataclass(frozen=True, slots=True)
class CopyRange(FileCall[Written]):
    """copy_file_range(2) from ``node`` to ``to_node`` of the same share; may copy less than ``length``."""

    OP: ClassVar[int] = 34
    RESULT: ClassVar[type] = Written
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    offset: int
    to_node: int
    to_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Sync(FileCall[Done]):
    """fsync(2) of a file or directory on the host; fdatasync(2) with ``data_only``."""

    OP: ClassVar[int] = 35
    RESULT: ClassVar[type] = Done

    share: int
    unique: int
    node: int
    data_only: bool = False


@dataclass(frozen=True, slots=True)
class Flushed(FileCall[Done]):
    """A descriptor through which ``node`` was written has been closed in the guest.

    The host closes its own soon: who watches the file there waits for that, and until then exec(2) is
    refused (ETXTBSY).
    """

    OP: ClassVar[int] = 36
    RESULT: ClassVar[type] = Done

    share: int
    unique: int
    node: int


# --- locks that reach the host -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenForLocks(FileCall[Opened]):
    """An open file of the guest's whose locks are the host's. ``flags`` are open(2)'s access mode."""

    OP: ClassVar[int] = 40
    RESULT: ClassVar[type] = Opened
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    flags: int


@dataclass(frozen=True, slots=True)
class Release(FileCall[Done]):
    """The last descriptor of ``handle`` is gone, and so are its flock(2) and, of ``owner``, its fcntl(2) locks."""

    OP: ClassVar[int] = 41
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    handle: int
    owner: int


@dataclass(frozen=True, slots=True)
class ReleaseOwner(FileCall[Done]):
    """A process (``owner``) closed a descriptor of the file: its fcntl(2) locks on it are gone."""

    OP: ClassVar[int] = 42
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    handle: int
    owner: int


@dataclass(frozen=True, slots=True)
class TestLock(FileCall[LockState]):
    """fcntl(F_GETLK). ``kind`` F_RDLCK (0) or F_WRLCK (1); ``end`` is inclusive, 2^63-1 for the end of the file."""

    OP: ClassVar[int] = 43
    RESULT: ClassVar[type] = LockState

    share: int
    unique: int
    node: int
    handle: int
    owner: int
    start: int
    end: int
    kind: int


@dataclass(frozen=True, slots=True)
class SetLock(FileCall[Done]):
    """fcntl(F_SETLK), or with ``whole`` flock(2): never waits, EAGAIN if another holds it.

    ``kind`` may also be F_UNLCK (2).
    """

    OP: ClassVar[int] = 44
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    handle: int
    owner: int
    start: int
    end: int
    kind: int
    whole: bool = False


_CALLS: Final = (
    Lookup, Forget, MakeNode, MakeDirectory, MakeSymlink, MakeLink, Create, CreateUnnamed, Unlink, RemoveDirectory,
    Rename, ReadLink, List, GetAttributes, SetAttributes, GetXattr, SetXattr, ListXattr, RemoveXattr,
    GetFilesystemSize, Read, Write, Allocate, Seek, CopyRange, Sync, Flushed, OpenForLocks, Release, ReleaseOwner,
    TestLock, SetLock,
)  # fmt: skip
CALLS: Final[dict[int, type[FileCall[Any]]]] = {call.OP: call for call in _CALLS}
"""Every operation by its number."""


# --- host -> guest ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NamesGone(Notice):
    """Files were deleted on the host that the guest's kernel still has names for: it is to drop ``names[i]`` of the
    directory ``parents[i]``. Whoever has such a file open keeps it; if nobody has, it is forgotten, and
    the host can give its space back."""

    TOPIC: ClassVar[str] = "names-gone"

    share: int
    parents: list[int]
    names: list[bytes]


# --- mounting: ordinary requests, host -> guest ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of the host's, and where it is in the guest.

    ``id`` names it in calls and is the same for the same guest path. ``path`` is absolute, in the guest.
    """

    id: int
    path: str
    read_only: bool = False
    host_locks: bool = False


class MountStage(StrEnum):
    MOUNTED = "mounted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class MountReport:
    """What the guest made of one share; ``reason`` is a sentence if it failed."""

    share: int
    stage: MountStage
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MountReports:
    """``clock_ns``: the guest's wall clock, so that the host can tell by how much it is off."""

    reports: list[MountReport]
    clock_ns: int = 0


@dataclass(frozen=True, slots=True)
class MountShares(Request[MountReports]):
    """Exactly these shares are to be mounted, in this order; others are unmounted.

    The host sends it at the start of each session and whenever the list changes. The guest sends no call
    in a session before it has had this.
    """

    METHOD: ClassVar[str] = "mount-shares"
    REPLY: ClassVar[type] = MountReports

    shares: list[Share] = field(default_factory=list)
