"""What a guest says is in a directory, read with care.

The law: a name that is none is left out, positions only grow, and no piece is longer than it says; so a listing ends,
however the guest makes it up.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from host_agent.view.tree import is_name
from protocol.files import ATTR, DIRENT, Listing

_NONE: Final = bytes(ATTR.size)
_MAX_POSITION: Final = (1 << 63) - 1


class Record(NamedTuple):
    """``attr`` is empty for a name that went while it was listed. ``position``: from where to go on behind it."""

    name: bytes
    attr: bytes
    position: int


def records(listing: Listing, payload: bytes, after: int) -> list[Record]:
    """Those of one piece that was asked for ``after`` a position. Raises ``OSError`` (EIO) for what is no listing."""
    heads: list[tuple[bytes, int]] = []
    at, last = 0, after
    if not 0 <= listing.dirents <= len(payload):
        raise _malformed()
    while at < listing.dirents:
        if at + DIRENT.size > listing.dirents:
            raise _malformed()
        _, position, length, _ = DIRENT.unpack_from(payload, at)
        at += DIRENT.size
        name = payload[at : at + length]
        at += length + -(DIRENT.size + length) % 8
        if len(name) != length or not last < position <= _MAX_POSITION:
            raise _malformed()
        last = position
        heads.append((name, position))
    attrs = payload[listing.dirents :]
    if at != listing.dirents or len(attrs) not in (0, ATTR.size * len(heads)):
        raise _malformed()
    found = []
    for number, (name, position) in enumerate(heads):
        attr = attrs[number * ATTR.size : (number + 1) * ATTR.size]
        if is_name(name):
            found.append(Record(name, b"" if attr == _NONE else attr, position))
    return found


def _malformed() -> OSError:
    return OSError(errno.EIO, "not a listing")
