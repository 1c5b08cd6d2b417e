"""The ends of files that the guest has written, which its kernel does not keep.

Of what a program writes the kernel keeps whole pages. The last one is seldom whole, and who reads the file back (git
its index, a linker what the compiler has made) waits for that page alone. So what was written to it is here.

The laws:
- It is as old as the pages that the kernel keeps of the same writes, and goes with them: with each drop of the file's
  data, other own change and ``Changed``, and with the end of the session. What is written while another change of the
  file is under way is not kept at all.
- It is given only while the host promises attributes that are those of after the last write: size and mtime.
- Once, then the kernel has it. ``MAX_FILES`` of a page at the most, the latest.

Sans-IO.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from protocol.files import Changed

PAGE: Final = 4096
"""Bytes of the least page of any kernel: of a larger one nothing is found here."""

MAX_FILES: Final = 256

_SIZE: Final = slice(8, 16)
_MTIME: Final = slice(32, 40)
_MTIME_NSEC: Final = slice(52, 56)
"""Of an ``ATTR``."""


def _identity(attr: bytes) -> bytes:
    return attr[_SIZE] + attr[_MTIME] + attr[_MTIME_NSEC]


class End(NamedTuple):
    """``identity``: of the file whose last page, from ``start`` on, is ``data``."""

    start: int
    data: bytes
    identity: bytes


class Ends:
    """Of one mount."""

    def __init__(self) -> None:
        self._ends: OrderedDict[int, End] = OrderedDict()
        """By node; those written last at the end."""
        self._writing: dict[int, tuple[int, int]] = {}
        """By node, how many writes are under way, and the offset of the only one; -1 if it is not, or in vain."""

    def __contains__(self, node: int) -> bool:
        return node in self._ends

    # --- what is written -------------------------------------------------------------------------------

    def begin(self, node: int, offset: int) -> None:
        """A write is about to be sent; ``end`` follows. ``offset`` -1: it is not to be kept."""
        count, _ = self._writing.get(node, (0, 0))
        self._writing[node] = count + 1, -1 if count else offset

    def end(self, node: int, data: bytes | memoryview = b"", attr: bytes = b"") -> End | None:
        """It is answered: ``data``, if any, is where it was to be, and ``attr`` of the file afterwards. Returns what is
        to be kept once everybody knows that the file has changed."""
        count, offset = self._writing.pop(node)
        if count > 1:
            self._writing[node] = count - 1, offset
        before = self._ends.pop(node, None)
        stop = offset + len(data)
        start = stop - stop % PAGE
        if offset < 0 or not data or start == stop or int.from_bytes(attr[_SIZE], "little") != stop:
            return None
        if offset <= start:
            return End(start, bytes(data[start - offset :]), _identity(attr))
        if before is not None and before.start == start and start + len(before.data) == offset:
            return End(start, before.data + bytes(data), _identity(attr))
        return None

    def keep(self, node: int, end: End) -> None:
        self._ends[node] = end
        if len(self._ends) > MAX_FILES:
            self._ends.popitem(last=False)

    # --- what is read ----------------------------------------------------------------------------------

    def read(self, node: int, offset: int, size: int, attr: bytes | None) -> bytes | None:
        """What a READ is to be answered with. ``attr``: what is promised of the file now, if anything."""
        end = self._ends.get(node)
        if end is None or attr is None or offset != end.start or _identity(attr) != end.identity:
            return None
        if size < len(end.data):
            return None
        del self._ends[node]
        return end.data

    # --- what is dropped -------------------------------------------------------------------------------

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        self.drop(*changed.nodes)

    def drop(self, *nodes: int) -> None:
        """The data of these files may not be what was written."""
        for node in nodes:
            self._ends.pop(node, None)
            if node in self._writing:
                self._writing[node] = self._writing[node][0], -1

    def void(self) -> None:
        """Nothing is told any more."""
        self.drop(*self._ends, *self._writing)
