"""Directories that are open: the places' own, which come in pieces, and those above, which are only here."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from host_agent.view.attributes import Attributes
from host_agent.view.listing import Record, records
from host_agent.view.lookups import Key
from host_agent.view.reach import Reach, failure
from host_agent.view.tree import Directory, Place
from protocol.files import List, Sync


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


class OpenDirectories:
    """Those of one mount, by their handles."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._numbers = itertools.count(1)
        self._open: dict[int, OpenDirectory] = {}

    def opendir(self, path: bytes) -> int:
        where, names = self._reach.find(path)
        handle = next(self._numbers)
        if isinstance(where, Directory):
            self._open[handle] = OpenDirectory(path, entries=list(where.entries.items()))
        else:
            node = self._reach.again(where.number, lambda: self._reach.node(where, names))
            self._reach.lookups.hold(where.number, node)
            self._open[handle] = OpenDirectory(path, where, node)
        return handle

    def releasedir(self, handle: int) -> None:
        opened = self._open.pop(handle, None)
        if opened is not None and opened.place is not None:
            self._reach.lookups.release(opened.place.number, opened.node)

    def readdir(self, handle: int, offset: int) -> Iterator[tuple[bytes, Attributes | None, int]]:
        """Names from ``offset`` on, each with the offset behind it."""
        opened = self._open[handle]
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
                attributes = self._reach.shown(opened.place, record.attr)
                self._reach.lookups.remember(Key(opened.place.number, opened.node, record.name), record.attr)
            yield record.name, attributes, record.position

    def _listed(self, opened: OpenDirectory, place: Place, after: int) -> Iterator[Record]:
        while True:
            if opened.after != after or not opened.rest:
                if opened.after == after and opened.end:
                    return
                piece, payload = self._reach.ask(List(place.number, 0, opened.node, 1, after, True))
                opened.after, opened.end = after, piece.end
                opened.rest = records(piece, payload, after)
                if not opened.rest and not piece.end:
                    raise failure(errno.EIO)
            while opened.rest:
                record = opened.rest[0]
                yield record  # if there is no room for it, it is asked for again from ``after``
                opened.rest.pop(0)
                opened.after = after = record.position

    def fsyncdir(self, handle: int) -> None:
        opened = self._open[handle]
        if opened.place is not None:
            self._reach.ask(Sync(opened.place.number, 0, opened.node))
