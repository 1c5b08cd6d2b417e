"""Sessions over a byte pipe that has no connections (virtio-serial), sans-IO.

Bytes written by a dead process reach its successor's peer, whole or cut anywhere; nobody is told when a
process comes or goes. Two layers make sessions of that:

The **preamble** ``MAGIC | own nonce | peer's nonce as known | crc32`` is the only thing a side says until
a preamble comes back that echoes its own nonce. A nonce is fresh per session, so that preamble was sent
by a living peer, after ours, and everything before it belongs to the past. A preamble that shows we are
not known yet is answered with one that says what we know. From then on a preamble with another nonce
means: the peer has begun a new session, and this one is over.

**Records** ``0xD7 | u24be length | bytes | sender's nonce`` carry the session. The nonce at the end is what
a record cut off by a death cannot have: whatever the successor says is swallowed up to the record's
length, and then the nonce is missing. So not one stale or mixed byte is ever delivered, which frames
alone cannot promise (the successor's bytes would complete a data frame of the dead).

A peer that sits inside a cut record would wait for ever, so silence for ``RETRY`` seconds is answered by
``PADDING``, zeros that end any record, and the preamble again. Zeros between records mean nothing. The
law: two sides that run are established after finitely many bytes, whatever was left in the pipe.

Source of the behaviour: hw/char/virtio-console.c of QEMU and drivers/char/virtio_console.c of Linux.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from enum import Enum, auto
from typing import Final

from protocol.errors import LocalProtocolError

# In the manner of PNG: a first byte that is not text, and a line end that a terminal would change.
MAGIC: Final = b"\xf7agctl\r\n"
NONCE_SIZE: Final = 8
UNKNOWN: Final = bytes(NONCE_SIZE)
# Bytes of one record: a full data frame of a session (64 KiB and its header) fits in one. Small, since
# all of it is held until its end has come, and PADDING has to be longer.
MAX_RECORD: Final = 128 * 1024
# Seconds without an echo. A round trip takes 1-2 ms; this is how long a restart after a kill may take.
RETRY: Final = 1.0

_MARK: Final = 0xD7
_HEAD: Final = struct.Struct(">I")
_PREAMBLE: Final = struct.Struct(f">{len(MAGIC)}s{NONCE_SIZE}s{NONCE_SIZE}sI")
PADDING: Final = bytes(_HEAD.size + MAX_RECORD + NONCE_SIZE)


def preamble(nonce: bytes, known: bytes) -> bytes:
    """A preamble: I am ``nonce``, and I take you for ``known``."""
    start = MAGIC + nonce + known
    return start + zlib.crc32(start).to_bytes(4, "big")


class State(Enum):
    IDLE = auto()
    SEARCHING = auto()
    ESTABLISHED = auto()
    LOST = auto()  # the peer has begun a new session, or the pipe has lost bytes


# For what is done for each record: on Python 3.11 the member of an enum is a call away.
_ESTABLISHED: Final = State.ESTABLISHED


class Resync:
    """One end of the pipe, for all its sessions, one after another.

    ``begin`` a session, write what ``data_to_send`` gives, feed ``receive_data``; when ``state`` is
    ESTABLISHED, write ``records`` and ``read`` what came. What a session leaves unread is searched for
    the next one's preamble.
    """

    def __init__(self) -> None:
        self.state = State.IDLE
        self._nonce = self._peer = UNKNOWN
        self._told: bytes | None = None  # the peer's nonce in the last preamble handed out
        self._say, self._pad = False, False
        self._retry_at = math.inf
        self._raw = bytearray()
        self._start = 0
        self._payload = bytearray()

    def begin(self, nonce: bytes, now: float, *, torn: bool = False) -> None:
        """Start a session called ``nonce``, which was never used before.

        ``torn``: our last write may have ended inside a record, so the peer needs padding at once.
        """
        if len(nonce) != NONCE_SIZE or nonce == UNKNOWN:
            raise LocalProtocolError(f"a nonce is {NONCE_SIZE} bytes, not all of them zero")
        self._nonce, self._peer, self._told = nonce, UNKNOWN, None
        self._say, self._pad = True, torn
        self._payload.clear()
        self._retry_at = now + RETRY
        self.state = State.SEARCHING
        self._advance()

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes from the pipe."""
        del self._raw[: self._start]
        self._start = 0
        self._raw += data
        self._advance()

    def exchange(self, data: bytes) -> bytes:
        """``receive_data`` and ``read`` in one; without copies if ``data`` is one record, as it mostly is."""
        if self.state is _ESTABLISHED and self._start == len(self._raw) and not self._payload:
            end = len(data) - NONCE_SIZE
            if end > _HEAD.size and data[end:] == self._peer:
                (head,) = _HEAD.unpack_from(data)
                if head == _MARK << 24 | end - _HEAD.size and end - _HEAD.size <= MAX_RECORD:
                    return data[_HEAD.size : end]
        self.receive_data(data)
        return self.read()

    def read(self, max_bytes: int | None = None) -> bytes:
        """Bytes of the session, in order; ``b""`` if there are none yet."""
        taken = bytes(self._payload if max_bytes is None else self._payload[:max_bytes])
        del self._payload[: len(taken)]
        return taken

    @property
    def readable(self) -> int:
        """Bytes that ``read`` would give."""
        return len(self._payload)

    def data_to_send(self) -> bytes:
        """What to write now to establish the session; ``b""`` if nothing."""
        if not self._say:
            return b""
        padding = PADDING if self._pad else b""
        self._say = self._pad = False
        self._told = self._peer
        return padding + preamble(self._nonce, self._peer)

    def records(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """``data`` as the session's records, to be written in order and whole."""
        if self.state is not _ESTABLISHED:
            raise LocalProtocolError("there is no session to send on")
        with memoryview(data) as view:
            for start in range(0, len(view), MAX_RECORD):
                chunk = view[start : start + MAX_RECORD]
                yield b"".join([_HEAD.pack(_MARK << 24 | len(chunk)), chunk, self._nonce])

    def record(self, data: bytes) -> bytes:
        """``data``, ``MAX_RECORD`` bytes at the most, as one record."""
        if self.state is not _ESTABLISHED:
            raise LocalProtocolError("there is no session to send on")
        return _HEAD.pack(_MARK << 24 | len(data)) + data + self._nonce

    def next_timeout(self) -> float:
        """When to call ``handle_timeout``; infinity for never."""
        return self._retry_at if self.state is State.SEARCHING else math.inf

    def handle_timeout(self, now: float) -> None:
        """Do what is due at ``now``."""
        if now >= self.next_timeout():
            self._say = self._pad = True
            self._retry_at = now + RETRY

    # --- inner -------------------------------------------------------------------------------------

    @property
    def _left(self) -> int:
        return len(self._raw) - self._start

    def _advance(self) -> None:
        while self.state is State.SEARCHING and self._search():
            pass
        while self.state is State.ESTABLISHED and self._read_record():
            pass

    def _search(self) -> bool:
        """Find and take the next preamble; False if more bytes are needed."""
        found = self._raw.find(MAGIC, self._start)
        if found < 0:
            # The tail may be the beginning of one.
            self._start = max(self._start, len(self._raw) - len(MAGIC) + 1)
            return False
        self._start = found
        if self._left < _PREAMBLE.size:
            return False
        if (said := self._parse_preamble()) is None:
            self._start += 1
            return True
        self._start += _PREAMBLE.size
        self._meet(*said)
        return True

    def _parse_preamble(self) -> tuple[bytes, bytes] | None:
        magic, nonce, known, crc = _PREAMBLE.unpack_from(self._raw, self._start)
        start = magic + nonce + known
        if magic != MAGIC or nonce == UNKNOWN or crc != zlib.crc32(start):
            return None
        return nonce, known

    def _meet(self, nonce: bytes, known: bytes) -> None:
        self._peer = nonce
        if known == self._nonce:
            self.state = State.ESTABLISHED
            self._say, self._pad = self._told != nonce, False
        else:
            self._say = True

    def _read_record(self) -> bool:
        """Take what comes next in the session; False if more bytes are needed, or it is over."""
        if not self._skip_zeros():
            return False
        first = self._raw[self._start]
        if first == _MARK:
            return self._take_record()
        if first == MAGIC[0]:
            return self._take_preamble()
        self.state = State.LOST
        return False

    def _skip_zeros(self) -> bool:
        """False if nothing is left."""
        if self._left and self._raw[self._start] == 0:
            self._start = len(self._raw) - len(self._raw[self._start :].lstrip(b"\0"))
        return self._left > 0

    def _take_record(self) -> bool:
        if self._left < _HEAD.size:
            return False
        (head,) = _HEAD.unpack_from(self._raw, self._start)
        length = head & 0xFFFFFF
        begin = self._start + _HEAD.size
        end = begin + length
        if length <= MAX_RECORD and len(self._raw) < end + NONCE_SIZE:
            return False
        if length > MAX_RECORD or self._raw[end : end + NONCE_SIZE] != self._peer:
            # Not taken: the preamble of whoever cut it short may be inside.
            self.state = State.LOST
            return False
        self._payload += memoryview(self._raw)[begin:end]
        self._start = end + NONCE_SIZE
        return True

    def _take_preamble(self) -> bool:
        if self._left < _PREAMBLE.size:
            return False
        said = self._parse_preamble()
        if said is None or said[0] != self._peer:
            self.state = State.LOST
            return False
        self._start += _PREAMBLE.size  # one that crossed ours on the way
        return True
