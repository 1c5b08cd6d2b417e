"""Connections into the guest: the host opens a stream, the guest connects and joins the two.

The law: the stream is accepted only once the connection stands, so the host can refuse its client as
the guest's kernel refused us; after that the two are one connection, half-close and reset included.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from protocol.api import DialName, DialTcp, DialUnix
from protocol.errors import ErrorCode, OpenRefused
from protocol.link import Incoming, Service
from protocol.pump import Pump, pump

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 15.0
"""Seconds for a connection inside the guest or from it; the kernel's own is over two minutes."""

LOOKUPS = 16
"""Names resolved at a time. Each takes a thread, which resolv.conf's timeouts keep (10 s and more where nobody
answers) also if the host has given up; threads of others, such as sock_diag's, are not waited for by these."""

MAX_ADDRESSES = 8
"""Addresses of a name that are tried; they share ``CONNECT_TIMEOUT``."""

_CODES = {
    errno.ECONNREFUSED: ErrorCode.REFUSED,
    errno.ENOENT: ErrorCode.NOT_FOUND,
    errno.ENOTSOCK: ErrorCode.NOT_FOUND,
    errno.EHOSTUNREACH: ErrorCode.UNREACHABLE,
    errno.ENETUNREACH: ErrorCode.UNREACHABLE,
    errno.EADDRNOTAVAIL: ErrorCode.UNREACHABLE,
    errno.EACCES: ErrorCode.DENIED,
    errno.EPERM: ErrorCode.DENIED,
    errno.ETIMEDOUT: ErrorCode.TIMEOUT,
    errno.ECONNRESET: ErrorCode.RESET,
    errno.EMFILE: ErrorCode.LIMIT,
    errno.ENFILE: ErrorCode.LIMIT,
    errno.EAGAIN: ErrorCode.LIMIT,  # a unix socket whose backlog is full
    errno.EINVAL: ErrorCode.INVALID,
    errno.ENAMETOOLONG: ErrorCode.INVALID,
}


def error_code(error: OSError) -> ErrorCode:
    """What a failed ``connect`` means to the host."""
    return _CODES.get(error.errno or 0, ErrorCode.INTERNAL)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


async def connect_tcp(target: DialTcp) -> trio.SocketStream:
    """A connection to a numeric address. Raises ``OSError``; ``ValueError`` if it is not one."""
    return await _connect(_family(target), (target.address, target.port))


def _family(target: DialTcp) -> socket.AddressFamily:
    """Raises ``OSError`` and ``ValueError`` unless it is an address and a port."""
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    socket.inet_pton(family, target.address.partition("%")[0])
    if not 0 < target.port < 65536:
        raise ValueError(f"port {target.port} is out of range")
    return family


async def connect_unix(target: DialUnix) -> trio.SocketStream:
    """A connection to a unix socket. Raises ``OSError``, ``ValueError`` for an impossible path."""
    if not target.path.startswith("/") or "\0" in target.path:
        raise ValueError("the path of a socket is absolute")
    return await _connect(socket.AF_UNIX, target.path)


class Names:
    """Connections to names, which the guest's own resolver is asked for."""

    def __init__(self) -> None:
        self._lookups = trio.CapacityLimiter(LOOKUPS)

    async def dial(self, target: DialName, incoming: Incoming) -> None:
        """Handler of ``DialName`` streams."""
        await _serve(partial(self.connect, target), f"{target.host} port {target.port}", incoming)

    async def connect(self, target: DialName) -> trio.SocketStream:
        """A connection to the first address that answers. The time is the caller's to limit.

        Raises ``OpenRefused`` for a name that leads nowhere, ``ValueError`` if it is none; else the ``OSError`` of
        the last address.
        """
        if not 0 < target.port < 65536:
            raise ValueError(f"port {target.port} is out of range")
        addresses = await self._resolve(target.host)
        failure = OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        for index, (family, address) in enumerate(addresses):
            share = max(0.0, trio.current_effective_deadline() - trio.current_time()) / (
                len(addresses) - index
            )
            with trio.move_on_after(share):
                try:
                    return await _connect(family, (address, target.port))
                except OSError as error:
                    failure = error
                    continue
            failure = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        raise failure

    async def _resolve(self, name: str) -> list[tuple[int, str]]:
        """Families and numeric addresses of ``name``, best first (RFC 6724, as getaddrinfo(3) sorts them)."""
        look_up = partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
        try:
            found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=self._lookups)
        except socket.gaierror as error:
            code = ErrorCode.UNREACHABLE if error.errno == socket.EAI_AGAIN else ErrorCode.NOT_FOUND
            raise OpenRefused(code, f"{name}: {error.strerror}") from error
        return [(family, str(address[0])) for family, _, _, _, address in found[:MAX_ADDRESSES]]


async def _connect(family: int, address: tuple[str, int] | str) -> trio.SocketStream:
    connection = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await connection.connect(address)
        return trio.SocketStream(connection)  # sets TCP_NODELAY
    except BaseException:
        connection.close()
        raise


async def _serve(connect: Callable[[], Awaitable[trio.SocketStream]], name: str, incoming: Incoming) -> None:
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            connection = await connect()
    except trio.TooSlowError:
        return await incoming.refuse(ErrorCode.TIMEOUT, f"{name} did not answer in {CONNECT_TIMEOUT:.0f} s")
    except OSError as error:
        return await incoming.refuse(error_code(error), f"{name}: {_reason(error)}")
    except ValueError as error:
        return await incoming.refuse(ErrorCode.INVALID, f"{name}: {error}")
    async with connection:
        stream = await incoming.accept()
        ended = await pump(stream, connection)
    log.debug("dial.end target=%s in=%d out=%d error=%s", name, ended.a_to_b, ended.b_to_a, ended.error)
    return None


async def dial_tcp(target: DialTcp, incoming: Incoming) -> None:
    """Handler of ``DialTcp`` streams."""
    await _serve(partial(connect_tcp, target), f"{target.address} port {target.port}", incoming)


async def dial_unix(target: DialUnix, incoming: Incoming) -> None:
    """Handler of ``DialUnix`` streams."""
    await _serve(partial(connect_unix, target), target.path, incoming)


def dial_tcp_at_once(target: DialTcp, incoming: Incoming) -> bool:
    """Connect if that takes no time, as it mostly does to an address of this machine; False leaves it to the task.

    The second connect(2) asks how the first one went: over loopback the handshake is done when that returns.
    """
    try:
        connection = socket.socket(_family(target), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            address = (target.address, target.port)
            if connection.connect_ex(address) and connection.connect_ex(address):
                connection.close()
                return False
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = incoming.accept_now()
        except BaseException:
            connection.close()
            raise
    except (OSError, ValueError, OverflowError):
        return False
    Pump(stream, connection, lambda ended: None).start()
    return True


def register(service: Service) -> None:
    """Answer ``DialTcp``, ``DialUnix`` and ``DialName`` on a link."""
    service.on_stream(DialTcp, dial_tcp, dial_tcp_at_once)
    service.on_stream(DialUnix, dial_unix)
    service.on_stream(DialName, Names().dial)
