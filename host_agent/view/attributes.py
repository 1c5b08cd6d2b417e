"""A file's attributes as they come from the guest, checked and owned by whom they are to be shown as."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from protocol.files import ATTR

_NS: Final = 1_000_000_000
_TYPES: Final = frozenset(
    {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
)
_MAX_SIZE: Final = (1 << 63) - 1
_INODES: Final = (1 << 64) - 1


class Owner(StrEnum):
    """Whose the guest's files are here."""

    ME = "me"
    GUEST = "guest"


class Attributes(NamedTuple):
    """Times in ns since the epoch."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)


def unpack(raw: bytes) -> Attributes:
    """Of ``ATTR``. Raises ``OSError`` (EIO) for what no file has."""
    if len(raw) != ATTR.size:
        raise OSError(errno.EIO, "not a file's attributes")
    (ino, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink, uid, gid, rdev,
     blksize, _) = ATTR.unpack(raw)  # fmt: skip
    if stat.S_IFMT(mode) not in _TYPES or mode >> 16 or size > _MAX_SIZE:
        raise OSError(errno.EIO, "not a file's attributes")
    return Attributes(
        ino, size, blocks, _time(atime, atime_ns), _time(mtime, mtime_ns), _time(ctime, ctime_ns), mode, nlink,
        uid, gid, rdev, blksize,
    )  # fmt: skip


def _time(seconds: int, ns: int) -> int:
    if seconds >= 1 << 63:  # before 1970
        seconds -= 1 << 64
    return seconds * _NS + min(ns, _NS - 1)


@dataclass(frozen=True, slots=True)
class Ownership:
    """How users of the guest are shown, and what chown(2) means."""

    owner: Owner
    uid: int
    gid: int

    @classmethod
    def of_this_process(cls, owner: Owner) -> Ownership:
        return cls(owner, os.geteuid(), os.getegid())

    def shown(self, uid: int, gid: int) -> tuple[int, int]:
        return (self.uid, self.gid) if self.owner is Owner.ME else (uid, gid)

    def meant(self, uid: int, gid: int) -> tuple[int, int] | None:
        """The guest's ids that the new owner has there, -1 for one that stays; None if all stays as it is.

        Raises EPERM: what is shown as mine cannot be anybody else's.
        """
        if self.owner is Owner.GUEST:
            return None if uid == gid == -1 else (uid, gid)
        if uid not in (-1, self.uid) or gid not in (-1, self.gid):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return None


def inode(place: int, ino: int) -> int:
    """The inode number here: places are devices of their own there, so two of their files may have the same. ``place``
    is the same for as long as the file is: git(1) reads all that have got another number."""
    return (ino ^ (place * 0x9E3779B97F4A7C15)) & _INODES or 1
