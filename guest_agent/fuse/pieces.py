"""One piece of a directory: what a ``ListEntries`` has brought, and what of it the kernel has had.

Records of ``struct fuse_direntplus`` in the order of their ``off``, which is a hash of the name, and arrays that say
where each begins. Nothing here goes through all of them in Python, but where a node was given before. Sans-IO.
"""

from __future__ import annotations

import errno
import struct
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator
from enum import Enum
from itertools import compress
from typing import Final

from protocol.files import ATTR, DIRENT, ENTRY, NAME, Listing

_OVERHEAD: Final = 1024
"""Bytes of a piece beside records and arrays."""

_ENTRY_OUT: Final = ENTRY.size + ATTR.size
"""struct fuse_entry_out, with which a record begins: the whole answer to a LOOKUP."""
_NAME_LENGTH: Final = slice(_ENTRY_OUT + 16, _ENTRY_OUT + 20)
_NAME: Final = _ENTRY_OUT + DIRENT.size
_INODE_AND_SIZE: Final = struct.Struct("<QQ")
"""With which an ``ATTR`` begins."""
_NO_NODE: Final = bytes(8)
_DIRECTORY: Final = 4
"""DT_DIR."""
_FILE: Final = 8
"""DT_REG."""

_FLIPPED: Final = bytes([1, 0]) + bytes(254)
_IS_DIRECTORY: Final = bytes(kind == _DIRECTORY for kind in range(256))
"""For bytes.translate: what is given becomes what is not, and a type whether it is that of a directory."""


class Order(Enum):
    """In which somebody goes through a directory."""

    LISTED = "as it is listed"
    NAME = "by name"  # git(1), which has an index, and whoever sorts
    INODE = "by inode number"  # cp(1) and tar(1)


class Piece:
    """The records that follow offset ``after``. ``asked``: when they were asked for, by ``Directories.begin``.
    ``bare``: of names only, but for directories."""

    __slots__ = (
        "after",
        "asked",
        "bare",
        "blob",
        "end",
        "given",
        "highest",
        "kinds",
        "lowest",
        "nodes",
        "offs",
        "promised",
        "starts",
    )

    def __init__(
        self, after: int, asked: int, listing: Listing, payload: bytes, *, bare: bool = False
    ) -> None:
        """Raises ``OSError`` (EIO) if the parts do not fit together."""
        count, size = listing.count, listing.dirents
        if count < 0 or size < count or len(payload) != size + 21 * count:
            raise OSError(errno.EIO, "not a listing")
        self.after = after
        self.asked = asked
        self.bare = bare
        self.blob = payload[:size]
        self.starts = array("I", payload[size : size + 4 * count])
        self.offs = array("Q", payload[size + 4 * count : size + 12 * count])
        self.nodes = array("Q", payload[size + 12 * count : size + 20 * count])
        self.kinds = payload[size + 20 * count :]
        self.end = listing.end or not count
        """Nothing follows."""
        self.promised = bool(listing.promise & NAME)
        self.given = bytearray(count)
        """1 for each record whose node the kernel has had."""
        self.lowest: int = min(filter(None, self.nodes), default=0)
        self.highest: int = max(self.nodes, default=0)

    @property
    def weight(self) -> int:
        """Bytes in memory."""
        return len(self.blob) + 22 * len(self.given) + _OVERHEAD

    @property
    def directories(self) -> list[int]:
        """Nodes of the directories that are in it."""
        return list(filter(None, compress(self.nodes, self.kinds.translate(_IS_DIRECTORY))))

    def find(self, off: int) -> int | None:
        """The first record after ``off``; None if that is beyond this piece."""
        index = bisect_right(self.offs, off)
        return index if index < len(self.offs) or self.end else None

    def stop(self, index: int, size: int) -> int:
        """How far the whole records from ``index`` on go, ``size`` bytes at most. Raises ``OSError`` for none."""
        starts = self.starts
        if index == len(starts):
            return index
        limit = starts[index] + size
        stop = len(starts) if len(self.blob) <= limit else bisect_right(starts, limit) - 1
        if stop <= index:
            raise OSError(errno.EIO, "a record larger than a page")
        return stop

    def start(self, index: int) -> int:
        """Where in ``blob`` the record begins, or the one before it has ended."""
        return self.starts[index] if index < len(self.starts) else len(self.blob)

    def name(self, index: int) -> bytes:
        record = self.blob[self.starts[index] : self.start(index + 1)]
        return record[_NAME : _NAME + int.from_bytes(record[_NAME_LENGTH], "little")]

    def named(self, index: int, name: bytes) -> bool:
        """Whether that is the name of a record."""
        return self.name(index) == name

    def files(self, index: int = 0) -> Iterator[tuple[int, int]]:
        """Nodes and sizes of the regular files with a node from ``index`` on."""
        for at in self._with_node(_FILE, index):
            yield self.nodes[at], self._inode_and_size(at)[1]

    def keyed_files(self, order: Order) -> Iterator[tuple[bytes | int, int, int]]:
        """The same of all, each behind what such an order goes by."""
        for at in self._with_node(_FILE, 0):
            inode, size = self._inode_and_size(at)
            yield self.name(at) if order is Order.NAME else inode, self.nodes[at], size

    def keyed_directories(self, order: Order) -> Iterator[tuple[bytes | int, int]]:
        """Nodes of the directories in it, each behind what such an order goes by."""
        for at in self._with_node(_DIRECTORY, 0):
            yield self.name(at) if order is Order.NAME else self._inode_and_size(at)[0], self.nodes[at]

    def _with_node(self, kind: int, index: int) -> Iterator[int]:
        while (index := self.kinds.find(kind, index)) >= 0:
            if self.nodes[index]:
                yield index
            index += 1

    def _inode_and_size(self, index: int) -> tuple[int, int]:
        inode, size = _INODE_AND_SIZE.unpack_from(self.blob, self.starts[index] + ENTRY.size)
        return inode, size

    def entry(self, index: int) -> bytes:
        """struct fuse_entry_out of a record."""
        start = self.starts[index]
        return self.blob[start : start + _ENTRY_OUT]

    def attr(self, index: int) -> bytes:
        start = self.starts[index] + ENTRY.size
        return self.blob[start : start + ATTR.size]

    def without_nodes(self, index: int, stop: int, doubtful: Collection[int]) -> bytes:
        """Records from ``index`` to ``stop``, without nodes that were given or are doubtful; the others are given."""
        first = self.starts[index]
        shown = bytearray(self.blob[first : self.start(stop)])
        for one in range(index, stop):
            if self.given[one] or self.nodes[one] in doubtful:
                start = self.starts[one] - first
                shown[start : start + len(_NO_NODE)] = _NO_NODE
            else:
                self.given[one] = 1
        return bytes(shown)

    def left(self) -> list[int]:
        """The nodes that were not given, which nobody will give any more."""
        nodes = list(filter(None, compress(self.nodes, self.given.translate(_FLIPPED))))
        self.given = bytearray(b"\1") * len(self.given)
        return nodes
