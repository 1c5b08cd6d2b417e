"""Datagrams over a stream: each is its length (u16, big-endian) and its bytes, back to back. Sans-IO."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from protocol.errors import DecodeError

MAX_DATAGRAM: Final = 65_507
"""Bytes that UDP carries over IPv4 (RFC 768: 65,535 less both headers); over IPv6 20 more, which nobody relies on."""

_LENGTH: Final = struct.Struct(">H")


def encode(datagrams: Sequence[bytes]) -> bytes:
    """Their wire form. Each has ``MAX_DATAGRAM`` bytes at the most."""
    return b"".join(part for datagram in datagrams for part in (_LENGTH.pack(len(datagram)), datagram))


class DatagramReader:
    """Cuts what a stream brings into datagrams, whatever the pieces are that it comes in."""

    def __init__(self) -> None:
        self._rest = b""

    def receive_data(self, data: bytes | memoryview) -> list[bytes]:
        """The datagrams that are complete now. Raises ``DecodeError`` for one that is too long."""
        whole = self._rest + data if self._rest else bytes(data)
        datagrams: list[bytes] = []
        start = 0
        while start + _LENGTH.size <= len(whole):
            (length,) = _LENGTH.unpack_from(whole, start)
            if length > MAX_DATAGRAM:
                raise DecodeError(f"a datagram of {length} bytes: at most {MAX_DATAGRAM} are possible")
            end = start + _LENGTH.size + length
            if end > len(whole):
                break
            datagrams.append(whole[start + _LENGTH.size : end])
            start = end
        self._rest = whole[start:]
        return datagrams

    @property
    def complete(self) -> bool:
        """Whether nothing of a datagram is left that has not come whole."""
        return not self._rest
