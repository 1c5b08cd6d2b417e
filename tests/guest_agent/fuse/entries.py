"""What the host sends of a directory: records, arrays, and pieces of them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.files import ATTR, DIRENT, ENTRY, FOREVER, NAME, Listing, position

DIRECTORY, FILE = 4, 8


@dataclass(frozen=True, slots=True)
class Name:
    """A name of a directory. ``node`` 0: nothing is promised of it."""

    name: bytes
    node: int = 0
    kind: int = FILE
    size: int = 12

    @property
    def attr(self) -> bytes:
        if not self.node:
            return bytes(ATTR.size)
        mode = 0o040755 if self.kind == DIRECTORY else 0o100644
        return ATTR.pack(self.node + 1000, self.size, 8, 1, 2, 3, 4, 5, 6, mode, 1, 1000, 1000, 0, 4096, 0)

    @property
    def entry(self) -> bytes:
        """The answer to a LOOKUP."""
        seconds = FOREVER if self.node else 0
        return ENTRY.pack(self.node, 0, seconds, seconds, 0, 0) + self.attr

    def record(self, off: int) -> bytes:
        dirent = DIRENT.pack(off ^ 0xABC, off, len(self.name), self.kind) + self.name
        return self.entry + dirent + bytes(-len(dirent) % 8)


def numbered(count: int, first_node: int = 1000, kind: int = FILE) -> list[Name]:
    return [Name(b"name-%d" % number, first_node + number, kind) for number in range(count)]


def placed(names: Iterable[Name]) -> list[tuple[int, Name]]:
    """In the order of their offsets."""
    found, last = [], 0
    for at, _, name in sorted((position(name.name), name.name, name) for name in set(names)):
        last = max(at, last + 1)
        found.append((last, name))
    return found


def payload(names: Sequence[tuple[int, Name]]) -> bytes:
    starts, records = [], b""
    for off, name in names:
        starts.append(len(records))
        records += name.record(off)
    count = len(names)
    return b"".join(
        (
            records,
            struct.pack(f"<{count}I", *starts),
            struct.pack(f"<{count}Q", *(off for off, _ in names)),
            struct.pack(f"<{count}Q", *(name.node for _, name in names)),
            bytes(name.kind for _, name in names),
        )
    )


def piece_of(
    names: Sequence[tuple[int, Name]], after: int, most: int = 1 << 30, promise: int = NAME
) -> tuple[Listing, bytes]:
    """The answer to a ``ListEntries`` of a directory with these names."""
    rest = [(off, name) for off, name in names if off > after]
    data = payload(rest[:most])
    count = min(most, len(rest))
    return Listing(len(data) - 21 * count, len(rest) <= most, promise, count), data


@dataclass(frozen=True, slots=True)
class Shown:
    """A record as the kernel reads it."""

    name: bytes
    off: int
    node: int


def shown(page: bytes) -> list[Shown]:
    """The records of a page, which must be whole."""
    found, start = [], 0
    while start < len(page):
        node, *_ = ENTRY.unpack_from(page, start)
        at = start + ENTRY.size + ATTR.size
        _, off, length, _ = DIRENT.unpack_from(page, at)
        at += DIRENT.size
        found.append(Shown(page[at : at + length], off, node))
        start = at + length + -length % 8
    assert start == len(page)
    return found
