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
- A *promise* (AFS's callback) is the host's word that the guest may keep what it was given, for as long as the session
  lasts: ``Changed`` says what is not so any more. Answers and notices are in one order on the link. A result that says
  nothing of a promise makes none, and a new one is the host's whole word on that name or file from then on.

Attributes travel as ``bytes`` in the layout of the kernel's ``struct fuse_attr`` (``ATTR``), little-endian:
a guest in emulation passes them on without looking at them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, ClassVar, Final, Generic, TypeVar

from protocol.api import Done, Notice, Request
from protocol.codec import record

ResultT = TypeVar("ResultT")

ROOT: Final = 1
"""The node of a share's root."""

MAX_ID: Final = 2**32 - 2
"""Of a user or a group: the one above is (uid_t)-1, which stands for none."""

MAX_NAME: Final = 255
"""Bytes of one component (NAME_MAX)."""

MAX_DATA: Final = 1 << 20
"""Bytes that one ``Read`` or ``Write`` moves: FUSE's max_write, 256 pages."""

MAX_CONTENT: Final = 128 << 10
"""Bytes of a file that is read before anybody has asked for it."""

MAX_MANY: Final = 512
"""Files of one ``ReadMany`` or ``ListXattr``."""

MAX_FILES_PAYLOAD: Final = MAX_DATA
"""The largest payload of a frame on the files plane; a listing comes in several pieces."""

ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime (seconds), atimensec, mtimensec, ctimensec, mode, nlink, uid, gid,
rdev, blksize, flags: ``struct fuse_attr`` of include/uapi/linux/fuse.h, 88 bytes."""

DIRENT: Final = struct.Struct("<QQII")
"""ino, off, namelen, type: ``struct fuse_dirent``; the name follows, padded with NULs to 8 bytes."""

ENTRY: Final = struct.Struct("<QQQQII")
"""nodeid, generation, entry_valid, attr_valid (seconds), entry_valid_nsec, attr_valid_nsec: the head of
``struct fuse_entry_out``, before its ``ATTR``. An ``ENTRY``, an ``ATTR`` and a ``DIRENT`` with its name are a
``struct fuse_direntplus``."""

FOREVER: Final = 1 << 40
"""Seconds for which a kernel may keep what was promised: more than its clock can count, which it allows for."""

NAME: Final = 1
"""Of a ``promise``: the name stands for this node, or for nothing; of a ``Listing``: these are all the names."""

ATTRIBUTES: Final = 2
"""Of a ``promise``: the attributes hold, and if it is a file so does its data."""


EMPTY: Final = 8
"""Of a ``promise``, of a directory that was just made: there is no name in it."""

_POSITIONS: Final = (1 << 62) - 1


def position(name: bytes) -> int:
    """The ``off`` of a name: greater than 0, and fits the 63 bits of off_t. Names of one hash get positions that follow
    each other, the lesser name first."""
    return (int.from_bytes(blake2b(name, digest_size=8).digest(), "little") & _POSITIONS) or 1


class FileCall(Generic[ResultT]):
    """A filesystem operation. ``CHANGES``: it is done once for each ``unique``."""

    __slots__ = ()
    OP: ClassVar[int]
    RESULT: ClassVar[type]
    CHANGES: ClassVar[bool] = False


# --- results ---------------------------------------------------------------------------------------


@record
class Attributes:
    """``attr`` as ``ATTR``. ``stale``: the file's data is not what this guest was last given; drop it."""

    attr: bytes
    stale: bool = False
    promise: int = 0


@record
class Entry:
    """A name that exists, and one lookup of its node. ``node`` 0, of a ``Lookup``: there is no such name, and that is
    promised; without a promise it is ENOENT. ``above``: the attributes of the directory in which it was just made, if
    they are promised."""

    node: int
    attr: bytes
    stale: bool = False
    promise: int = 0
    above: bytes = b""


@record
class Removed:
    """``above``: the attributes of the directory in which the name was, if they are promised. ``promise``: ``NAME`` if
    there is no such name now. ``node``: the file that had it, the only one whose attributes have changed with that; 0:
    it is not known which."""

    above: bytes = b""
    promise: int = 0
    node: int = 0


@record
class Content:
    """Bytes: a symlink's target, an xattr's value, the NUL-terminated names of xattrs."""

    data: bytes


@record
class XattrNames:
    """``data``: the names, each with a NUL behind it. ``promise``: ``ATTRIBUTES`` if they hold as attributes do.
    ``bare``: those of the others that have none, which is promised in the same way."""

    data: bytes
    promise: int = 0
    bare: list[int] = field(default_factory=list)


@record
class Written:
    """``size`` bytes were taken. ``offset`` is where they went: not where the guest thought, for an append
    to a file that somebody else has made longer. ``attr`` is of the file afterwards. ``room``: bytes that the guest may
    answer for before they are here (``Write.ahead``), since there is space for them; 0: none."""

    size: int
    offset: int
    attr: bytes
    room: int = 0


@record
class Contents:
    """Whole files, one after the other in the payload. ``sizes[i]`` are the bytes of the i-th, which are promised
    (``ATTRIBUTES``); if it is negative, that file is not given, and the next one begins ``~sizes[i]`` bytes on."""

    sizes: list[int]


@record
class Position:
    offset: int


@record
class Listing:
    """A piece of a directory. The payload is ``dirents`` bytes of ``DIRENT`` records, then, if attributes
    were asked for, one ``ATTR`` per record in the same order (all zero for a name that went meanwhile).

    Records are in the order of their ``off``, which is a hash of the name: a position stays right while
    names come and go. ``end``: nothing follows. ``.`` and ``..`` are not in it.

    The promise is of the whole directory, of which all pieces up to this one are part. ``count``: the number of
    records (of ``ListEntries``).
    """

    dirents: int
    end: bool
    promise: int = 0
    count: int = 0


@record
class Renamed:
    """``node`` has the new name now (0: it is not known to the guest). ``promise``: ``NAME`` of the new name, with
    RENAME_EXCHANGE of both; ``ATTRIBUTES`` of ``attr``, those of a file afterwards. ``files``: neither it nor what had
    the new name before is a directory. ``replaced`` had the new name before, ``node`` itself if nothing had; 0: it is
    not known which. Within one directory the new name is promised together with ``gone``, that there is no such name
    as the old one, and ``above``, the directory's attributes."""

    node: int = 0
    promise: int = 0
    files: bool = False
    attr: bytes = b""
    replaced: int = 0
    gone: bool = False
    above: bytes = b""


@record
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


@record
class Opened:
    """A handle for locks; valid until ``Release``."""

    handle: int


@record
class LockState:
    """What stands in the way of a lock: ``kind`` F_UNLCK if nothing does. ``pid`` is 0 for a host process."""

    kind: int
    start: int
    end: int
    pid: int


# --- names -----------------------------------------------------------------------------------------


@record
class Lookup(FileCall[Entry]):
    """``node`` is the directory, here and in all calls that take a ``name``."""

    OP: ClassVar[int] = 1
    RESULT: ClassVar[type] = Entry

    share: int
    unique: int
    node: int
    name: bytes


@record
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


@record
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


@record
class MakeDirectory(FileCall[Entry]):
    OP: ClassVar[int] = 4
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    mode: int


@record
class MakeSymlink(FileCall[Entry]):
    OP: ClassVar[int] = 5
    RESULT: ClassVar[type] = Entry
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    target: bytes


@record
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


@record
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


@record
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


@record
class Unlink(FileCall[Removed]):
    OP: ClassVar[int] = 9
    RESULT: ClassVar[type] = Removed
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes


@record
class RemoveDirectory(FileCall[Removed]):
    OP: ClassVar[int] = 10
    RESULT: ClassVar[type] = Removed
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes


@record
class Rename(FileCall[Renamed]):
    """renameat2(2); ``flags`` 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2), else EINVAL."""

    OP: ClassVar[int] = 11
    RESULT: ClassVar[type] = Renamed
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes
    parent: int
    new_name: bytes
    flags: int = 0


@record
class ReadLink(FileCall[Content]):
    OP: ClassVar[int] = 12
    RESULT: ClassVar[type] = Content

    share: int
    unique: int
    node: int


@record
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


@record
class ListEntries(FileCall[Listing]):
    """As ``List``, with a node for each name. The payload is ``dirents`` bytes of ``struct fuse_direntplus`` as the
    guest's kernel takes them, then four arrays with an item for each of the ``count`` records: where the record begins
    (u32), its ``off`` (u64), its nodeid (u64) and its type (u8, DT_*), little-endian, without padding.

    A record has a nodeid if its name and its attributes are promised, for ever, and no data that the guest may hold is
    stale; it counts one lookup. Else all of it but the ``DIRENT`` is zeros: what the name stands for must be asked.
    No piece but the last may be without records. ``bare``: only what may be a directory has a nodeid.
    """

    OP: ClassVar[int] = 14
    RESULT: ClassVar[type] = Listing

    share: int
    unique: int
    node: int
    after: int
    bare: bool = False


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


@record
class GetAttributes(FileCall[Attributes]):
    OP: ClassVar[int] = 20
    RESULT: ClassVar[type] = Attributes

    share: int
    unique: int
    node: int


@record
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


@record
class GetXattr(FileCall[Content]):
    """Only ``user.*`` is passed on; other names are ENODATA, and EOPNOTSUPP to set."""

    OP: ClassVar[int] = 22
    RESULT: ClassVar[type] = Content

    share: int
    unique: int
    node: int
    name: bytes


@record
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


@record
class ListXattr(FileCall[XattrNames]):
    """``others`` are nodes that may be asked about next, at most ``MAX_MANY``."""

    OP: ClassVar[int] = 24
    RESULT: ClassVar[type] = XattrNames

    share: int
    unique: int
    node: int
    others: list[int] = field(default_factory=list)


@record
class RemoveXattr(FileCall[Done]):
    OP: ClassVar[int] = 25
    RESULT: ClassVar[type] = Done
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    name: bytes


@record
class GetFilesystemSize(FileCall[FilesystemSize]):
    OP: ClassVar[int] = 26
    RESULT: ClassVar[type] = FilesystemSize

    share: int
    unique: int
    node: int


# --- data ------------------------------------------------------------------------------------------


@record
class Read(FileCall[Done]):
    """Up to ``size`` bytes at ``offset``, as the payload; fewer at the end of the file."""

    OP: ClassVar[int] = 30
    RESULT: ClassVar[type] = Done

    share: int
    unique: int
    node: int
    offset: int
    size: int


@record
class ReadMany(FileCall[Contents]):
    """The content of ``nodes`` as far as they are regular files that may be promised, have at most ``MAX_CONTENT``
    bytes, and ``most`` bytes together. ``node`` is a directory in which the guest has found some of them."""

    OP: ClassVar[int] = 37
    RESULT: ClassVar[type] = Contents

    share: int
    unique: int
    node: int
    nodes: list[int]
    most: int


@record
class Write(FileCall[Written]):
    """The payload to ``offset``; with ``append`` to the end of the file, wherever that is now.

    ``ahead``: the guest has answered for it already. Whatever comes behind it of the same share and could tell is done
    after it, and so is what comes behind that.
    """

    OP: ClassVar[int] = 31
    RESULT: ClassVar[type] = Written
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    offset: int
    append: bool = False
    kill_privilege: bool = False
    ahead: bool = False


@record
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


@record
class Seek(FileCall[Position]):
    """lseek(2) with SEEK_DATA (3) or SEEK_HOLE (4)."""

    OP: ClassVar[int] = 33
    RESULT: ClassVar[type] = Position

    share: int
    unique: int
    node: int
    offset: int
    whence: int


@record
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


@record
class Sync(FileCall[Done]):
    """fsync(2) of a file or directory on the host; fdatasync(2) with ``data_only``."""

    OP: ClassVar[int] = 35
    RESULT: ClassVar[type] = Done

    share: int
    unique: int
    node: int
    data_only: bool = False


# --- locks that reach the host -----------------------------------------------------------------------


@record
class OpenForLocks(FileCall[Opened]):
    """An open file of the guest's whose locks are the host's. ``flags`` are open(2)'s access mode."""

    OP: ClassVar[int] = 40
    RESULT: ClassVar[type] = Opened
    CHANGES: ClassVar[bool] = True

    share: int
    unique: int
    node: int
    flags: int


@record
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


@record
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


@record
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


@record
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
    Rename, ReadLink, List, ListEntries, GetAttributes, SetAttributes, GetXattr, SetXattr, ListXattr, RemoveXattr,
    GetFilesystemSize, Read, ReadMany, Write, Allocate, Seek, CopyRange, Sync, OpenForLocks, Release,
    ReleaseOwner, TestLock, SetLock,
)  # fmt: skip
CALLS: Final[dict[int, type[FileCall[Any]]]] = {call.OP: call for call in _CALLS}
"""Every operation by its number."""


# --- host -> guest ---------------------------------------------------------------------------------


@record
class NamesGone(Notice):
    """Files were deleted on the host that the guest's kernel still has names for: it is to drop ``names[i]`` of the
    directory ``parents[i]``. Whoever has such a file open keeps it; if nobody has, it is forgotten, and
    the host can give its space back."""

    TOPIC: ClassVar[str] = "names-gone"

    share: int
    parents: list[int]
    names: list[bytes]


@record
class Changed(Notice):
    """What was promised does not hold any more; what was never promised may be in it too.

    ``names[i]`` of the directory ``parents[i]`` is something else now, or nothing, or new. ``fresh[i]``: the guest was
    given no node for that name, so it can have kept no more than that there was none. Of ``nodes[i]`` the
    attributes and the data have changed; ``through[i]`` is a directory that has it (0: none is known). Of
    ``directories[i]`` the attributes and the list of names have changed; ``above[i]`` is the directory that has it (0:
    none is known). Of ``attributes_only`` nothing but the attributes.
    """

    TOPIC: ClassVar[str] = "changed"

    share: int
    parents: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    through: list[int] = field(default_factory=list)
    directories: list[int] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    attributes_only: list[int] = field(default_factory=list)


@record
class Renewed(Notice):
    """How something is that has just ``Changed``, for a guest that will ask; promised, all of it.

    ``nodes[i]`` has the attributes ``attributes[i]``. ``names[i]`` of the directory ``parents[i]`` is ``entries[i]``,
    one of ``nodes``, which counts a lookup. ``contents[i]`` is all that the regular file ``files[i]`` has.
    """

    TOPIC: ClassVar[str] = "renewed"

    share: int
    nodes: list[int] = field(default_factory=list)
    attributes: list[bytes] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)


# --- mounting: ordinary requests, host -> guest ------------------------------------------------------


@record
class Share:
    """A folder of the host's, and where it is in the guest.

    ``id`` names it in calls and is the same for the same guest path. ``path`` is absolute, in the guest.
    """

    id: int
    path: str
    read_only: bool = False
    host_locks: bool = False


_IN_USE: Final = "in-use="


def in_use(shares: Iterable[int]) -> str:
    """A capability, for the guest's greeting: of these shares it has mounts, or calls that are not answered. Of any
    other its kernel knows no node, and was promised nothing."""
    return _IN_USE + ",".join(f"{share:x}" for share in sorted(shares))


def shares_in_use(capabilities: Iterable[str]) -> frozenset[int] | None:
    """What a greeting says; None if it does not."""
    for capability in capabilities:
        if capability.startswith(_IN_USE):
            try:
                return frozenset(
                    int(word, 16) for word in capability.removeprefix(_IN_USE).split(",") if word
                )
            except ValueError:
                return None
    return None


_OWNER: Final = "owner="


def owner(uid: int, gid: int) -> str:
    """A capability, for the greeting of a guest whose users are not the host's: who uses the files there."""
    return f"{_OWNER}{uid}:{gid}"


def owner_of(capabilities: Iterable[str]) -> tuple[int, int] | None:
    """User and group, as a greeting says; None if it does not, or says what no ids are."""
    for capability in capabilities:
        if capability.startswith(_OWNER):
            ids = capability.removeprefix(_OWNER).split(":")
            if len(ids) == 2 and all(each.isascii() and each.isdecimal() and len(each) <= 10 for each in ids):
                uid, gid = int(ids[0]), int(ids[1])
                return (uid, gid) if max(uid, gid) <= MAX_ID else None
    return None


class MountStage(StrEnum):
    MOUNTED = "mounted"
    FAILED = "failed"


@record
class MountReport:
    """What the guest made of one share; ``reason`` is a sentence if it failed."""

    share: int
    stage: MountStage
    reason: str = ""


@record
class MountReports:
    """``clock_ns``: the guest's wall clock, so that the host can tell by how much it is off."""

    reports: list[MountReport]
    clock_ns: int = 0


@record
class MountShares(Request[MountReports]):
    """Exactly these shares are to be mounted, in this order; others are unmounted.

    The host sends it at the start of each session and whenever the list changes. The guest sends no call
    in a session before it has had this.
    """

    METHOD: ClassVar[str] = "mount-shares"
    REPLY: ClassVar[type] = MountReports

    shares: list[Share] = field(default_factory=list)
