"""Datagrams into the guest: for each client of the host's a stream and a connected UDP socket.

The law: the guest's server sees one address per client, so its answers find their way back by themselves; and what the
kernel says of the socket (nobody listens there: ICMP) ends the stream, which tells the host to begin anew, perhaps
elsewhere. How long an association lives is for the host to say.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from guest_agent.dial import error_code
from protocol.api import DialUdp
from protocol.datagram_stream import MAX_BATCH, DatagramStream
from protocol.datagrams import MAX_DATAGRAM
from protocol.errors import ErrorCode
from protocol.lane import READABLE
from protocol.link import Incoming, Service
from protocol.muxstream import MuxStream

BURST = 32
"""Datagrams read in a row, before others have their turn."""


def connect_udp(target: DialUdp) -> socket.socket:
    """A non-blocking socket that is connected to a numeric address.

    Raises ``OSError``; ``ValueError`` if it is not an address and a port.
    """
    if not 0 < target.port < 65536:
        raise ValueError(f"port {target.port} is out of range")
    try:
        found = socket.getaddrinfo(
            target.address, target.port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"{target.address!r} is not a numeric address") from error
    family, _, _, _, address = found[0]
    connection = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


class Association:
    """Carries datagrams between ``stream`` and ``connection``, and owns both; ``on_end`` when it is over."""

    def __init__(
        self, stream: MuxStream, connection: socket.socket, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._connection = connection
        self._on_end = on_end
        self._datagrams = DatagramStream(stream, self._deliver, self._ended)

    def start(self) -> None:
        # The answers first: what has come already may end it.
        self._datagrams.lane.watch(self._connection.fileno(), READABLE, self._on_readable)
        self._datagrams.start()

    def abort(self, reason: str) -> None:
        """End it; nothing happens if it is over."""
        self._datagrams.end(ErrorCode.CANCELLED, reason)

    def _ended(self) -> None:
        self._datagrams.lane.forget(self._connection.fileno())
        self._connection.close()
        self._on_end()

    def _deliver(self, datagram: bytes) -> None:
        try:
            self._connection.send(datagram)
        except BlockingIOError:
            self._datagrams.dropped += 1
        except OSError as error:
            self._break(error)

    def _on_readable(self, ready: int) -> None:
        answers: list[bytes] = []
        size = 0
        failure: OSError | None = None
        try:
            while len(answers) < BURST and size < MAX_BATCH:
                answer = self._connection.recv(MAX_DATAGRAM + 1)
                if len(answer) > MAX_DATAGRAM:
                    self._datagrams.dropped += 1
                    continue
                answers.append(answer)
                size += len(answer)
        except BlockingIOError:
            pass
        except OSError as error:
            failure = error
        if answers:
            self._datagrams.send(answers)
        if failure is not None:
            self._break(failure)

    def _break(self, error: OSError) -> None:
        self._datagrams.end(error_code(error), os.strerror(error.errno) if error.errno else str(error))


async def dial_udp(target: DialUdp, incoming: Incoming) -> None:
    """Handler of ``DialUdp`` streams that ``dial_udp_at_once`` would not have."""
    name = f"{target.address} port {target.port}"
    try:
        connection = connect_udp(target)
    except OSError as error:
        return await incoming.refuse(error_code(error), f"{name}: {error.strerror}")
    except ValueError as error:
        return await incoming.refuse(ErrorCode.INVALID, f"{name}: {error}")
    with connection:
        stream = await incoming.accept()
        over = trio.Event()
        association = Association(stream, connection, over.set)
        association.start()
        try:
            await over.wait()
        finally:
            association.abort("cancelled")
    return None


def dial_udp_at_once(target: DialUdp, incoming: Incoming) -> bool:
    """Connect, which takes no time; False leaves it to the task to say why it cannot be done."""
    try:
        connection = connect_udp(target)
    except (OSError, ValueError):
        return False
    try:
        Association(incoming.accept_now(), connection).start()
    except BaseException:
        connection.close()
        raise
    return True


def register(service: Service) -> None:
    """Answer ``DialUdp`` on a link."""
    service.on_stream(DialUdp, dial_udp, dial_udp_at_once)
