"""Where the guest's DNS queries arrive: a port of the host's loopback, which the guest reaches through QEMU's network.

The law: no client, however many queries it sends or leaves half sent, takes more than a fixed part of the agent; what
is over the limit is dropped, as by a busy network, and clients ask again. No query ends the agent.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable
from functools import partial
from typing import Protocol

import trio

from host_agent import dns_messages, dns_relay

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"

#: Queries that are being answered at one time; a page with all its trackers asks for about 100.
MAX_QUERIES = 256

MAX_CONNECTIONS = 64

#: Seconds without a query, or for a client to take an answer, after which a connection is closed (RFC 7766, 6.2.3).
IDLE_TIME = 10.0

#: A port that is free for TCP is nearly always free for UDP.
BIND_TRIES = 16


class Answer(Protocol):
    """What to say to a message; b"" for nothing."""

    def __call__(self, message: bytes, *, stream: bool = False) -> Awaitable[bytes]: ...


class DnsServer:
    """Serves UDP and TCP on one port."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._queries = 0
        self._connections = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def run(self, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started with the port. Raises ``OSError`` if there is none to be had."""
        listener, datagrams = await _bind()
        with datagrams:
            async with listener, trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.serve_listeners, self._serve, [listener]))
                task_status.started(listener.socket.getsockname()[1])
                await self._receive(datagrams, nursery)

    async def _receive(self, datagrams: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                message, sender = await datagrams.recvfrom(dns_messages.MAX_SIZE)
            except OSError as error:
                logger.info("dns: %s", error)
                await trio.sleep(1)
                continue
            if self._queries < MAX_QUERIES:
                self._queries += 1
                nursery.start_soon(self._answer_datagram, datagrams, message, sender)

    async def _answer_datagram(
        self, datagrams: trio.socket.SocketType, message: bytes, sender: tuple[str, int]
    ) -> None:
        try:
            if reply := await self._answer(message):
                await datagrams.sendto(reply, sender)
        except OSError:
            pass  # the client has gone
        except Exception:
            logger.exception("dns: a query was not answered")
        finally:
            self._queries -= 1

    async def _serve(self, connection: trio.SocketStream) -> None:
        try:
            self._connections.acquire_nowait()
        except trio.WouldBlock:
            return
        try:
            await self._converse(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the client has gone, or sits there
        except Exception:
            logger.exception("dns: a query was not answered")
        finally:
            self._connections.release()

    async def _converse(self, connection: trio.SocketStream) -> None:
        while True:
            with trio.fail_after(IDLE_TIME):
                message = await dns_relay.receive(connection)
            if not (reply := await self._answer(message, stream=True)):
                return
            with trio.fail_after(IDLE_TIME):
                await connection.send_all(len(reply).to_bytes(2, "big") + reply)


async def _bind() -> tuple[trio.SocketListener, trio.socket.SocketType]:
    """A listener and a datagram socket with the same port."""
    for attempt in range(BIND_TRIES):
        (listener,) = await trio.open_tcp_listeners(0, host=ADDRESS)
        datagrams = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            await datagrams.bind((ADDRESS, listener.socket.getsockname()[1]))
            return listener, datagrams
        except OSError:
            datagrams.close()
            await listener.aclose()
            if attempt == BIND_TRIES - 1:
                raise
    raise AssertionError("not reached")
