"""Sockets of the host, bound where a forward is to be reached.

The law: all addresses that are meant are bound, or none, and then nothing is left open. What has two families is bound
in both where the host has IPv6; IPv4 must be there.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

import trio

from host_agent.rules import EVERYWHERE, LOCALHOST

# IPv4 first: that one must be there.
_BOTH_FAMILIES: Final = {LOCALHOST: ("127.0.0.1", "::1"), EVERYWHERE: ("0.0.0.0", "::")}
_NO_IPV6: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


def bind_all(address: str, port: int, kind: socket.SocketKind) -> list[socket.socket]:
    """A socket for each address that ``address`` names (``LOCALHOST``, ``EVERYWHERE`` or a numeric one), on one port.

    Raises:
        OSError: with EADDRINUSE, EACCES, EADDRNOTAVAIL and so on; nothing is left open.
    """
    first, *others = _BOTH_FAMILIES.get(address, (address,))
    sockets = [bind(first, port, kind)]
    try:
        for other in others:
            try:
                sockets.append(bind(other, sockets[0].getsockname()[1], kind))
            except OSError as error:
                if error.errno not in _NO_IPV6:
                    raise
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def bind(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """A socket that is bound to a numeric address and does not block. Raises ``OSError``.

    SO_REUSEADDR is needed to take a port whose last connections are in TIME_WAIT; UDP has no such state, and would
    share the port.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    except socket.gaierror:  # an IPv6 zone that is none of this host's interfaces, now
        sock.close()
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL)) from None
    except OSError:
        sock.close()
        raise
    return sock


def as_listener(sock: socket.socket) -> trio.SocketListener:
    """``sock``, which listens, as trio accepts from it."""
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
