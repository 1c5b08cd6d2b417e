"""Whole directories: what a guest would have to look up name by name, in one answer (``ListEntries``).

The laws:
- A record has a node if the name and the attributes can be promised, and counts one lookup then. Of all else the guest
  has to ask, so it costs nothing here; nor does a file where only names are wanted (``bare``).
- What cannot be promised after all when the answer is sent is taken out of it, and its lookup given back.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Final, NamedTuple

from fileserver.core import Core, Outcome
from fileserver.linux import Status, failure
from fileserver.names import NameOperations
from fileserver.nodes import Node
from fileserver.promises import Promise, remembered
from fileserver.signatures import sign
from fileserver.snapshots import PIECE, Snapshot
from protocol.files import ATTR, ATTRIBUTES, DIRENT, ENTRY, FOREVER, FileCall, ListEntries, Listing

MAX_ANSWER: Final = PIECE + PIECE // 7
"""Bytes of an answer: a record has 160 at least, and 21 in the arrays behind them."""

_STREAM: Final = -1  # no handle of a guest's
_KIND: Final = DIRENT.size - 4  # the lowest byte of ``type``
_MAYBE_DIRECTORY: Final = (0, 4)  # DT_UNKNOWN, DT_DIR
_HEAD: Final = ENTRY.size + ATTR.size
_NO_NODE: Final = bytes(_HEAD)


class _Record(NamedTuple):
    """A record with a node: its number among the others, and where it begins."""

    place: int
    start: int
    promise: Promise


class _Found(NamedTuple):
    """The head of a record, and what was sampled for it."""

    node: int
    head: bytes
    promise: Promise


class Records(Promise):
    """What was sampled before the records of one piece were made."""

    __slots__ = ("count", "dirents", "records", "sent", "taken_out")

    def __init__(self, names: Promise, dirents: int, count: int, records: list[_Record]) -> None:
        super().__init__(names.directory, names.names, None, None)
        self.dirents, self.count, self.records = dirents, count, records
        self.sent: list[int] = []
        """The nodes that are in the answer, once it is settled, and those that were."""
        self.taken_out: list[int] = []

    def settle(self, content: bytearray, kept: Callable[[Promise], int] | None) -> None:
        """Take out of ``content``, which is about to be sent, what does not stand any more: all, without ``kept``."""
        for place, start, promise in self.records:
            assert promise.node is not None
            if kept is not None and kept(promise) & ATTRIBUTES:
                self.sent.append(promise.node.number)
                continue
            self.taken_out.append(promise.node.number)
            content[start : start + _HEAD] = _NO_NODE
            number = self.dirents + 12 * self.count + 8 * place
            content[number : number + 8] = bytes(8)


class EntryOperations:
    """One share's."""

    def __init__(self, core: Core, names: NameOperations) -> None:
        self._core = core
        self._reach, self._promises = core.reach, core.promises
        self._names = names

    def methods(self) -> dict[type[FileCall[Any]], Callable[[Any, Any], Outcome]]:
        return {ListEntries: self.list_entries}

    def list_entries(self, call: ListEntries, payload: object) -> Outcome:
        if call.after < 0:
            raise failure(errno.EINVAL)
        stream = (call.node, _STREAM)
        snapshots = self._core.snapshots
        with self._reach.use_directory(call.node) as directory:
            snapshot = snapshots.get(stream) if call.after else None
            if snapshot is None:
                snapshot = self._names.take_snapshot(directory)
            part = snapshot.part(call.after, PIECE, _HEAD)
            outcome = self._piece(directory, snapshot, part, bare=call.bare)
        if part.stop == len(snapshot.records):
            snapshots.drop(stream)
        else:
            snapshots.keep(stream, snapshot)
        return outcome

    def _piece(self, directory: Node, snapshot: Snapshot, part: slice, *, bare: bool) -> Outcome:
        names, tails = snapshot.names[part], snapshot.records[part]
        count, end = len(names), part.stop == len(snapshot.records)
        found: list[_Found | None] = [None] * count
        if snapshot.promise is not None:
            for place, (name, tail) in enumerate(zip(names, tails, strict=True)):
                if not bare or tail[_KIND] in _MAYBE_DIRECTORY:
                    found[place] = self._find(directory, name, tail[_KIND])
        starts = [0, *accumulate(_HEAD + len(tail) for tail in tails)]
        dirents = starts.pop()
        parts: list[bytes] = []
        for record, tail in zip(found, tails, strict=True):
            parts += (_NO_NODE if record is None else record.head, tail)
        nodes = [0 if record is None else record.node for record in found]
        content = bytearray().join(
            (
                *parts,
                struct.pack(f"<{count}I", *starts),
                struct.pack(f"<{count}Q", *snapshot.positions[part]),
                struct.pack(f"<{count}Q", *nodes),
                bytes(tail[_KIND] for tail in tails),
            )
        )
        listing = Listing(dirents, end, count=count)
        if snapshot.promise is None:
            return Outcome(listing, content)
        records = [
            _Record(place, starts[place], record.promise)
            for place, record in enumerate(found)
            if record is not None
        ]
        return Outcome(listing, content, Records(snapshot.promise, dirents, count, records))

    def _find(self, directory: Node, name: bytes, kind: int) -> _Found | None:
        """None if nothing can be promised."""
        promise = self._promises.look(directory, name)
        if promise is None:
            return None
        if promise.attributes is None and kind not in _MAYBE_DIRECTORY and self._promises.are_used_up:
            return None  # to find it, number it and forget it again takes 40 us
        try:
            node, status = self._names.find(directory, name, promise)
        except OSError:
            return None
        attr = self._core.attr(status)
        if promise.attributes is None or _may_be_stale(node, status):
            self._reach.forget(node.number, 1)
            return None
        node.told, node.listed = status.size, True
        promise.directory = promise.names = None  # one for all
        promise.given = remembered(attr)
        return _Found(node.number, ENTRY.pack(node.number, 0, FOREVER, FOREVER, 0, 0) + attr, promise)


def _may_be_stale(node: Node, status: Status) -> bool:
    """Whether an answer about the file would have to raise an alarm, or to put one off."""
    return node.base is not None and (node.doubt or node.base != sign(status))
