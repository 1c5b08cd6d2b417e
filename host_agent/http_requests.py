"""The framing of HTTP/1.1 requests: what a head says, and where a body ends.

RFC 9112 as Go's net/http, which dockerd uses, understands it; lines may end in a bare LF. The law: what Go
would refuse or could take otherwise is a ``SurpriseError``, never a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LINE = 4096
"""Bytes of a line between chunks: what Go's net/http allows."""

MAX_LENGTH_DIGITS = 18
"""Digits of a Content-Length: int64 has 19."""


class SurpriseError(Exception):
    """Not what an ordinary client sends; from here on nothing is known."""


@dataclass(slots=True)
class Sized:
    """A body of known length in bytes, perhaps none."""

    left: int

    @property
    def ended(self) -> bool:
        return self.left == 0

    def skip(self, data: bytes, at: int) -> int:
        """How far the body goes in ``data``, from ``at``."""
        end = min(len(data), at + self.left)
        self.left -= end - at
        return end

    @staticmethod
    def content(raw: bytes) -> bytes:
        return raw


class Chunked:
    """A body in chunks, each behind a line with its size in hexadecimal (RFC 9112, 7.1)."""

    def __init__(self) -> None:
        self.ended = False
        self._left = 0  # of the chunk, with the CRLF behind it
        self._line = bytearray()
        self._trailers = False

    def skip(self, data: bytes, at: int) -> int:
        """How far the body goes in ``data``, from ``at``. Raises ``SurpriseError`` where it is malformed."""
        while at < len(data) and not self.ended:
            if self._left:
                end = min(len(data), at + self._left)
                self._left -= end - at
                at = end
            else:
                at = self._take_line(data, at)
        return at

    def _take_line(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at) + 1
        self._line += data[at : end or len(data)]
        if len(self._line) > MAX_LINE:
            raise SurpriseError
        if not end:
            return len(data)
        line = bytes(self._line).rstrip(b"\r\n")
        self._line.clear()
        if self._trailers:
            self.ended = not line
        elif size := _chunk_size(line):
            self._left = size + len(b"\r\n")
        else:
            self._trailers = True
        return end

    @staticmethod
    def content(raw: bytes) -> bytes:
        """The chunks of a whole body, joined."""
        chunks: list[bytes] = []
        at = 0
        while True:
            end = raw.index(b"\n", at) + 1
            size = _chunk_size(raw[at:end])
            if not size:
                return b"".join(chunks)
            chunks.append(raw[end : end + size])
            at = end + size + len(b"\r\n")


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    # 16 digits as in Go; checked first, since int() takes signs and underscores.
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", digits):
        raise SurpriseError
    return int(digits, 16)


@dataclass(frozen=True, slots=True)
class Head:
    """A request line and what its headers say. ``upgrade``: the connection may not be HTTP afterwards."""

    method: bytes
    target: bytes
    body: Sized | Chunked
    upgrade: bool

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """Read a head, from its request line to its empty line. Raises ``SurpriseError``."""
        first, *lines = (line.removesuffix(b"\r") for line in head.rstrip(b"\r\n").split(b"\n"))
        method, target, version = _words(first)
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            raise SurpriseError
        headers = _headers(lines)
        if b"transfer-encoding" in headers and version == b"HTTP/1.0":
            raise SurpriseError
        options = b",".join(headers.get(b"connection", [])).lower().split(b",")
        upgrade = method == b"CONNECT" or b"upgrade" in [option.strip() for option in options]
        return cls(method, target, _body(headers), upgrade)


def _words(line: bytes) -> tuple[bytes, bytes, bytes]:
    words = line.split(b" ")
    if len(words) != 3:
        raise SurpriseError
    return words[0], words[1], words[2]


def _headers(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    """The values of each header, by its name in lower case; folded lines are a surprise."""
    headers: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise SurpriseError
        headers.setdefault(name.lower(), []).append(value.strip())
    return headers


def _body(headers: dict[bytes, list[bytes]]) -> Sized | Chunked:
    """How long the body is. Chunks win over a length, as RFC 9112 (6.3) has it."""
    if codings := headers.get(b"transfer-encoding"):
        if [coding.lower() for coding in codings] != [b"chunked"]:
            raise SurpriseError
        return Chunked()
    lengths = set(headers.get(b"content-length", [b"0"]))
    length = lengths.pop()
    if lengths or not length.isdigit() or len(length) > MAX_LENGTH_DIGITS:
        raise SurpriseError
    return Sized(int(length))
