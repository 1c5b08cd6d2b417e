"""A DNS query put to nameservers, one after the other, until one says something.

The law: nobody waits longer than ``SERVER_TIME`` for one of them, and only what answers the question that was asked,
under a number and from a port that were chosen for it, is believed (RFC 5452).
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence

import trio

from host_agent import dns_messages
from host_agent.dns_messages import Query
from host_agent.network_settings import Nameserver

logger = logging.getLogger(__name__)

#: Seconds for one nameserver, before the next is asked.
SERVER_TIME = 1.5


class Unanswered(Exception):
    """Nobody said whether there is such a thing."""


async def relay(
    message: bytes, query: Query, servers: Sequence[Nameserver], *, stream: bool = False
) -> bytes:
    """What the first of ``servers`` that has an answer says to ``message``, the bytes of ``query``.

    ``stream``: the whole of it, however long; else what fits into a datagram. Raises ``Unanswered``.
    """
    last = b""
    for server in servers:
        ident = secrets.randbelow(1 << 16)
        try:
            with trio.fail_after(SERVER_TIME):
                reply = await _ask(server, dns_messages.with_ident(message, ident), query, stream)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
            logger.debug("dns: %s does not answer: %r", server, error)
            continue
        last = dns_messages.with_ident(reply, query.ident)
        if not dns_messages.failed(reply):
            return last
    if not last:
        raise Unanswered("no nameserver answers" if servers else "there is no nameserver")
    return last


async def _ask(server: Nameserver, message: bytes, query: Query, stream: bool) -> bytes:
    reply = await _ask_by_datagram(server, message, query)
    if stream and dns_messages.is_truncated(reply):
        return await _ask_by_stream(server, message, query)
    return reply


async def _ask_by_datagram(server: Nameserver, message: bytes, query: Query) -> bytes:
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as connection:
        await connection.connect((server.address, server.port))
        await connection.send(message)
        while True:
            reply = await connection.recv(dns_messages.MAX_SIZE)
            if dns_messages.answers(reply, int.from_bytes(message[:2], "big"), query):
                return reply


async def _ask_by_stream(server: Nameserver, message: bytes, query: Query) -> bytes:
    async with await trio.open_tcp_stream(server.address, server.port) as connection:
        await connection.send_all(len(message).to_bytes(2, "big") + message)
        reply = await receive(connection)
        if not dns_messages.answers(reply, int.from_bytes(message[:2], "big"), query):
            raise trio.BrokenResourceError("an answer to something else")
        return reply


async def receive(connection: trio.abc.ReceiveStream) -> bytes:
    """One message of a stream (RFC 1035, 4.2.2). Raises ``trio.BrokenResourceError`` if it ends before."""
    length = int.from_bytes(await _exactly(connection, 2), "big")
    return await _exactly(connection, length)


async def _exactly(connection: trio.abc.ReceiveStream, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        if not (data := await connection.receive_some(count - len(received))):
            raise trio.BrokenResourceError("the stream ends")
        received += data
    return bytes(received)
