"""Frames: ``u32be header_len | u32be payload_len | header | payload``.

The header is one msgpack array, the payload raw bytes that never pass through msgpack. The law: what a
peer *says* about lengths costs nothing; memory is only taken for bytes that have arrived, and no more
than one frame of them is ever kept. A header of length 0 does not exist, so zeros are never a frame.

Text is UTF-8, with ``surrogateescape`` both ways: a file name or an argument that is no valid UTF-8
crosses the link as the operating system gave it.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple, NoReturn

import msgpack

from protocol.errors import LocalProtocolError, RemoteProtocolError

Buffer = bytes | bytearray | memoryview

PREFIX: Final = struct.Struct(">II")
_PREFIX_SIZE: Final = PREFIX.size
_read_prefix: Final = PREFIX.unpack_from

# A header holds one message without its bulk. The longest is a list of every listening socket or a
# command line with its environment (Linux allows 128 KiB for a single string of those).
MAX_HEADER: Final = 256 * 1024
# A chunk of a stream. HTTP/2's default is 16 KiB; 64 KiB is what a pipe, a read() of ours and a socket
# buffer hold, and takes 2 ms on a virtio-serial port, so a control frame never waits longer than that.
MAX_PAYLOAD: Final = 64 * 1024
# Elements of one array or map of a header: an element is at least a byte, but costs 8 to 64 in memory.
MAX_ITEMS: Final = 64 * 1024


# One for all: each takes a buffer of 1 MiB, which is two thirds of the time of a small frame. It runs no Python code,
# so no two threads meet in it, and it is empty again after an error.
_PACKER: Final = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape")


class Frame(NamedTuple):
    """A frame whose lengths and msgpack are right; nothing is known of its meaning yet."""

    header: Any
    payload: bytes


def encode_frame(header: list[Any], payload: Buffer = b"", *, max_payload: int = MAX_PAYLOAD) -> list[Buffer]:
    """The buffers of one frame, in order; ``payload`` is passed through, not copied.

    Raises ``LocalProtocolError`` when it would not fit, or ``header`` holds what msgpack cannot say.
    """
    try:
        packed: bytes = _PACKER.pack(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"a header that msgpack cannot encode: {error}") from error
    if len(packed) > MAX_HEADER:
        raise LocalProtocolError(f"a header of {len(packed)} bytes; the limit is {MAX_HEADER}")
    if len(payload) > max_payload:
        raise LocalProtocolError(f"a payload of {len(payload)} bytes; the limit is {max_payload}")
    start = PREFIX.pack(len(packed), len(payload)) + packed
    return [start, payload] if payload else [start]


def _unpack(packed: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(
            packed,
            raw=False,
            unicode_errors="surrogateescape",
            strict_map_key=True,
            max_str_len=MAX_HEADER,
            max_bin_len=MAX_HEADER,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except Exception as error:
        # Not a closed set: besides its own exceptions and ValueError (nesting, limits, surplus bytes)
        # msgpack says "other exceptions can be raised during unpacking". The header is all it saw.
        raise RemoteProtocolError(f"a header that is not msgpack: {type(error).__name__}: {error}") from error


class FrameDecoder:
    """Bytes in, frames out: ``receive_data`` what arrived, then ``next_frame`` until it gives None.

    A frame that cannot be right raises ``RemoteProtocolError`` from ``next_frame``, now and ever after.
    """

    def __init__(self, *, max_header: int = MAX_HEADER, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_header = max_header
        self._max_payload = max_payload
        self._buffer: bytes | bytearray = b""
        self._start = 0

    def receive_data(self, data: Buffer) -> None:
        """Add bytes as they came from the transport."""
        buffer = self._buffer
        if self._start == len(buffer):
            # Mostly a read brings whole frames, which are taken from where they lie.
            self._buffer = data if type(data) is bytes else bytearray(data)
        elif type(buffer) is bytearray:
            # Cut off what next_frame has taken once per read, not once per frame: that would be quadratic.
            del buffer[: self._start]
            buffer += data
        else:
            with memoryview(buffer) as view:
                self._buffer = bytearray(view[self._start :])
            self._buffer += data
        self._start = 0

    @property
    def buffered(self) -> int:
        """Bytes received and not yet part of a frame that was given out."""
        return len(self._buffer) - self._start

    def next_frame(self) -> Frame | None:
        """The next complete frame, or None until more bytes arrive."""
        buffer, start = self._buffer, self._start
        size = len(buffer)
        if size - start < _PREFIX_SIZE:
            return None
        header_len, payload_len = _read_prefix(buffer, start)
        if not 0 < header_len <= self._max_header or payload_len > self._max_payload:
            self._refuse(header_len, payload_len)
        header_at = start + _PREFIX_SIZE
        payload_at = header_at + header_len
        end = payload_at + payload_len
        if size < end:
            return None
        if type(buffer) is bytes:
            header = _unpack(buffer[header_at:payload_at])
            payload = buffer[payload_at:end]
        else:
            with memoryview(buffer) as view:
                with view[header_at:payload_at] as packed:
                    header = _unpack(packed)
                payload = bytes(view[payload_at:end])
        self._start = end
        return Frame(header, payload)

    def _refuse(self, header_len: int, payload_len: int) -> NoReturn:
        if header_len == 0:
            raise RemoteProtocolError("a frame without a header")
        if header_len > self._max_header:
            raise RemoteProtocolError(f"a header of {header_len} bytes; the limit is {self._max_header}")
        raise RemoteProtocolError(f"a payload of {payload_len} bytes; the limit is {self._max_payload}")
