"""The server's side of a SOCKS5 negotiation (RFC 1928): bytes in, events out; no I/O.

The law: whatever a client sends, it is either understood, waited for, or refused; nothing raises, and no more is kept
than the longest request that there can be, and what the client has sent behind it. Only CONNECT is offered, without
authentication: who reaches the port is on this machine.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocol.errors import ErrorCode

VERSION: Final = 5
NO_AUTHENTICATION: Final = 0
NO_ACCEPTABLE_METHOD: Final = 0xFF
CONNECT: Final = 1
RESERVED: Final = 0


class AddressType(IntEnum):
    """What ATYP says (RFC 1928, section 5)."""

    IPV4 = 1
    NAME = 3
    IPV6 = 4


class ReplyCode(IntEnum):
    """What REP says (RFC 1928, section 6)."""

    SUCCEEDED = 0
    FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


_REPLIES: Final = {
    ErrorCode.DENIED: ReplyCode.NOT_ALLOWED,
    ErrorCode.NOT_FOUND: ReplyCode.HOST_UNREACHABLE,  # a name that there is not: what other servers say
    ErrorCode.REFUSED: ReplyCode.REFUSED,
    ErrorCode.TIMEOUT: ReplyCode.HOST_UNREACHABLE,
    ErrorCode.UNREACHABLE: ReplyCode.HOST_UNREACHABLE,
}


@dataclass(frozen=True, slots=True)
class Send:
    """``data`` goes to the client, whose request is still to come."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Connect:
    """The client wants a connection to ``host``, a name or (``numeric``) an address, and waits for ``reply``.

    ``early`` is what it has said already to whom it will be connected.
    """

    host: str
    port: int
    numeric: bool
    early: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """``data`` (which may be nothing) goes to the client; then it is left, because of ``reason``."""

    data: bytes
    reason: str


Event = Send | Connect | Refuse


def reply(code: ReplyCode) -> bytes:
    """The answer to a request. The address that the guest connected from is nobody's business: 0.0.0.0, port 0."""
    return bytes((VERSION, code, RESERVED, AddressType.IPV4, 0, 0, 0, 0, 0, 0))


def reply_code(error: ErrorCode) -> ReplyCode:
    """What the client is told of a connection that there is not."""
    return _REPLIES.get(error, ReplyCode.FAILURE)


class _Malformed(Exception):
    """What the client said cannot be granted; ``answer`` is the last thing it hears."""

    def __init__(self, answer: bytes, reason: str) -> None:
        super().__init__(reason)
        self.answer = answer


class Negotiation:
    """One client, from its first byte to its request. Over after a ``Connect`` or a ``Refuse``."""

    def __init__(self) -> None:
        self._received = b""
        self._greeted = False
        self._over = False

    def receive(self, data: bytes) -> list[Event]:
        """What follows from ``data``, in order; nothing while more is needed, or once it is over."""
        if self._over:
            return []
        self._received += data
        events: list[Event] = []
        try:
            if not self._greeted and self._take_greeting():
                events.append(Send(bytes((VERSION, NO_AUTHENTICATION))))
            if self._greeted and (request := self._take_request()) is not None:
                events.append(request)
        except _Malformed as error:
            events.append(Refuse(error.answer, str(error)))
        if events and not isinstance(events[-1], Send):
            self._over, self._received = True, b""
        return events

    def _take_greeting(self) -> bool:
        """VER, NMETHODS, METHODS (section 3)."""
        if self._received:
            self._check_version(b"")
        if len(self._received) < 2 or len(self._received) < (size := 2 + self._received[1]):
            return False
        if NO_AUTHENTICATION not in self._received[2:size]:
            answer = bytes((VERSION, NO_ACCEPTABLE_METHOD))
            raise _Malformed(answer, "the client insists on authentication")
        self._received = self._received[size:]
        self._greeted = True
        return True

    def _take_request(self) -> Connect | None:
        """VER, CMD, RSV, ATYP, DST.ADDR, DST.PORT (section 4)."""
        if self._received:
            self._check_version(reply(ReplyCode.FAILURE))
        if len(self._received) < 4:
            return None
        _, command, _, kind = self._received[:4]
        if command != CONNECT:
            raise _Malformed(reply(ReplyCode.COMMAND_NOT_SUPPORTED), f"command {command} is not CONNECT")
        if (found := self._address(kind)) is None:
            return None
        host, end = found
        if len(self._received) < end + 2:
            return None
        port = int.from_bytes(self._received[end : end + 2], "big")
        if port == 0:
            raise _Malformed(reply(ReplyCode.FAILURE), "there is no port 0")
        return Connect(host, port, kind != AddressType.NAME, self._received[end + 2 :])

    def _address(self, kind: int) -> tuple[str, int] | None:
        """The address and where it ends; None while it is not all there."""
        match kind:
            case AddressType.IPV4:
                start, size = 4, 4
            case AddressType.IPV6:
                start, size = 4, 16
            case AddressType.NAME:
                if len(self._received) < 5:
                    return None
                start, size = 5, self._received[4]
            case _:
                answer = reply(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED)
                raise _Malformed(answer, f"there is no address type {kind}")
        raw = self._received[start : start + size]
        if len(raw) < size:
            return None
        return (_name(raw) if kind == AddressType.NAME else str(ipaddress.ip_address(raw))), start + size

    def _check_version(self, answer: bytes) -> None:
        if self._received[0] != VERSION:
            raise _Malformed(
                answer, f"the client does not speak SOCKS5: it begins with {self._received[0]:#04x}"
            )


def _name(raw: bytes) -> str:
    """RFC 1928 says nothing of the encoding: what is not ASCII is UTF-8, as curl and browsers send it."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = ""
    if not name.isprintable() or not name or " " in name:
        raise _Malformed(reply(ReplyCode.FAILURE), f"{raw!r} cannot be a name")
    return name
