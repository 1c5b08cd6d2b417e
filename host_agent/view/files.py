"""The view's operations: what libfuse asks for by path, asked of the guest by number.

Knows neither FUSE nor links. For one thread, that which serves. The laws:
- Every operation returns or raises ``OSError``, in the time that ``Asker`` gives it.
- Nothing is followed here: a path is walked name by name in the guest, which never leaves the place, and a symlink is
  shown so that it leads nowhere else (``symlinks``).
- What the guest answers is checked before it is passed on: names, attributes, lengths.
- What we change ourselves is seen at once; what others change when the kernel asks again, 1 s after it asked.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Final
from zlib import crc32

from host_agent.view.attributes import Attributes, Ownership, inode
from host_agent.view.data import OpenFiles, checked
from host_agent.view.directories import OpenDirectories
from host_agent.view.lookups import Key
from host_agent.view.reach import Asker, Reach, failure
from host_agent.view.symlinks import MAX_TARGET, shown, shown_in
from host_agent.view.tree import Directory, Place
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
    FilesystemSize,
    GetFilesystemSize,
    GetXattr,
    ListXattr,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    ReadLink,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    SetXattr,
    Unlink,
)

MAX_XATTR: Final = 65_536
"""Bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX)."""

NOW: Final = -1
OMIT: Final = -2
"""Of a time to be set."""

HOME: Final = b"home"
"""Below it are homes, where they are in the guest."""

MACHINE: Final = b"machine"
"""The root of a machine that is attached."""

_USER: Final = b"user."


class Files:
    """One mounted view: what is asked by path. ``data`` and ``directories``: what is asked of what is open."""

    def __init__(
        self, asker: Asker, ownership: Ownership, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._reach = Reach(asker, ownership, clock)
        self._born = time.time_ns()
        self.data = OpenFiles(self._reach, clock)
        self.directories = OpenDirectories(self._reach)

    # --- attributes ----------------------------------------------------------------------------------

    def getattr(self, path: bytes, handle: int | None = None) -> Attributes:
        if (file := self.data.find(handle)) is not None:
            node = self.data.node_of(file)
            return self._reach.shown(file.place, self._reach.attributes(file.place, node))
        try:
            return self._of_path(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        # Asked of a server that has a successor by now, with other numbers. The kernel does not look a second time.
        return self._of_path(path)

    def _of_path(self, path: bytes) -> Attributes:
        where, names = self._reach.find(path)
        if isinstance(where, Directory):
            return self._of_directory(path)
        if not names:
            return self._reach.shown(where, self._reach.attributes(where, ROOT))
        return self._reach.shown(where, self._reach.again(where.number, lambda: self._stat(where, names)))

    def _stat(self, place: Place, names: tuple[bytes, ...]) -> bytes:
        key = Key(place.number, self._reach.node(place, names[:-1]), names[-1])
        known = self._reach.lookups.recall(key)
        return self._reach.look_up(key).attr if known is None else known

    def _of_directory(self, path: bytes) -> Attributes:
        ino = inode(1 << 40, crc32(path))
        uid, gid = self._reach.ownership.uid, self._reach.ownership.gid
        now = self._born
        return Attributes(ino, 0, 0, now, now, now, stat.S_IFDIR | 0o555, 2, uid, gid, 0, 4096)

    def chmod(self, path: bytes, mode: int, handle: int | None = None) -> None:
        self._set(path, handle, SET_MODE, mode=stat.S_IMODE(mode))

    def chown(self, path: bytes, uid: int, gid: int, handle: int | None = None) -> None:
        meant = self._reach.ownership.meant(uid, gid)
        if meant is None:
            self._set(path, handle, KILL_PRIVILEGE)
            return
        uid, gid = meant
        valid = (SET_UID if uid != -1 else 0) | (SET_GID if gid != -1 else 0)
        self._set(path, handle, valid, uid=max(uid, 0), gid=max(gid, 0))

    def truncate(self, path: bytes, size: int, handle: int | None = None) -> None:
        self._set(path, handle, SET_SIZE | KILL_PRIVILEGE, size=size)

    def utimens(self, path: bytes, atime: int, mtime: int, handle: int | None = None) -> None:
        """ns since the epoch, ``NOW`` or ``OMIT``."""
        valid = {NOW: SET_ATIME_NOW, OMIT: 0}.get(atime, SET_ATIME)
        valid |= {NOW: SET_MTIME_NOW, OMIT: 0}.get(mtime, SET_MTIME)
        if valid:
            times = {
                "atime_ns": atime if valid & SET_ATIME else 0,
                "mtime_ns": mtime if valid & SET_MTIME else 0,
            }
            self._set(path, handle, valid, **times)

    def _set(self, path: bytes, handle: int | None, valid: int, **values: int) -> None:
        file = self.data.find(handle)
        if file is not None:
            self._set_of(file.place, self.data.node_of(file), valid, values)
            return
        place, names = self._reach.in_place(path)
        if place.read_only:
            raise failure(errno.EROFS)
        self._reach.again(
            place.number, lambda: self._set_of(place, self._reach.node(place, names), valid, values)
        )

    def _set_of(self, place: Place, node: int, valid: int, values: dict[str, int]) -> None:
        if place.read_only:
            raise failure(errno.EROFS)
        self._reach.set_attributes(place, node, valid, **values)

    def access(self, path: bytes, mode: int) -> None:
        """What a program wants to know beforehand; who may do what the guest says when it is done."""
        where, _ = self._reach.find(path)
        if mode & os.W_OK and (isinstance(where, Directory) or where.read_only):
            raise failure(errno.EROFS)
        if mode & os.X_OK:
            attributes = self.getattr(path)
            if attributes.kind != stat.S_IFDIR and not attributes.mode & 0o111:
                raise failure(errno.EACCES)

    def statfs(self, path: bytes) -> FilesystemSize:
        where, _ = self._reach.find(path)
        if isinstance(where, Directory):
            return FilesystemSize(0, 0, 0, 0, 0, 4096, 255, 4096)
        return self._reach.ask(GetFilesystemSize(where.number, 0, ROOT))[0]

    # --- names ---------------------------------------------------------------------------------------

    def readlink(self, path: bytes) -> bytes:
        place, names = self._reach.in_place(path)
        target = self._reach.again(
            place.number,
            lambda: self._reach.ask(ReadLink(place.number, 0, self._reach.node(place, names)))[0].data,
        )
        if not 0 < len(target) <= MAX_TARGET or b"\0" in target:
            raise failure(errno.EIO)
        depth = len(names) - 1
        machine = self._reach.tree.root.entries.get(MACHINE)
        if isinstance(machine, Place) and machine != place:
            return shown_in(target, depth, place.path, machine.path)
        return shown(target, depth, place.path if place.path[0] == HOME else ())

    def mknod(self, path: bytes, mode: int) -> None:
        entry = self._reach.entry(path)
        self._reach.made(entry, MakeNode(entry.place.number, 0, entry.directory, entry.name, mode))

    def mkdir(self, path: bytes, mode: int) -> None:
        entry = self._reach.entry(path)
        self._reach.made(entry, MakeDirectory(entry.place.number, 0, entry.directory, entry.name, mode))

    def symlink(self, path: bytes, target: bytes) -> None:
        entry = self._reach.entry(path)
        self._reach.made(entry, MakeSymlink(entry.place.number, 0, entry.directory, entry.name, target))

    def link(self, existing: bytes, path: bytes) -> None:
        entry = self._reach.entry(path)
        place, names = self._reach.in_place(existing)
        if place != entry.place:
            raise failure(errno.EXDEV)
        node = self._reach.node(place, names)
        self._reach.made(entry, MakeLink(place.number, 0, node, entry.directory, entry.name))
        self._reach.lookups.changed(place.number, node)

    def unlink(self, path: bytes) -> None:
        entry = self._reach.entry(path)
        self._reach.changed_in(entry)
        self._reach.ask(Unlink(entry.place.number, 0, entry.directory, entry.name))

    def rmdir(self, path: bytes) -> None:
        entry = self._reach.entry(path)
        self._reach.changed_in(entry)
        self._reach.ask(RemoveDirectory(entry.place.number, 0, entry.directory, entry.name))

    def rename(self, path: bytes, to: bytes, flags: int) -> None:
        """renameat2(2)."""
        old, new = self._reach.entry(path), self._reach.entry(to)
        if old.place != new.place:
            raise failure(errno.EXDEV)
        self._reach.changed_in(old)
        self._reach.changed_in(new)
        self._reach.ask(Rename(old.place.number, 0, old.directory, old.name, new.directory, new.name, flags))

    # --- extended attributes -------------------------------------------------------------------------

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        """Only a user's: others would cost a message for each file that ls(1) looks at, and each write."""
        if not name.startswith(_USER):
            raise failure(errno.ENODATA)
        place, node = self._of_xattr(path, errno.ENODATA)
        data = self._reach.ask(GetXattr(place.number, 0, node, name))[0].data
        return checked(data, MAX_XATTR)

    def listxattr(self, path: bytes) -> list[bytes]:
        where, names = self._reach.find(path)
        if isinstance(where, Directory):
            return []
        node = self._reach.again(where.number, lambda: self._reach.node(where, names))
        data = self._reach.ask(ListXattr(where.number, 0, node))[0].data
        return [name for name in checked(data, MAX_XATTR).split(b"\0") if name.startswith(_USER)]

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        if not name.startswith(_USER):
            raise failure(errno.EOPNOTSUPP)
        place, node = self._of_xattr(path, errno.EROFS)
        if place.read_only:
            raise failure(errno.EROFS)
        self._reach.ask(SetXattr(place.number, 0, node, name, value, flags))

    def removexattr(self, path: bytes, name: bytes) -> None:
        place, node = self._of_xattr(path, errno.EROFS)
        if place.read_only:
            raise failure(errno.EROFS)
        self._reach.ask(RemoveXattr(place.number, 0, node, name))

    def _of_xattr(self, path: bytes, above: int) -> tuple[Place, int]:
        where, names = self._reach.find(path)
        if isinstance(where, Directory):
            raise failure(above)
        return where, self._reach.again(where.number, lambda: self._reach.node(where, names))
