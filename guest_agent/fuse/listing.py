"""Directory streams: what the kernel reads page by page, from pieces that the host sends.

A piece (``protocol.files.Listing``) holds thousands of records that are in FUSE's own layout, so a page is a
slice of it, cut between two records. A record's ``off`` is where the stream goes on after it, for whoever
knows it: a stream that this process has never heard of (it was opened before a restart), or whose piece
was dropped, or that was rewound, is read from the host again.

The law: what all streams hold is bounded by ``MAX_HELD``; one piece each, and none once it is read.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections import OrderedDict
from typing import Final, Protocol

from guest_agent.fuse.host import Ask
from protocol.files import DIRENT, List, Listing

log = logging.getLogger(__name__)

MAX_HELD: Final = 16 << 20
"""Bytes of pieces. Streams beyond that, least recently read first, ask the host once more."""
MAX_STREAMS: Final = 4096
"""Streams that are remembered; as above."""

_DIRECTORY: Final = 4
"""DT_DIR."""
_UNKNOWN_INODE: Final = 0xFFFFFFFF
"""What libfuse shows for names whose inode number is not known (FUSE_UNKNOWN_INO)."""
_SELF_OFF, _PARENT_OFF = 1, 2
_PARENT = DIRENT.pack(_UNKNOWN_INODE, _PARENT_OFF, 2, _DIRECTORY) + b"..\0\0\0\0\0\0"
_DOTS = {
    0: DIRENT.pack(_UNKNOWN_INODE, _SELF_OFF, 1, _DIRECTORY) + b".\0\0\0\0\0\0\0" + _PARENT,
    _SELF_OFF: _PARENT,
}
"""``.`` and ``..``, which the host does not list and programs expect, by the offset they are read at. Their own
offsets are no names' (hashes of 62 bits)."""

_OFF = struct.Struct("<8xQ")
_NAME_LENGTH = struct.Struct("<16xI")


class Asker(Protocol):
    def ask(self, call: List) -> Ask[Listing]: ...


class Stream:
    """Where one open directory is: the records of ``piece`` from byte ``position`` follow offset ``off``."""

    __slots__ = ("end", "off", "piece", "position")

    def __init__(self) -> None:
        self.piece = b""
        self.position = 0
        self.off = -1
        self.end = False

    def seek(self, off: int) -> bool:
        """Go to just after the record of ``off``; False if it is not known here where that is."""
        if off == self.off:
            return self.position < len(self.piece) or self.end
        self.off = -1
        position = 0
        while position < len(self.piece):
            here = _OFF.unpack_from(self.piece, position)[0]
            position = _next(self.piece, position)
            if here == off:
                self.position, self.off = position, off
                return position < len(self.piece) or self.end
        return False

    def fill(self, off: int, piece: bytes, end: bool) -> None:
        self.piece, self.position, self.off, self.end = piece, 0, off, end

    def take(self, size: int) -> bytes:
        """The next whole records, ``size`` bytes at most."""
        piece, start = self.piece, self.position
        stop = last = start
        most = min(len(piece), start + size)
        while stop < most and (following := _next(piece, stop)) <= most:
            last, stop = stop, following
        if stop > start:
            self.off = _OFF.unpack_from(piece, last)[0]
            self.position = stop
        return piece[start:stop]

    def drop_read(self) -> int:
        """Let go of a piece that has been read; returns the bytes that are still held."""
        if self.position >= len(self.piece):
            self.piece, self.position = b"", 0
        return len(self.piece)


def _next(piece: bytes, position: int) -> int:
    """Where the record after the one at ``position`` begins. Raises ``struct.error`` for half a record."""
    length: int = _NAME_LENGTH.unpack_from(piece, position)[0]
    return position + (24 + length + 7 & ~7)


class Listings:
    """The directory streams of one share."""

    def __init__(self, host: Asker, share: int, first_handle: int) -> None:
        """``first_handle``: not in the range of a predecessor, whose streams are still open in the kernel."""
        self._host = host
        self._share = share
        self._next_handle = first_handle
        self._streams: OrderedDict[int, Stream] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of pieces in memory."""
        return self._held

    def open(self) -> int:
        """A new stream's handle."""
        self._next_handle += 1
        return self._next_handle

    def close(self, handle: int) -> None:
        self._streams.pop(handle, None)
        self._held -= self._sizes.pop(handle, 0)

    async def read(self, unique: int, node: int, handle: int, off: int, size: int) -> bytes:
        """Whole records after ``off``, at least one unless there are none, and at most ``size`` bytes."""
        dots = _DOTS.get(off, b"")
        after = 0 if off <= _PARENT_OFF else off
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = Stream()
        if off == 0 or not stream.seek(after):
            await self._fetch(stream, unique, node, handle, after)
        records = stream.take(size - len(dots))
        if stream.piece and not records and stream.position < len(stream.piece):
            raise OSError(errno.EIO, "half a record")
        self._account(handle, stream)
        return dots + records

    async def _fetch(self, stream: Stream, unique: int, node: int, handle: int, after: int) -> None:
        ask = self._host.ask(List(self._share, unique, node, handle, after))
        listing = await ask
        stream.fill(after, ask.received[: listing.dirents], listing.end or not listing.dirents)

    def _account(self, handle: int, stream: Stream) -> None:
        """Keep the books, and within the limits."""
        if self._streams.get(handle) is not stream:
            return  # closed while it was read
        self._streams.move_to_end(handle)
        size = stream.drop_read()
        self._held += size - self._sizes.get(handle, 0)
        self._sizes[handle] = size
        while (self._held > MAX_HELD or len(self._streams) > MAX_STREAMS) and len(self._streams) > 1:
            self.close(next(iter(self._streams)))
