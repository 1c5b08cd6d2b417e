"""Where requests arrive: read from /dev/fuse so that the data of a write is never copied here.

A request is read into two places at once: its headers into a small buffer, what follows a WRITE's into slots that
the host reads from (``protocol.bulk``). The slots of a write go with its request; for the next one there are others.
Without such memory, or none of it free, everything lands in one buffer, and a write's data is copied out.

The law: there is one place for all connections of the process, since a request is taken over before the next is
read. What a ``Request`` shows of it is valid until then, but for ``Request.run``, which is the handler's to give back.
"""

from __future__ import annotations

import os
from typing import Final

from guest_agent.fuse import abi
from guest_agent.fuse.abi import Opcode, Request
from protocol.bulk import INLINE_BELOW, Bulk, Run

HEAD: Final = 80
"""Bytes of struct fuse_in_header and fuse_write_in: of a WRITE, all but the data."""

_OPCODE: Final = slice(4, 8)
_WRITE: Final = Opcode.WRITE.to_bytes(4, "little")


class Landing:
    """``bulk``: the memory of the plane, from which slots are taken while it is active."""

    def __init__(self, bulk: Bulk | None = None) -> None:
        self._bulk = Bulk() if bulk is None else bulk
        self._whole = bytearray(abi.BUFFER_BYTES)  # whose pages are there: ``GuestPlane.populate``
        self._whole_view = memoryview(self._whole)
        self._head = bytearray(HEAD)
        self._head_view = memoryview(self._head)
        self._run: Run | None = None

    def read(self, descriptor: int) -> Request:
        """The next request. Raises ``OSError`` as readv(2)."""
        run = self._run
        if run is None:
            run = self._run = self._bulk.take(abi.MAX_WRITE)
            if run is None:
                return abi.parse_request(self._whole_view[: os.readv(descriptor, [self._whole])])
        size = os.readv(descriptor, [self._head, run.view])
        if size <= HEAD:
            return abi.parse_request(self._head_view[:size])
        rest = size - HEAD
        if rest < INLINE_BELOW or self._head[_OPCODE] != _WRITE:
            return abi.parse_request(memoryview(b"".join((self._head, run.view[:rest]))))
        request = abi.parse_request(self._head_view)
        run.length = rest
        run.trim()
        request.run, self._run = run, None
        return request
