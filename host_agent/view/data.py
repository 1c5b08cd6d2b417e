"""Files that are open: what is read and written, and what is read ahead.

The law: what was read ahead is older than it is taken for. So it is used for a moment only, and no more once the file
was shown to have changed: the kernel would keep it, and believe it to be new.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from host_agent.view.attributes import unpack
from host_agent.view.lookups import Key
from host_agent.view.reach import Answer, Reach, failure
from host_agent.view.tree import Directory, Place
from protocol.files import (
    KILL_PRIVILEGE,
    MAX_DATA,
    SET_SIZE,
    Allocate,
    Create,
    Read,
    Sync,
    Write,
)

AHEAD_TIME: Final = 1.0
"""Seconds for which data that came before it was asked for may be used: as old as the kernel's own may be."""


@dataclass(slots=True)
class OpenFile:
    """``ahead``: what was asked for behind ``data``, which begins at ``start``; both of that ``version``."""

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
    version: int = 0

    def forget(self) -> None:
        """What was read ahead is not what there is any more."""
        self.data, self.ahead = b"", None


def checked(data: bytes, size: int) -> bytes:
    """What a guest has said, if it is no more than was asked for."""
    if len(data) > size:
        raise failure(errno.EIO)
    return data


class OpenFiles:
    """Those of one mount, by their handles."""

    def __init__(self, reach: Reach, clock: Callable[[], float] = time.monotonic) -> None:
        self._reach = reach
        self._clock = clock
        self._numbers = itertools.count(1)
        self._open: dict[int, OpenFile] = {}

    def open(self, path: bytes, flags: int) -> int:
        writes = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        where, names = self._reach.find(path)
        if isinstance(where, Directory):
            raise failure(errno.EISDIR)
        if writes and where.read_only:
            raise failure(errno.EROFS)
        try:
            node = self._reach.again(
                where.number, lambda: self._node_to_open(where, names, fresh=bool(writes))
            )
        except FileNotFoundError:
            # The kernel still believes in the name: by this it looks again, and makes the file if that was asked for.
            raise failure(errno.ESTALE) from None
        if flags & os.O_TRUNC:
            self._reach.set_attributes(where, node, SET_SIZE | KILL_PRIVILEGE)
        return self._opened(where, node, path, 0)

    def _node_to_open(self, place: Place, names: tuple[bytes, ...], *, fresh: bool) -> int:
        """What is to be written is looked up: it would be lost in a file that had this name a moment ago."""
        if not fresh or not names:
            return self._reach.node(place, names)
        return self._reach.look_up(Key(place.number, self._reach.node(place, names[:-1]), names[-1])).node

    def create(self, path: bytes, mode: int, flags: int) -> int:
        entry = self._reach.entry(path)
        call = Create(entry.place.number, 0, entry.directory, entry.name, mode, flags & ~os.O_ACCMODE)
        made = self._reach.made(entry, call)
        return self._opened(entry.place, made.node, path, unpack(made.attr).ino)

    def _opened(self, place: Place, node: int, path: bytes, ino: int) -> int:
        if not ino:
            known = self._reach.lookups.attributes_of(place.number, node)
            ino = unpack(known or self._reach.attributes(place, node)).ino
        handle = next(self._numbers)
        self._reach.lookups.hold(place.number, node)
        self._reach.watch(place, ino)
        self._open[handle] = OpenFile(place, node, path, ino, self._reach.epoch)
        return handle

    def release(self, handle: int) -> None:
        if (file := self._open.pop(handle, None)) is None:
            return
        self._reach.unwatch(file.place, file.ino)
        if file.epoch == self._reach.epoch:
            self._reach.lookups.release(file.place.number, file.node)

    def find(self, handle: int | None) -> OpenFile | None:
        return None if handle is None else self._open.get(handle)

    def node_of(self, file: OpenFile) -> int:
        """Of an open file; one of a process that was killed is looked for by its path. Raises ESTALE."""
        self._reach.look_around()
        if file.epoch == self._reach.epoch:
            return file.node
        where, names = self._reach.find(file.path)
        if isinstance(where, Directory) or not names:
            raise failure(errno.ESTALE)
        node = self._reach.node(where, names)
        if unpack(self._reach.attributes(where, node)).ino != file.ino:
            raise failure(errno.ESTALE)
        self._reach.lookups.hold(where.number, node)
        self._reach.watch(where, file.ino)
        self._reach.unwatch(file.place, file.ino)
        file.place, file.node, file.epoch = where, node, self._reach.epoch
        file.forget()
        return node

    def read(self, handle: int, size: int, offset: int) -> bytes:
        file = self._open[handle]
        node = self.node_of(file)
        if file.version != (version := self._reach.version(file.place, file.ino)):
            # The kernel has let go of what it had of the file, and takes what it gets now for what it was told of.
            file.forget()
            file.version = version
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
            data = checked(ahead[1].wait()[1], MAX_DATA)
        else:
            data = self._read(Read(file.place.number, 0, node, offset, MAX_DATA))
        file.start, file.data, file.until = offset, data, self._clock() + AHEAD_TIME
        if len(data) == MAX_DATA:
            behind = offset + MAX_DATA
            file.ahead = behind, self._reach.begin(Read(file.place.number, 0, node, behind, MAX_DATA))
        return data

    def _read(self, call: Read) -> bytes:
        return checked(self._reach.ask(call)[1], call.size)

    def write(self, handle: int, data: bytes, offset: int, *, append: bool) -> int:
        file = self._open[handle]
        node = self.node_of(file)
        self._reach.changed(file.place, node, file.ino)  # also if it is not known how it ends
        # The kernel leaves it to us to take setuid away (FUSE_HANDLE_KILLPRIV).
        call = Write(file.place.number, 0, node, offset, append, kill_privilege=True)
        written, _ = self._reach.ask(call, data)
        if not 0 <= written.size <= len(data):
            raise failure(errno.EIO)
        return written.size

    def fsync(self, handle: int, *, data_only: bool) -> None:
        file = self._open[handle]
        node = self.node_of(file)
        self._reach.ask(Sync(file.place.number, 0, node, data_only))

    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        file = self._open[handle]
        node = self.node_of(file)
        self._reach.changed(file.place, node, file.ino)  # also if it is not known how it ends
        self._reach.ask(Allocate(file.place.number, 0, node, mode, offset, length))
