"""Bytes of a connection over a long way, packed where that pays, sans-IO: below the records, above the transport.

Only for what no stranger has a part in: how long a packed block is tells who chooses some of it about the rest.

Each side begins with a **greeting**, ``MAGIC | u8 length | names of codecs, separated by commas``, and says nothing
else until it has heard the other's. From then on it sends **blocks**, ``u8 kind | u24be length | bytes``: RAW as they
are; PACKED a u32be, how long they were, and what the codec made of them; FILL zeros, which only count; ACK a u32be, how
many bytes of blocks have come since the last one. The codec of a direction is the first of the receiver's that its
sender has, and all its packed blocks are one stream. Who hears a preamble (``resync``) in the place of a greeting has a
peer that does not know of this, which has taken our greeting for what the dead had left: all goes as it is then.

The law: whatever comes, it ends in bytes that were sent or in a ``RemoteProtocolError``; memory is bounded by one block
and by 64 times what has arrived (``MOST_GAIN``), which who packs keeps to with FILL.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from protocol import resync
from protocol.compression import MAX_BLOCK, MOST_PACKED, Compressor, Decompressor, codecs
from protocol.errors import RemoteProtocolError
from protocol.worth import ACKNOWLEDGED, Worth

if TYPE_CHECKING:  # a copy's process has no msgpack
    from protocol.frames import Buffer

MAGIC: Final = b"\xf6agctl\r\n"
"""As a preamble's, and not the same in the first byte."""

RAW, PACKED, FILL, ACK = 1, 2, 3, 4

MOST_GAIN: Final = 64
"""How many times as long bytes may be when they are unpacked: a machine that sends the shortest blocks there are makes
us hold no more than this for each byte that it sends. Zeros would be some thousand times; nothing else comes near."""

_HEAD: Final = struct.Struct(">I")
_LONGEST: Final = {
    RAW: MAX_BLOCK,
    PACKED: _HEAD.size + MOST_PACKED,
    FILL: MAX_BLOCK // MOST_GAIN,
    ACK: _HEAD.size,
}
_ZEROS: Final = bytes(MAX_BLOCK // MOST_GAIN)


class Packing:
    """One side of a connection."""

    def __init__(
        self, offered: Sequence[str] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``offered``: names of codecs, the best first; without, all there are. ``clock``: in seconds."""
        names = list(codecs()) if offered is None else [name for name in offered if name in codecs()]
        self._names = names
        self._clock = clock
        said = ",".join(names).encode()
        self.greeting = MAGIC + bytes([len(said)]) + said
        """To be sent before all else."""
        self.ready = False
        """Whether it is known what the other side understands, so that bytes can be sent."""
        self.worth = Worth()
        self._plain = False
        self._compressor: Compressor | None = None
        self._decompressor: Decompressor | None = None
        self._buffer = bytearray()
        self._filled = 0
        self._came = 0

    @classmethod
    def one_way(cls, codec: str) -> Packing:
        """For bytes that go one way only, and whose two sides know the codec."""
        packing = cls([codec])
        packing._agree([codec])
        return packing

    @property
    def is_plain(self) -> bool:
        """Whether the other side does not know of this."""
        return self._plain

    # --- out ---------------------------------------------------------------------------------------

    def encode(self, data: Buffer) -> Buffer:
        """What to send for ``data``. Only when it is ``ready``."""
        if self._plain:
            return data
        if len(data) <= MAX_BLOCK:
            sent = self._block(data)
        else:
            with memoryview(data) as view:
                pieces = range(0, len(view), MAX_BLOCK)
                sent = b"".join([self._block(view[at : at + MAX_BLOCK]) for at in pieces])
        self.worth.sent(len(sent), self._clock())
        return sent

    def _block(self, data: Buffer) -> bytes:
        if self._compressor is None or not self.worth.wants(len(data)):
            return b"".join([_HEAD.pack(RAW << 24 | len(data)), data])
        began = self._clock()
        packed = self._compressor.compress(bytes(data))
        self.worth.packed(len(data), len(packed), self._clock() - began)
        head = _HEAD.pack(PACKED << 24 | _HEAD.size + len(packed)) + _HEAD.pack(len(data))
        missing = -(-len(data) // MOST_GAIN) - len(packed)
        if missing > 0:
            return b"".join([_HEAD.pack(FILL << 24 | missing), _ZEROS[:missing], head, packed])
        return b"".join([head, packed])

    def acknowledgement(self) -> bytes:
        """What to send of what has come, b"" for nothing."""
        if self._came < ACKNOWLEDGED:
            return b""
        came, self._came = self._came, 0
        return _HEAD.pack(ACK << 24 | _HEAD.size) + _HEAD.pack(came)

    # --- in ----------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> bytes:
        """What ``data``, the next bytes from the transport, however they are split, bring of what was sent.

        Raises ``RemoteProtocolError``, after which nothing more can come."""
        if self._plain:
            return data
        self._buffer += data
        return self._read_blocks() if self.ready else self._meet()

    def _meet(self) -> bytes:
        """Find out who the other side is; what login programs have said before is dropped."""
        buffer = self._buffer
        greeting, preamble = buffer.find(MAGIC), buffer.find(resync.MAGIC)
        if preamble >= 0 and not 0 <= greeting < preamble:
            self._plain = self.ready = True
            self._buffer = bytearray()
            return bytes(buffer)
        if greeting < 0:
            del buffer[: -len(MAGIC)]
            return b""
        del buffer[:greeting]
        start = len(MAGIC) + 1
        if len(buffer) < start or len(buffer) < start + buffer[start - 1]:
            return b""
        end = start + buffer[start - 1]
        theirs = bytes(buffer[start:end]).decode("ascii", "replace").split(",")
        del buffer[:end]
        self._agree(theirs)
        return self._read_blocks()

    def _agree(self, theirs: list[str]) -> None:
        out = next((name for name in theirs if name in self._names), None)
        back = next((name for name in self._names if name in theirs), None)
        self._compressor = None if out is None else codecs()[out].compressor()
        self._decompressor = None if back is None else codecs()[back].decompressor()
        self.ready = True

    def _read_blocks(self) -> bytes:
        found: list[bytes] = []
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= _HEAD.size:
                (head,) = _HEAD.unpack_from(view, start)
                kind, length = head >> 24, head & 0xFFFFFF
                if length > _LONGEST.get(kind, -1):
                    raise RemoteProtocolError(f"a block of kind {kind} and {length} bytes")
                end = start + _HEAD.size + length
                if len(view) < end:
                    break
                if data := self._read_block(kind, bytes(view[start + _HEAD.size : end])):
                    found.append(data)
                if kind != ACK:
                    self._came += end - start
                start = end
        del self._buffer[:start]
        return found[0] if len(found) == 1 else b"".join(found)

    def _read_block(self, kind: int, body: bytes) -> bytes:
        if kind == RAW:
            return body
        if kind == FILL:
            self._filled += len(body)
            return b""
        if len(body) < _HEAD.size:
            raise RemoteProtocolError(f"a block of kind {kind} and {len(body)} bytes")
        (number,) = _HEAD.unpack_from(body)
        if kind == PACKED:
            return self._unpack(body[_HEAD.size :], number)
        if not self.worth.acknowledged(number, self._clock()):
            raise RemoteProtocolError("more bytes are acknowledged than were sent")
        return b""

    def _unpack(self, packed: bytes, size: int) -> bytes:
        filled, self._filled = self._filled, 0
        if self._decompressor is None:
            raise RemoteProtocolError("a packed block, by no codec of ours")
        if not 0 < size <= min(MAX_BLOCK, MOST_GAIN * (len(packed) + filled)):
            raise RemoteProtocolError(f"{len(packed)} bytes that are to be {size}")
        try:
            return self._decompressor.decompress(packed, size)
        except ValueError as error:
            raise RemoteProtocolError(f"a packed block that is damaged: {error}") from error
