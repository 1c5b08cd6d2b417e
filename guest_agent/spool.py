"""What was answered ahead and may not have come to the host, kept where the end of this process does not reach.

What has left is not lost with a killed files agent; and a host that is killed alone is asked again. Only with both of
them killed at once nobody would know of a write any more that its program holds for done. So each is written here
before its program is answered: to a file in the guest's memory, behind the numbers of the fence. The laws:

- A record is whole before its ticket is published, and no other begins where one is that may still be outstanding.
- Records follow each other from the beginning, by ticket; once all have landed the next one is the first again.
- There is room for ``MOST`` bytes: who finds none is not answered ahead.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

START: Final = 4096
"""Where the first record begins, in bytes: behind the fence's page."""

MOST: Final = 16 << 20
"""Bytes of records: twice what may be under way, so that the beginning is reached again in time."""

KEPT: Final = 1 << 20
"""Bytes of the file that are not given back to the guest once all has landed."""

_HEAD: Final = struct.Struct("<QII")
"""The ticket, and the bytes of the call and of its payload."""


class Left(NamedTuple):
    """A record of a predecessor."""

    ticket: int
    call: bytes
    payload: bytes


class Spool:
    """``descriptor``: of the file, which is owned."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0

    def keep(self, ticket: int, call: bytes, payload: bytes | memoryview) -> bool:
        """Keep one record more; False if there is no room."""
        head = _HEAD.pack(ticket, len(call), len(payload))
        size = len(head) + len(call) + len(payload)
        if self._end + size > MOST:
            return False
        try:
            if os.pwritev(self._descriptor, [head, call, payload], START + self._end) < size:
                return False
        except OSError:
            return False
        self._end += size
        return True

    def clear(self) -> None:
        """All that was kept has landed."""
        if self._end > KEPT:
            os.truncate(self._descriptor, START + KEPT)
        self._end = 0

    def left(self, landed: int, answered: int) -> list[Left]:
        """Those with the tickets from behind ``landed`` to ``answered``, as far as they are here; what is kept next
        comes behind them."""
        left: list[Left] = []
        end, before = 0, None
        while (head := self._read(end, _HEAD.size)) is not None:
            ticket, call_size, payload_size = _HEAD.unpack(head)
            if ticket > answered or (before is not None and ticket != before + 1):
                break
            rest = self._read(end + _HEAD.size, call_size + payload_size)
            if rest is None:
                break
            before = ticket
            end += _HEAD.size + len(rest)
            if ticket > landed:
                left.append(Left(ticket, rest[:call_size], rest[call_size:]))
        self._end = end if left else 0
        return left

    def _read(self, offset: int, size: int) -> bytes | None:
        if offset + size > MOST:
            return None
        data = os.pread(self._descriptor, size, START + offset)
        return data if len(data) == size else None
