"""Which sockets may appear on the other side, and how people write them; pure.

``/host.sock:/guest.sock`` is the guest's socket on the host. In reverse it is the host's in the guest, and the host's
end may be ``[ADDRESS:]PORT`` instead. The guest's end is always a socket: a port that the guest's agent listened on
would be forwarded to the host like any other, and lead to itself.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence

from host_agent.errors import ExitCode, UserError
from host_agent.rules import MAX_UNIX_PATH
from protocol.api import ChangeSocketForwards, SocketForward

#: Of both directions. The guest's agent opens no more (guest_agent.entrances).
MAX_SOCKETS = 64

SYNTAX = "write it as /HOST/SOCKET:/GUEST/SOCKET"
REVERSE_SYNTAX = "write it as /HOST/SOCKET:/GUEST/SOCKET or [ADDRESS:]PORT:/GUEST/SOCKET"

_HOST_PORT = re.compile(r"(?:(localhost|[0-9.]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]{1,5})")


def parse(word: str, reverse: bool) -> SocketForward:
    """The forward that ``word`` asks for. Raises ``UserError``."""
    host, colon, guest = word.rpartition(":/")
    if not colon:
        raise _refused(f"{word!r} names no two ends", reverse)
    if reverse and not host.startswith("/"):
        if not (match := _HOST_PORT.fullmatch(host)):
            raise _refused(f"{host!r} is neither a socket's absolute path nor a port", reverse)
        host = f"{match[1] or 'localhost'}:{match[2]}"
    forward = SocketForward("/" + guest, host, reverse)
    check([forward])
    return forward


def text(forward: SocketForward) -> str:
    """What ``parse`` reads."""
    return f"{forward.host}:{forward.guest}"


def tcp_address(host: str) -> tuple[str, int] | None:
    """The address and port of a reverse forward's end on the host; None if it is a socket's path."""
    if host.startswith("/"):
        return None
    address, _, port = host.rpartition(":")
    return address.strip("[]"), int(port)


def check(forwards: Sequence[SocketForward]) -> None:
    """Raise ``UserError`` for a list that cannot be."""
    if len(forwards) > MAX_SOCKETS:
        raise UserError(
            f"there are {len(forwards)} forwarded sockets; {MAX_SOCKETS} are possible", "", ExitCode.USAGE
        )
    appear: set[tuple[bool, str]] = set()
    for forward in forwards:
        _check_path(forward.guest, forward)
        if forward.reverse and not forward.host.startswith("/"):
            _check_port(forward)
        else:
            _check_path(forward.host, forward)
        place = (forward.reverse, forward.guest if forward.reverse else forward.host)
        if place in appear:
            raise _refused(f"two sockets cannot appear at {place[1]}", forward.reverse)
        appear.add(place)


def changed(forwards: Sequence[SocketForward], change: ChangeSocketForwards) -> tuple[SocketForward, ...]:
    """``forwards`` after ``change``. Raises ``UserError`` for what cannot be."""
    for forward in change.remove:
        if forward not in forwards:
            message = f"{text(forward)} is not forwarded"
            raise UserError(message, "see: agentctl forward list", ExitCode.USAGE)
    kept = [each for each in forwards if each not in change.remove]
    wanted = tuple(dict.fromkeys((*kept, *change.add)))
    check(wanted)
    return wanted


def _check_path(path: str, forward: SocketForward) -> None:
    if not path.startswith("/") or os.path.normpath(path) != path or not path.isprintable() or path == "/":
        raise _refused(f"{path!r} is not an absolute path of a socket", forward.reverse)
    if (length := len(os.fsencode(path))) > MAX_UNIX_PATH:
        raise UserError(
            f"the path {path} is too long: {length} bytes, of which the system allows {MAX_UNIX_PATH} for a socket",
            "choose a shorter one",
            ExitCode.USAGE,
        )


def _check_port(forward: SocketForward) -> None:
    match = _HOST_PORT.fullmatch(forward.host)
    address, port = (match[1], int(match[2])) if match else (None, 0)
    try:
        if address not in (None, "localhost"):
            ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        address = None
    if address is None or not 0 < port < 65536:
        raise _refused(f"{forward.host!r} is neither a socket's absolute path nor ADDRESS:PORT", True)


def _refused(message: str, reverse: bool) -> UserError:
    return UserError(message, REVERSE_SYNTAX if reverse else SYNTAX, ExitCode.USAGE)
