"""What an exec stream carries: ``u8 kind | u32be length | bytes``, both ways.

Towards the process: ``Stdin``, ``StdinEof``, ``Resize``, ``Signal``. Back: ``Stdout``, ``Stderr`` and at
last ``Exit``. The law: a packet is small (``MAX_DATA``) and its length is believed only after its kind
allows it, so a peer cannot make this side wait for, or hold, more than one packet's bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from protocol.errors import DecodeError, LocalProtocolError

# Bytes of one packet of stdin, stdout or stderr; with its head it still fits one chunk of the stream.
MAX_DATA: Final = 32 * 1024

_HEAD: Final = struct.Struct(">BI")
_SIZE: Final = struct.Struct(">HH")
_SIGNAL: Final = struct.Struct(">B")
_EXIT: Final = struct.Struct(">i")


@dataclass(frozen=True, slots=True)
class Stdin:
    """Up to ``MAX_DATA`` bytes for the process."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StdinEof:
    """No more input."""


@dataclass(frozen=True, slots=True)
class Stdout:
    """Up to ``MAX_DATA`` bytes from the process; with a terminal, everything it shows."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Stderr:
    """Up to ``MAX_DATA`` bytes from the process."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """The terminal's new size, in character cells."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Signal:
    """Send the process's group a signal, by its Linux number."""

    number: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The end, as a shell would report it: the exit code, or 128 + signal."""

    code: int


Packet = Stdin | StdinEof | Stdout | Stderr | Resize | Signal | Exit


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one class of packets is written. ``longest`` and ``shortest`` bound the body, in bytes."""

    cls: Callable[..., Packet]
    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], tuple[Any, ...]]
    shortest: int
    longest: int


def _of_data(cls: Callable[[bytes], Packet]) -> _Kind:
    return _Kind(cls, lambda packet: packet.data, lambda body: (body,), 0, MAX_DATA)


def _of_struct(cls: Callable[..., Packet], form: struct.Struct, fields: tuple[str, ...]) -> _Kind:
    def pack(packet: Packet) -> bytes:
        return form.pack(*[getattr(packet, name) for name in fields])

    return _Kind(cls, pack, form.unpack, form.size, form.size)


_KINDS: Final[dict[int, _Kind]] = {
    1: _of_data(Stdin),
    2: _of_struct(StdinEof, struct.Struct(""), ()),
    3: _of_data(Stdout),
    4: _of_data(Stderr),
    5: _of_struct(Resize, _SIZE, ("rows", "columns")),
    6: _of_struct(Signal, _SIGNAL, ("number",)),
    7: _of_struct(Exit, _EXIT, ("code",)),
}
_NUMBERS: Final[dict[Any, int]] = {kind.cls: number for number, kind in _KINDS.items()}


def encode(packet: Packet) -> bytes:
    """The bytes of one packet. Raises ``LocalProtocolError`` for data too long or numbers out of range."""
    number = _NUMBERS[type(packet)]
    kind = _KINDS[number]
    try:
        body = kind.pack(packet)
    except struct.error as error:
        raise LocalProtocolError(f"{packet!r} does not fit its packet: {error}") from error
    if len(body) > kind.longest:
        raise LocalProtocolError(f"a packet of {len(body)} bytes; the limit is {kind.longest}")
    return _HEAD.pack(number, len(body)) + body


class Decoder:
    """Bytes in, packets out. Raises ``DecodeError`` for bytes that no sender of packets would send."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> list[Packet]:
        """The packets that ``data`` completes, in order."""
        self._buffer += data
        packets: list[Packet] = []
        start = 0
        while (end := self._end_of_packet(start)) is not None:
            packets.append(self._packet(start, end))
            start = end
        del self._buffer[:start]
        return packets

    def receive_eof(self) -> None:
        """The stream has ended. Raises ``DecodeError`` if it did so within a packet."""
        if self._buffer:
            raise DecodeError("the exec stream ended in the middle of a packet")

    def _end_of_packet(self, start: int) -> int | None:
        """Where the packet at ``start`` ends; None while it is incomplete."""
        if len(self._buffer) - start < _HEAD.size:
            return None
        number, length = _HEAD.unpack_from(self._buffer, start)
        kind = _KINDS.get(number)
        if kind is None:
            raise DecodeError(f"an exec packet of unknown kind {number}")
        if not kind.shortest <= length <= kind.longest:
            raise DecodeError(f"an exec packet of kind {number} with {length} bytes")
        end: int = start + _HEAD.size + length
        return end if end <= len(self._buffer) else None

    def _packet(self, start: int, end: int) -> Packet:
        kind = _KINDS[self._buffer[start]]
        return kind.cls(*kind.unpack(bytes(self._buffer[start + _HEAD.size : end])))
