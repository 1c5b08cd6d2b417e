"""DNS messages, as far as a forwarder must understand them: one question in, addresses or a code out.

Sans-IO. The law: whatever bytes come, the outcome is a ``Query`` or ``Malformed`` with the answer that it deserves (or
none); an answer never exceeds what its client can take, and says so by its TC bit.

Sources: RFC 1035, 4.1 (messages), RFC 6891 (EDNS), RFC 9619 (one question).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

HEADER = struct.Struct("!HHHHHH")

#: Of a datagram without EDNS (RFC 1035, 2.3.4), and of what we offer and take with it (the DNS flag day's).
PLAIN_SIZE = 512
EDNS_SIZE = 1232

#: Of a message in a stream, where two bytes say its length.
MAX_SIZE = 65535

_RESPONSE, _OPCODE, _TRUNCATED, _DESIRED, _AVAILABLE = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080
_MAX_NAME = 255
_QUESTION_NAME = 0xC000 | HEADER.size


class Type(IntEnum):
    """Those that are treated in a way of their own."""

    A = 1
    AAAA = 28
    OPT = 41


INTERNET = 1


class Code(IntEnum):
    NO_ERROR = 0
    FORMAT_ERROR = 1
    SERVER_FAILURE = 2
    NO_SUCH_NAME = 3
    NOT_IMPLEMENTED = 4


class Malformed(ValueError):
    """``answer`` is what to say to it, or b"" for nothing."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Query:
    """A question. ``name`` is in lower case, without the last dot; "" for the root and for one that cannot be a
    host's (bytes that are not printable ASCII, a dot inside of a label). ``max_size``: bytes that its sender takes in
    a datagram.
    """

    ident: int
    flags: int
    question: bytes
    name: str
    kind: int
    max_size: int = PLAIN_SIZE
    edns: bool = False
    internet: bool = True


def parse(data: bytes) -> Query:
    """The query that ``data`` is. Raises ``Malformed``."""
    if len(data) < HEADER.size:
        raise Malformed("shorter than a header")
    ident, flags, questions, answers, authorities, additionals = HEADER.unpack_from(data)
    if flags & _RESPONSE:
        raise Malformed("a response")  # answering those could go on for ever
    if flags & _OPCODE:
        raise Malformed("no query", _bare(ident, flags, Code.NOT_IMPLEMENTED))
    try:
        if questions != 1 or answers or authorities:
            raise ValueError("not one question and nothing else")
        labels, end = _labels(data, HEADER.size)
        kind, klass = struct.unpack_from("!HH", data, end)
    except (ValueError, struct.error) as error:
        raise Malformed(str(error), _bare(ident, flags, Code.FORMAT_ERROR)) from None
    size = _edns_size(data, end + 4, additionals)
    return Query(
        ident=ident,
        flags=flags,
        question=data[HEADER.size : end + 4],
        name=_host_name(labels),
        kind=kind,
        max_size=PLAIN_SIZE if size is None else max(PLAIN_SIZE, min(size, EDNS_SIZE)),
        edns=size is not None,
        internet=klass == INTERNET,
    )


def _labels(data: bytes, position: int) -> tuple[list[bytes], int]:
    """The labels of the name at ``position``, and where it ends. Raises ``ValueError``."""
    labels: list[bytes] = []
    start = position
    while True:
        if position >= len(data):
            raise ValueError("a name that does not end")
        length = data[position]
        if length > 63:
            raise ValueError("a compressed name in a question")
        position += 1 + length
        if position - start > _MAX_NAME:
            raise ValueError("a name that is too long")
        if length == 0:
            return labels, position
        labels.append(data[position - length : position])


def _host_name(labels: Sequence[bytes]) -> str:
    if any(b"." in label or not all(0x21 <= byte <= 0x7E for byte in label) for label in labels):
        return ""
    return b".".join(labels).decode("ascii").lower()


def _edns_size(data: bytes, position: int, additionals: int) -> int | None:
    """What the OPT record offers, or None without one. It has the root's name and, in practice, is the first."""
    if additionals and len(data) >= position + 11 and data[position] == 0:
        kind, size = struct.unpack_from("!HH", data, position + 1)
        if kind == Type.OPT:
            return int(size)
    return None


def answer(query: Query, addresses: Sequence[str], ttl: int, limit: int) -> bytes:
    """``addresses``, all of the query's type, for ``ttl`` seconds; none mean that there are no such records.

    ``limit``: bytes that the client can take here. If they do not fit it is told so, and asks by a stream.
    """
    records = []
    for address in addresses:
        packed = ipaddress.ip_address(address).packed
        kind = Type.A if len(packed) == 4 else Type.AAAA
        records.append(struct.pack("!HHHIH", _QUESTION_NAME, kind, INTERNET, ttl, len(packed)) + packed)
    whole = _message(query, Code.NO_ERROR, records)
    return whole if len(whole) <= limit else _message(query, Code.NO_ERROR, (), truncated=True)


def failure(query: Query, code: Code) -> bytes:
    """An answer without records."""
    return _message(query, code, ())


def _message(query: Query, code: Code, records: Sequence[bytes], *, truncated: bool = False) -> bytes:
    flags = _RESPONSE | _AVAILABLE | (query.flags & _DESIRED) | (_TRUNCATED if truncated else 0) | code
    # RFC 6891, 6.1.1: who was offered EDNS answers with it.
    option = struct.pack("!BHHIH", 0, Type.OPT, EDNS_SIZE, 0, 0) if query.edns else b""
    header = HEADER.pack(query.ident, flags, 1, len(records), 0, 1 if option else 0)
    return b"".join((header, query.question, *records, option))


def _bare(ident: int, flags: int, code: Code) -> bytes:
    """The answer to what has no question that could be repeated."""
    kept = flags & (_OPCODE | _DESIRED)
    return HEADER.pack(ident, _RESPONSE | _AVAILABLE | kept | code, 0, 0, 0, 0)


# --- what is passed on -----------------------------------------------------------------------------


def with_ident(message: bytes, ident: int) -> bytes:
    """``message`` under another number."""
    return ident.to_bytes(2, "big") + message[2:]


def answers(message: bytes, ident: int, query: Query) -> bool:
    """Whether ``message`` is a response to ``query``, which was asked under ``ident``."""
    if len(message) < HEADER.size:
        return False
    number, flags, questions, *_ = HEADER.unpack_from(message)
    if number != ident or not flags & _RESPONSE:
        return False
    # Servers that refuse may leave the question out.
    asked = message[HEADER.size : HEADER.size + len(query.question)]
    return questions == 0 or asked.lower() == query.question.lower()


def is_truncated(message: bytes) -> bool:
    return bool(HEADER.unpack_from(message)[1] & _TRUNCATED)


def failed(message: bytes) -> bool:
    """Whether its sender could not or would not say (SERVFAIL, NOTIMP, REFUSED), so that another may be asked."""
    return HEADER.unpack_from(message)[1] & 0xF in (2, 4, 5)
