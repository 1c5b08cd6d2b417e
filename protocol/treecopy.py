"""What a copy of files carries from the one side to the other: a stream of records.

    u8 kind | u32 mode | i64 mtime | u64 number | u16 name length | u16 target length | name | target

A folder is ENTER, what is in it, LEAVE; a FILE is followed by its content in pieces (data and holes) until
``WHOLE`` or ``BROKEN``; a whole copy ends with END. What begins with ASK is explained in ``treeresume``. The law: a
name is one component and never ``..``, so that who receives goes nowhere but down from where it began, whatever the
sender says; and what has no end is no copy.

Numbers are big-endian, times in nanoseconds since the epoch, names as the filesystem has them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO, Final

from protocol.errors import DecodeError

_HEAD: Final = struct.Struct(">BIqQHH")
_LENGTH: Final = struct.Struct(">I")
_HOLE: Final = struct.Struct(">Q")

#: Bytes of one piece of content at the most: eight packets of ``execio``, and few enough to be read at once.
MAX_PIECE: Final = 256 * 1024
#: Linux's NAME_MAX and PATH_MAX.
MAX_NAME: Final = 255
MAX_TARGET: Final = 4096

_WHOLE: Final = 0
_BROKEN: Final = 0xFFFFFFFF
_IS_HOLE: Final = 0xFFFFFFFE


class Kind(IntEnum):
    ENTER = 1  # a folder; its ``mode``. At the top, ``.`` is the destination itself.
    LEAVE = 2  # the end of what is in it; its ``mtime``
    FILE = 3  # ``number`` is not 0 if other names of it may come
    SYMLINK = 4
    HARDLINK = 5  # another name of the file that was called ``number``
    END = 6
    ASK = 7  # question ``mode``: what is there of the file ``target``, of ``number`` bytes? ``name`` is its identity
    PROVE = 8  # the digest of as much of ours as the answer to question ``mode`` said, in ``name``
    TOTAL = 9  # ``number`` bytes of content are there in all, as far as one can see


@dataclass(frozen=True, slots=True)
class Entry:
    """One record. ``target`` is what a symlink says, of a folder at the top its identity, and of a file that was asked
    for where its content begins."""

    kind: Kind
    name: bytes = b""
    mode: int = 0
    mtime: int = 0
    number: int = 0
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class Hole:
    """A piece of content that is ``size`` zeros, and takes no room."""

    size: int


class Cut(Exception):
    """The stream ended before the copy did."""


def encode(entry: Entry) -> bytes:
    head = _HEAD.pack(entry.kind, entry.mode, entry.mtime, entry.number, len(entry.name), len(entry.target))
    return head + entry.name + entry.target


def read_entry(stream: BinaryIO) -> Entry:
    """The next record. Raises ``Cut``, and ``DecodeError`` for one that no sender would write."""
    kind, mode, mtime, number, name_length, target_length = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if kind not in _KINDS or name_length > MAX_NAME or target_length > MAX_TARGET:
        raise DecodeError(f"a record of kind {kind} with a name of {name_length} bytes")
    name, target = _exactly(stream, name_length), _exactly(stream, target_length)
    if b"/" in name or b"\0" in name or name == b".." or b"\0" in target:
        raise DecodeError(f"a record with the name {name!r}")
    if not name and kind not in _NAMELESS:
        raise DecodeError(f"a record of kind {kind} without a name")
    return Entry(Kind(kind), name, mode, mtime, number, target)


def split_path(path: bytes) -> list[bytes]:
    """The names of a path below the destination, as ASK has it. Raises ``DecodeError`` for one that leads elsewhere."""
    names = path.split(b"/")
    if any(
        not name or len(name) > MAX_NAME or name == b".." or (name == b"." and at)
        for at, name in enumerate(names)
    ):
        raise DecodeError(f"a question about {path!r}")
    return names


_KINDS: Final = frozenset(Kind)
_NAMELESS: Final = frozenset({Kind.LEAVE, Kind.END, Kind.TOTAL})

#: After the last piece of a file.
WHOLE: Final = _LENGTH.pack(_WHOLE)
#: After what could be read of a file whose rest cannot.
BROKEN: Final = _LENGTH.pack(_BROKEN)


def piece_head(length: int) -> bytes:
    """Before ``length`` bytes of content, 1 to ``MAX_PIECE``."""
    return _LENGTH.pack(length)


def hole(size: int) -> bytes:
    return _LENGTH.pack(_IS_HOLE) + _HOLE.pack(size)


def read_piece(stream: BinaryIO) -> bytes | Hole | bool:
    """Content, or at its end whether that is the whole of it. Raises ``Cut``, ``DecodeError``."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length in (_WHOLE, _BROKEN):
        return bool(length == _WHOLE)
    if length == _IS_HOLE:
        (size,) = _HOLE.unpack(_exactly(stream, _HOLE.size))
        return Hole(size)
    if length > MAX_PIECE:
        raise DecodeError(f"a piece of {length} bytes; the limit is {MAX_PIECE}")
    return _exactly(stream, length)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count) if count else b""
    if len(data) < count:
        raise Cut("the copy was cut off")
    return data
