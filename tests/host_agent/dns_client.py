"""DNS as its clients speak it: queries made, answers read, both independent of what is tested."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

OPTION = struct.Struct("!BHHIH")


@dataclass
class Answer:
    """``addresses`` in their order, whatever their type."""

    ident: int
    code: int
    truncated: bool
    addresses: list[str] = field(default_factory=list)
    ttls: list[int] = field(default_factory=list)


def ask(name: str, kind: int, *, ident: int = 1, option: int | None = None) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    header = struct.pack("!HHHHHH", ident, 0x0100, 1, 0, 0, 0 if option is None else 1)
    tail = b"" if option is None else OPTION.pack(0, 41, option, 0, 0)
    return header + labels + b"\0" + struct.pack("!HH", kind, 1) + tail


def read(message: bytes) -> Answer:
    ident, flags, questions, records, *_ = struct.unpack_from("!HHHHHH", message)
    assert flags & 0x8000
    answer = Answer(ident, flags & 0xF, bool(flags & 0x0200))
    position = 12
    for _ in range(questions):
        while message[position]:
            position += 1 + message[position]
        position += 5
    for _ in range(records):
        assert message[position : position + 2] == b"\xc0\x0c"
        kind, klass, ttl, length = struct.unpack_from("!HHIH", message, position + 2)
        data = message[position + 12 : position + 12 + length]
        family = {1: socket.AF_INET, 28: socket.AF_INET6}[kind]
        assert klass == 1
        answer.addresses.append(socket.inet_ntop(family, data))
        answer.ttls.append(ttl)
        position += 12 + length
    return answer
