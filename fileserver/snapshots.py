"""A directory as it was when the guest began to read it, in pieces that any position continues.

A position (``off`` of a record) is a hash of the name, and records are in that order. So a position means the
same whatever comes and goes, in this process or in its successor: nothing is skipped and nothing
comes twice, as readdir(3) wants it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fileserver.linux import DirectoryEntry
from fileserver.promises import Promise
from protocol.files import DIRENT, position

PIECE: Final = 1 << 17
"""Bytes of records in one answer: 3,000 names of usual length, a few ms to send in an emulated guest."""

MAX_SNAPSHOTS: Final = 256
"""Directories that are being read at the same time, on one share."""

MAX_SNAPSHOT_BYTES: Final = 128 << 20
"""Of all of them together: 20 directories of 100,000 entries. What has to go is read again when asked for."""

_RECORD_OVERHEAD: Final = 120  # what Python needs for one more bytes object and two integers


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Records in the order of their positions, and the names in them. ``promise``: that these are all."""

    positions: list[int]
    records: list[bytes]
    names: list[bytes]
    weight: int
    promise: Promise | None = None

    def part(self, after: int, limit: int, head: int = 0) -> slice:
        """Of the records, from the first position greater than ``after``, up to ``limit`` bytes with ``head`` more of
        them for each."""
        start = end = bisect_right(self.positions, after)
        size = 0
        while end < len(self.records) and size + head + len(self.records[end]) <= limit:
            size += head + len(self.records[end])
            end += 1
        return slice(start, end)

    def piece(self, after: int, limit: int) -> tuple[bytes, list[bytes], bool]:
        """Records from the first position greater than ``after``, up to ``limit`` bytes; their names; and
        whether nothing follows."""
        part = self.part(after, limit)
        return b"".join(self.records[part]), self.names[part], part.stop == len(self.records)


def take(
    entries: Iterable[DirectoryEntry], inode: Callable[[int], int], promise: Promise | None = None
) -> Snapshot:
    """``inode`` makes the number that the guest is shown; ``promise`` was sampled before the directory was read."""
    ordered = sorted((position(entry.name), entry.name, entry) for entry in entries)
    positions, records, names = [], [], []
    last = weight = 0
    for at, name, entry in ordered:
        last = at if at > last else last + 1
        record = DIRENT.pack(inode(entry.ino), last, len(name), entry.kind) + name + b"\0" * (-len(name) % 8)
        positions.append(last)
        records.append(record)
        names.append(name)
        weight += len(record) + len(name) + _RECORD_OVERHEAD
    return Snapshot(positions, records, names, weight, promise)


class Snapshots:
    """Those that guests are in the middle of, by (node, handle). Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Snapshot] = OrderedDict()
        self._weight = 0

    def get(self, stream: tuple[int, int]) -> Snapshot | None:
        with self._lock:
            if stream in self._kept:
                self._kept.move_to_end(stream)
            return self._kept.get(stream)

    def keep(self, stream: tuple[int, int], snapshot: Snapshot) -> None:
        with self._lock:
            self._remove(stream)
            self._kept[stream] = snapshot
            self._weight += snapshot.weight
            while len(self._kept) > MAX_SNAPSHOTS or (
                self._weight > MAX_SNAPSHOT_BYTES and len(self._kept) > 1
            ):
                self._remove(next(iter(self._kept)))

    def drop(self, stream: tuple[int, int]) -> None:
        with self._lock:
            self._remove(stream)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._weight = 0

    def _remove(self, stream: tuple[int, int]) -> None:
        snapshot = self._kept.pop(stream, None)
        if snapshot is not None:
            self._weight -= snapshot.weight
