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
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar
from zlib import crc32

from host_agent.view.attributes import Attributes, Ownership, inode, unpack
from host_agent.view.listing import Record, records
from host_agent.view.lookups import Key, Lookups
from host_agent.view.symlinks import MAX_TARGET, shown, shown_in
from host_agent.view.tree import Directory, Place, Tree, is_name
from protocol.files import (
    KILL_PRIVILEGE,
    MAX_DATA,
    ROOT,
    SET_ATIME,
    SET_ATIME_NOW,
    SET_GID,
    SET_MODE,
    SET_MTIME,
    SET_MTIME_NOW,
    SET_SIZE,
    SET_UID,
    Allocate,
    Create,
    Entry,
    FileCall,
    FilesystemSize,
    Forget,
    GetAttributes,
    GetFilesystemSize,
    GetXattr,
    List,
    ListXattr,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Read,
    ReadLink,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    SetAttributes,
    SetXattr,
    Sync,
    Unlink,
    Write,
)

T = TypeVar("T")
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)

AHEAD_TIME: Final = 1.0
"""Seconds for which data that came before it was asked for may be used: as old as the kernel's own may be."""

MAX_XATTR: Final = 65_536
"""Bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX)."""

FORGET_AT: Final = 64
"""Nodes that are given back in one message."""

NOW: Final = -1
OMIT: Final = -2
"""Of a time to be set."""

HOME: Final = b"home"
"""Below it are homes, where they are in the guest."""

MACHINE: Final = b"machine"
"""The root of a machine that is attached."""

_USER: Final = b"user."


class Answer(Protocol[ResultT_co]):
    """What will be answered; ``wait`` raises ``OSError``, and gives up after a time."""

    def wait(self) -> tuple[ResultT_co, bytes]: ...


class Asker(Protocol):
    """Who carries calls to the guest. ``epoch`` names its process there: with another one all numbers are void."""

    @property
    def epoch(self) -> str: ...
    @property
    def tree(self) -> Tree: ...
    def begin(self, call: FileCall[ResultT], payload: bytes = b"") -> Answer[ResultT]:
        """Never waits, never raises."""


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(slots=True)
class OpenFile:
    """``ahead``: what was asked for behind ``data``, which begins at ``start``."""

    place: Place
    node: int
    path: bytes
    ino: int
    epoch: str
    start: int = 0
    data: bytes = b""
    until: float = 0.0
    expected: int = 0
    ahead: tuple[int, Answer[Any]] | None = None


@dataclass(slots=True)
class OpenDirectory:
    """``rest`` are records that did not fit, those behind ``after``; ``end``: nothing follows them."""

    path: bytes
    place: Place | None = None
    node: int = 0
    entries: list[tuple[bytes, Directory | Place]] = field(default_factory=list)
    after: int = 0
    rest: list[Record] = field(default_factory=list)
    end: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    """A name in a place: where it is, and whose."""

    place: Place
    directory: int
    name: bytes

    @property
    def key(self) -> Key:
        return Key(self.place.number, self.directory, self.name)


class Files:
    """One mounted view."""

    def __init__(
        self, asker: Asker, ownership: Ownership, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._asker = asker
        self._ownership = ownership
        self._clock = clock
        self._lookups = Lookups(clock)
        self._epoch = asker.epoch
        self._tree = asker.tree
        self._born = time.time_ns()
        self._numbers = itertools.count(1)
        self._open: dict[int, OpenFile] = {}
        self._directories: dict[int, OpenDirectory] = {}

    # --- asking --------------------------------------------------------------------------------------

    def _ask(self, call: FileCall[ResultT], payload: bytes = b"") -> tuple[ResultT, bytes]:
        return self._asker.begin(call, payload).wait()

    def _look_around(self) -> None:
        """Before each operation: is the guest's process the same, and which places does it have?"""
        if self._asker.epoch != self._epoch:
            self._epoch = self._asker.epoch
            self._lookups.forget_all()
        if self._asker.tree is not self._tree:
            gone = {place.number for place in self._tree.places}
            self._tree = self._asker.tree
            for number in gone - {place.number for place in self._tree.places}:
                self._lookups.forget_place(number)
        if self._lookups.released >= FORGET_AT:
            for place, nodes in self._lookups.take_released().items():
                self._asker.begin(Forget(place, 0, 0, list(nodes), list(nodes.values())))

    def _find(self, path: bytes) -> tuple[Directory | Place, tuple[bytes, ...]]:
        self._look_around()
        found = self._tree.find(path)
        if found is None:
            raise failure(errno.ENOENT)
        return found

    def _in_place(self, path: bytes) -> tuple[Place, tuple[bytes, ...]]:
        """Raises EROFS for what is above the places."""
        where, names = self._find(path)
        if isinstance(where, Directory):
            raise failure(errno.EROFS)
        return where, names

    def _again(self, place: int, attempt: Callable[[], T]) -> T:
        """Once more if a number was good for nothing: what is known by name may have been replaced there."""
        try:
            return attempt()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self._lookups.forget_place(place)
        return attempt()

    def _node(self, place: Place, names: tuple[bytes, ...]) -> int:
        node = ROOT
        for name in names:
            key = Key(place.number, node, name)
            node = self._lookups.find(key) or self._look_up(key).node
        return node

    def _look_up(self, key: Key) -> Entry:
        try:
            entry, _ = self._ask(Lookup(key.place, 0, key.directory, key.name))
        except OSError:
            self._lookups.gone(key)
            raise
        return self._entered(key, entry)

    def _entered(self, key: Key, entry: Entry) -> Entry:
        if entry.node <= ROOT:
            self._lookups.gone(key)
            raise failure(errno.ENOENT if entry.node == 0 else errno.EIO)
        unpack(entry.attr)
        self._lookups.enter(key, entry.node, entry.attr)
        return entry

    def _entry(self, path: bytes, *, to_change: bool = True) -> _Entry:
        """A name in a place; the directory is found. Raises EROFS, EBUSY for a place itself."""
        self._look_around()
        above = self._tree.find(path.rpartition(b"/")[0])
        if above is not None and isinstance(above[0], Directory) and self._tree.find(path) is None:
            raise failure(errno.EROFS)
        place, names = self._in_place(path)
        if not names:
            raise failure(errno.EBUSY)
        if to_change and place.read_only:
            raise failure(errno.EROFS)
        if not is_name(names[-1]):
            raise failure(errno.ENAMETOOLONG)
        directory = self._again(place.number, lambda: self._node(place, names[:-1]))
        return _Entry(place, directory, names[-1])

    def _changed_in(self, entry: _Entry) -> None:
        self._lookups.gone(entry.key)
        self._lookups.changed(entry.place.number, entry.directory)

    # --- attributes ----------------------------------------------------------------------------------

    def getattr(self, path: bytes, handle: int | None = None) -> Attributes:
        if handle is not None and (file := self._open.get(handle)) is not None:
            node = self._node_of(file)
            return self._shown(file.place, self._attributes(file.place, node))
        where, names = self._find(path)
        if isinstance(where, Directory):
            return self._of_directory(path)
        if not names:
            return self._shown(where, self._attributes(where, ROOT))
        return self._shown(where, self._again(where.number, lambda: self._stat(where, names)))

    def _stat(self, place: Place, names: tuple[bytes, ...]) -> bytes:
        key = Key(place.number, self._node(place, names[:-1]), names[-1])
        known = self._lookups.recall(key)
        return self._look_up(key).attr if known is None else known

    def _attributes(self, place: Place, node: int) -> bytes:
        return self._ask(GetAttributes(place.number, 0, node))[0].attr

    def _shown(self, place: Place, raw: bytes) -> Attributes:
        attributes = unpack(raw)
        uid, gid = self._ownership.shown(attributes.uid, attributes.gid)
        return attributes._replace(uid=uid, gid=gid, ino=inode(crc32(b"/".join(place.path)), attributes.ino))

    def _of_directory(self, path: bytes) -> Attributes:
        ino = inode(1 << 40, crc32(path))
        uid, gid = self._ownership.uid, self._ownership.gid
        now = self._born
        return Attributes(ino, 0, 0, now, now, now, stat.S_IFDIR | 0o555, 2, uid, gid, 0, 4096)

    def chmod(self, path: bytes, mode: int, handle: int | None = None) -> None:
        self._set(path, handle, SET_MODE, mode=stat.S_IMODE(mode))

    def chown(self, path: bytes, uid: int, gid: int, handle: int | None = None) -> None:
        meant = self._ownership.meant(uid, gid)
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
        file = None if handle is None else self._open.get(handle)
        if file is not None:
            self._set_of(file.place, self._node_of(file), valid, values)
            file.data, file.ahead = b"", None
            return
        place, names = self._in_place(path)
        if place.read_only:
            raise failure(errno.EROFS)
        self._again(place.number, lambda: self._set_of(place, self._node(place, names), valid, values))

    def _set_of(self, place: Place, node: int, valid: int, values: dict[str, int]) -> None:
        if place.read_only:
            raise failure(errno.EROFS)
        self._ask(SetAttributes(place.number, 0, node, valid, **values))
        self._lookups.changed(place.number, node)

    def access(self, path: bytes, mode: int) -> None:
        """What a program wants to know beforehand; who may do what the guest says when it is done."""
        where, _ = self._find(path)
        if mode & os.W_OK and (isinstance(where, Directory) or where.read_only):
            raise failure(errno.EROFS)
        if mode & os.X_OK:
            attributes = self.getattr(path)
            if attributes.kind != stat.S_IFDIR and not attributes.mode & 0o111:
                raise failure(errno.EACCES)

    def statfs(self, path: bytes) -> FilesystemSize:
        where, _ = self._find(path)
        if isinstance(where, Directory):
            return FilesystemSize(0, 0, 0, 0, 0, 4096, 255, 4096)
        return self._ask(GetFilesystemSize(where.number, 0, ROOT))[0]

    # --- names ---------------------------------------------------------------------------------------

    def readlink(self, path: bytes) -> bytes:
        place, names = self._in_place(path)
        target = self._again(
            place.number, lambda: self._ask(ReadLink(place.number, 0, self._node(place, names)))[0].data
        )
        if not 0 < len(target) <= MAX_TARGET or b"\0" in target:
            raise failure(errno.EIO)
        depth = len(names) - 1
        machine = self._tree.root.entries.get(MACHINE)
        if isinstance(machine, Place) and machine != place:
            return shown_in(target, depth, place.path, machine.path)
        return shown(target, depth, place.path if place.path[0] == HOME else ())

    def mknod(self, path: bytes, mode: int) -> None:
        entry = self._entry(path)
        self._made(entry, MakeNode(entry.place.number, 0, entry.directory, entry.name, mode))

    def mkdir(self, path: bytes, mode: int) -> None:
        entry = self._entry(path)
        self._made(entry, MakeDirectory(entry.place.number, 0, entry.directory, entry.name, mode))

    def symlink(self, path: bytes, target: bytes) -> None:
        entry = self._entry(path)
        self._made(entry, MakeSymlink(entry.place.number, 0, entry.directory, entry.name, target))

    def link(self, existing: bytes, path: bytes) -> None:
        entry = self._entry(path)
        place, names = self._in_place(existing)
        if place != entry.place:
            raise failure(errno.EXDEV)
        node = self._node(place, names)
        self._made(entry, MakeLink(place.number, 0, node, entry.directory, entry.name))
        self._lookups.changed(place.number, node)

    def _made(self, entry: _Entry, call: FileCall[Entry]) -> Entry:
        self._changed_in(entry)
        made, _ = self._ask(call)
        return self._entered(entry.key, made)

    def unlink(self, path: bytes) -> None:
        entry = self._entry(path)
        self._changed_in(entry)
        self._ask(Unlink(entry.place.number, 0, entry.directory, entry.name))

    def rmdir(self, path: bytes) -> None:
        entry = self._entry(path)
        self._changed_in(entry)
        self._ask(RemoveDirectory(entry.place.number, 0, entry.directory, entry.name))

    def rename(self, path: bytes, to: bytes, flags: int) -> None:
        """renameat2(2)."""
        old, new = self._entry(path), self._entry(to)
        if old.place != new.place:
            raise failure(errno.EXDEV)
        self._changed_in(old)
        self._changed_in(new)
        self._ask(Rename(old.place.number, 0, old.directory, old.name, new.directory, new.name, flags))

    # --- directories ---------------------------------------------------------------------------------

    def opendir(self, path: bytes) -> int:
        where, names = self._find(path)
        handle = next(self._numbers)
        if isinstance(where, Directory):
            self._directories[handle] = OpenDirectory(path, entries=list(where.entries.items()))
        else:
            node = self._again(where.number, lambda: self._node(where, names))
            self._lookups.hold(where.number, node)
            self._directories[handle] = OpenDirectory(path, where, node)
        return handle

    def releasedir(self, handle: int) -> None:
        opened = self._directories.pop(handle, None)
        if opened is not None and opened.place is not None:
            self._lookups.release(opened.place.number, opened.node)

    def readdir(self, handle: int, offset: int) -> Iterator[tuple[bytes, Attributes | None, int]]:
        """Names from ``offset`` on, each with the offset behind it."""
        opened = self._directories[handle]
        for number, name in enumerate((b".", b"..")):
            if offset <= number:
                yield name, None, number + 1
        if opened.place is None:
            for number, (name, _) in enumerate(opened.entries):
                if offset <= number + 2:
                    yield name, None, number + 3
            return
        for record in self._listed(opened, opened.place, 0 if offset <= 2 else offset):
            attributes = None
            if record.attr:
                attributes = self._shown(opened.place, record.attr)
                self._lookups.remember(Key(opened.place.number, opened.node, record.name), record.attr)
            yield record.name, attributes, record.position

    def _listed(self, opened: OpenDirectory, place: Place, after: int) -> Iterator[Record]:
        while True:
            if opened.after != after or not opened.rest:
                if opened.after == after and opened.end:
                    return
                piece, payload = self._ask(List(place.number, 0, opened.node, 1, after, True))
                opened.after, opened.end = after, piece.end
                opened.rest = records(piece, payload, after)
                if not opened.rest and not piece.end:
                    raise failure(errno.EIO)
            while opened.rest:
                record = opened.rest[0]
                yield record  # if there is no room for it, it is asked for again from ``after``
                opened.rest.pop(0)
                opened.after = after = record.position

    # --- data ----------------------------------------------------------------------------------------

    def open(self, path: bytes, flags: int) -> int:
        writes = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        where, names = self._find(path)
        if isinstance(where, Directory):
            raise failure(errno.EISDIR)
        if writes and where.read_only:
            raise failure(errno.EROFS)
        try:
            node = self._again(where.number, lambda: self._node_to_open(where, names, fresh=bool(writes)))
        except FileNotFoundError:
            # The kernel still believes in the name: by this it looks again, and makes the file if that was asked for.
            raise failure(errno.ESTALE) from None
        if flags & os.O_TRUNC:
            self._set_of(where, node, SET_SIZE | KILL_PRIVILEGE, {})
        return self._opened(where, node, path, 0)

    def _node_to_open(self, place: Place, names: tuple[bytes, ...], *, fresh: bool) -> int:
        """What is to be written is looked up: it would be lost in a file that had this name a moment ago."""
        if not fresh or not names:
            return self._node(place, names)
        return self._look_up(Key(place.number, self._node(place, names[:-1]), names[-1])).node

    def create(self, path: bytes, mode: int, flags: int) -> int:
        entry = self._entry(path)
        call = Create(entry.place.number, 0, entry.directory, entry.name, mode, flags & ~os.O_ACCMODE)
        made = self._made(entry, call)
        return self._opened(entry.place, made.node, path, unpack(made.attr).ino)

    def _opened(self, place: Place, node: int, path: bytes, ino: int) -> int:
        handle = next(self._numbers)
        if not ino:
            key_attr = self._lookups.attributes_of(place.number, node)
            ino = unpack(key_attr).ino if key_attr else 0
        self._lookups.hold(place.number, node)
        self._open[handle] = OpenFile(place, node, path, ino, self._epoch)
        return handle

    def release(self, handle: int) -> None:
        if (file := self._open.pop(handle, None)) is not None and file.epoch == self._epoch:
            self._lookups.release(file.place.number, file.node)

    def _node_of(self, file: OpenFile) -> int:
        """Of an open file; one of a process that was killed is looked for by its path. Raises ESTALE."""
        self._look_around()
        if file.epoch == self._epoch:
            return file.node
        where, names = self._find(file.path)
        if isinstance(where, Directory) or not names:
            raise failure(errno.ESTALE)
        node = self._node(where, names)
        if not file.ino or unpack(self._attributes(where, node)).ino != file.ino:
            raise failure(errno.ESTALE)
        self._lookups.hold(where.number, node)
        file.place, file.node, file.epoch = where, node, self._epoch
        file.data, file.ahead = b"", None
        return node

    def read(self, handle: int, size: int, offset: int) -> bytes:
        file = self._open[handle]
        node = self._node_of(file)
        at = offset - file.start
        if file.data and 0 <= at <= len(file.data) - size and self._clock() < file.until:
            data = file.data[at : at + size]
        elif offset == file.expected and offset:
            data = self._read_ahead(file, node, offset)[:size]
        else:
            file.ahead = None
            data = self._read(Read(file.place.number, 0, node, offset, size))
        file.expected = offset + len(data)
        return data

    def _read_ahead(self, file: OpenFile, node: int, offset: int) -> bytes:
        """Who reads on is given what is behind from here, and what comes then is asked for already."""
        ahead, file.ahead = file.ahead, None
        if ahead is not None and ahead[0] == offset and self._clock() < file.until + AHEAD_TIME:
            data = self._checked(ahead[1].wait()[1], MAX_DATA)
        else:
            data = self._read(Read(file.place.number, 0, node, offset, MAX_DATA))
        file.start, file.data, file.until = offset, data, self._clock() + AHEAD_TIME
        if len(data) == MAX_DATA:
            behind = offset + MAX_DATA
            file.ahead = behind, self._asker.begin(Read(file.place.number, 0, node, behind, MAX_DATA))
        return data

    def _read(self, call: Read) -> bytes:
        return self._checked(self._ask(call)[1], call.size)

    @staticmethod
    def _checked(data: bytes, size: int) -> bytes:
        if len(data) > size:
            raise failure(errno.EIO)
        return data

    def write(self, handle: int, data: bytes, offset: int, *, append: bool) -> int:
        file = self._open[handle]
        node = self._node_of(file)
        file.data, file.ahead = b"", None
        # The kernel leaves it to us to take setuid away (FUSE_HANDLE_KILLPRIV).
        call = Write(file.place.number, 0, node, offset, append, kill_privilege=True)
        written, _ = self._ask(call, data)
        self._lookups.changed(file.place.number, node)
        if not 0 <= written.size <= len(data):
            raise failure(errno.EIO)
        return written.size

    def fsync(self, handle: int, *, data_only: bool) -> None:
        file = self._open[handle]
        node = self._node_of(file)
        self._ask(Sync(file.place.number, 0, node, data_only))

    def fsyncdir(self, handle: int) -> None:
        opened = self._directories[handle]
        if opened.place is not None:
            self._ask(Sync(opened.place.number, 0, opened.node))

    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        file = self._open[handle]
        node = self._node_of(file)
        file.data, file.ahead = b"", None
        self._ask(Allocate(file.place.number, 0, node, mode, offset, length))
        self._lookups.changed(file.place.number, node)

    # --- extended attributes -------------------------------------------------------------------------

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        """Only a user's: others would cost a message for each file that ls(1) looks at, and each write."""
        if not name.startswith(_USER):
            raise failure(errno.ENODATA)
        place, node = self._of_xattr(path, errno.ENODATA)
        data = self._ask(GetXattr(place.number, 0, node, name))[0].data
        return self._checked(data, MAX_XATTR)

    def listxattr(self, path: bytes) -> list[bytes]:
        where, names = self._find(path)
        if isinstance(where, Directory):
            return []
        node = self._again(where.number, lambda: self._node(where, names))
        data = self._ask(ListXattr(where.number, 0, node))[0].data
        return [name for name in self._checked(data, MAX_XATTR).split(b"\0") if name.startswith(_USER)]

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        if not name.startswith(_USER):
            raise failure(errno.EOPNOTSUPP)
        place, node = self._of_xattr(path, errno.EROFS)
        if place.read_only:
            raise failure(errno.EROFS)
        self._ask(SetXattr(place.number, 0, node, name, value, flags))

    def removexattr(self, path: bytes, name: bytes) -> None:
        place, node = self._of_xattr(path, errno.EROFS)
        if place.read_only:
            raise failure(errno.EROFS)
        self._ask(RemoveXattr(place.number, 0, node, name))

    def _of_xattr(self, path: bytes, above: int) -> tuple[Place, int]:
        where, names = self._find(path)
        if isinstance(where, Directory):
            raise failure(above)
        return where, self._again(where.number, lambda: self._node(where, names))
