"""UDP ports of the host whose datagrams are carried into the guest.

UDP has no connections, so each client (an address that datagrams come from) gets an *association*: a stream to a socket
of its own in the guest, where the answers come back. Its laws:

- An association ends when nothing has passed for ``IDLE`` seconds, when the guest's server is not there, when the link
  is lost, or when there are too many and its port has the most of them. The client's next datagram begins another; it
  learns of nothing.
- Nothing waits: a datagram for which there is no link, no room or no server is dropped, as on any network.
- A port is bound on all addresses that are asked for, or on none.
- Who asked one of this host's addresses is answered from that one, as a client with a connected socket insists on.
"""

from __future__ import annotations

import logging
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from host_agent.binding import bind_all
from protocol.api import DialUdp
from protocol.datagram_stream import MAX_BATCH, DatagramStream
from protocol.datagrams import MAX_DATAGRAM, encode
from protocol.errors import ErrorCode, LinkError, OpenRefused
from protocol.lane import READABLE, Lane
from protocol.link import OnOpened, SendEarly
from protocol.muxstream import MuxStream
from protocol.stream import EARLY

# Seconds without a datagram either way. Linux' connection tracking forgets a UDP flow after 30, an answered one after
# 120 (nf_conntrack_udp_timeout, nf_conntrack_udp_timeout_stream).
IDLE = 60.0
# Clients of all ports together, each a stream of the link and a descriptor in the guest: a quarter of its streams.
MAX_ASSOCIATIONS = 512
# Datagrams and bytes of one client that are kept while its stream is being opened.
MAX_WAITING = 16
MAX_WAITING_BYTES = 128 * 1024
# Datagrams read from one socket in a row, before others have their turn.
BURST = 64

WILDCARDS = ("0.0.0.0", "::")
IP_PKTINFO = 8
"""ip(7); Python does not name it."""
_TELL_DESTINATION = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_PKTINFO),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO),
}
_PKTINFO = struct.Struct("=i4s4s")
"""struct in_pktinfo: interface, the local address (of a broadcast, too), the datagram's own destination."""
_PKTINFO6 = struct.Struct("=16si")
"""struct in6_pktinfo: the datagram's destination, interface."""
_ANCILLARY = socket.CMSG_SPACE(max(_PKTINFO.size, _PKTINFO6.size))
_MULTICAST6 = 0xFF
"""The first byte of such an address, which can be no source."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Client:
    """Whom to answer; ``source``, the ancillary data that says from which of our addresses."""

    address: tuple[object, ...]
    source: tuple[int, int, bytes] | None = None


# As ``forwarders.DialNow``, for these targets.
DialUdpNow = Callable[[DialUdp, OnOpened], SendEarly | None]

logger = logging.getLogger(__name__)


def listen_udp(address: str, port: int) -> list[socket.socket]:
    """Bind ``port`` of ``address``: ``localhost`` is 127.0.0.1 and ::1, ``0.0.0.0`` all addresses of both families
    (where the host has IPv6), or a numeric one; all of them or none.

    Raises:
        OSError: with EADDRINUSE, EACCES, EADDRNOTAVAIL and so on; nothing is left open.
    """
    sockets = bind_all(address, port, socket.SOCK_DGRAM)
    for sock in sockets:
        if sock.getsockname()[0] in WILDCARDS and sys.platform == "linux":
            level, option = _TELL_DESTINATION[sock.family]
            sock.setsockopt(level, option, 1)
    return sockets


def receive(sock: socket.socket) -> tuple[bytes, Client]:
    """A datagram and whom to answer from where. Raises ``OSError``."""
    if sock.getsockname()[0] not in WILDCARDS:
        datagram, address = sock.recvfrom(MAX_DATAGRAM + 1)
        return datagram, Client(address)
    datagram, ancillary, _, address = sock.recvmsg(MAX_DATAGRAM + 1, _ANCILLARY)
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            _, local, _ = _PKTINFO.unpack(value)
            return datagram, Client(address, (level, kind, _PKTINFO.pack(0, local, bytes(4))))
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            local, _ = _PKTINFO6.unpack(value)
            if local[0] != _MULTICAST6:
                return datagram, Client(address, (level, kind, _PKTINFO6.pack(local, 0)))
    return datagram, Client(address)


def answer(sock: socket.socket, client: Client, datagram: bytes) -> None:
    """Send ``datagram`` to ``client``. Raises ``OSError``."""
    if client.source is None:
        sock.sendto(datagram, client.address)
    else:
        sock.sendmsg([datagram], [client.source], 0, client.address)


class LeastUsed(Generic[Value]):
    """What is in use, the longest unused first: sans-IO, seconds of any monotonic clock are an argument.

    Each stays until it was not used for ``idle`` seconds.
    """

    def __init__(self, idle: float) -> None:
        self._idle = idle
        self._values: OrderedDict[Hashable, tuple[Value, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def use(self, key: Hashable, now: float) -> Value | None:
        """The value of ``key``, which is used now; None if there is none."""
        if (known := self._values.get(key)) is None:
            return None
        self._values[key] = known[0], now
        self._values.move_to_end(key)
        return known[0]

    def add(self, key: Hashable, value: Value, now: float) -> None:
        """Hold ``value`` for a new ``key``, which is used now."""
        self._values[key] = value, now

    def pop(self) -> Value | None:
        """Forget the longest unused, and return it; None if there is nothing."""
        return self._values.popitem(last=False)[1][0] if self._values else None

    def remove(self, key: Hashable) -> None:
        """Forget ``key``, if it is known."""
        self._values.pop(key, None)

    def deadline(self) -> float | None:
        """When ``expire`` should next be called, or later; None while there is nothing."""
        return next((used + self._idle for _, used in self._values.values()), None)

    def expire(self, now: float) -> list[Value]:
        """Forget what was not used for too long, and return it."""
        expired: list[Value] = []
        while (deadline := self.deadline()) is not None and deadline <= now:
            expired.append(self._values.popitem(last=False)[1][0])
        return expired

    def clear(self) -> list[Value]:
        """Forget everything, and return it."""
        values = [value for value, _ in self._values.values()]
        self._values.clear()
        return values


class _Association:
    """One client's way into the guest. ``answer`` gets what comes back, ``on_end`` is called once when it is over."""

    def __init__(self, answer: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._answer = answer
        self._on_end = on_end
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._datagrams: DatagramStream | None = None
        self._over = False

    def open(self, target: DialUdp, dial_now: DialUdpNow, first: list[bytes]) -> bool:
        """Ask for a stream, and send ``first`` ahead of the answer; False if there is no link."""
        if (send_early := dial_now(target, self._on_opened)) is None:
            self._over = True
            return False
        early = encode(first[:1])
        if len(early) <= EARLY:
            send_early(early)
            first = first[1:]
        self.send(first)
        return True

    def send(self, datagrams: list[bytes]) -> None:
        """Send them, or keep a few until the stream is open; the rest is dropped."""
        if self._datagrams is not None:
            self._datagrams.send(datagrams)
            return
        for datagram in datagrams:
            if len(self._waiting) < MAX_WAITING and self._waiting_bytes + len(datagram) <= MAX_WAITING_BYTES:
                self._waiting.append(datagram)
                self._waiting_bytes += len(datagram)

    def end(self, reason: str) -> None:
        """Nothing passes any more; nothing happens if it is over."""
        if self._datagrams is not None:
            self._datagrams.end(ErrorCode.CANCELLED, reason)
        else:
            self._ended()

    def _on_opened(self, answer: MuxStream | OpenRefused | LinkError) -> None:
        if not isinstance(answer, MuxStream):
            logger.debug("no association: %s", answer)
            self._ended()
        elif self._over:
            answer.cut(ErrorCode.CANCELLED, "the client is not served any more")
        else:
            self._datagrams = DatagramStream(answer, self._answer, self._ended)
            waiting, self._waiting = self._waiting, []
            self._datagrams.start()
            if waiting:
                self._datagrams.send(waiting)

    def _ended(self) -> None:
        if not self._over:
            self._over = True
            self._waiting.clear()
            self._on_end()


class Room:
    """What all ports together have room for: who needs a place takes it from the port that has the most."""

    def __init__(self, limit: int = MAX_ASSOCIATIONS) -> None:
        self._limit = limit
        self._ports: set[UdpForwarder] = set()

    def enter(self, port: UdpForwarder) -> None:
        self._ports.add(port)

    def leave(self, port: UdpForwarder) -> None:
        self._ports.discard(port)

    def make(self) -> None:
        """Have a place free for one more."""
        if sum(port.associations for port in self._ports) >= self._limit:
            max(self._ports, key=lambda port: port.associations).give_way()


class UdpForwarder:
    """Carries what comes to ``sockets``, which it owns, to the first of ``targets()``, and the answers back.

    ``lane`` and ``dial_now`` are the link's; no task runs for a datagram.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        targets: Callable[[], Sequence[DialUdp]],
        dial_now: DialUdpNow,
        lane: Lane,
        *,
        idle: float = IDLE,
        room: Room | None = None,
    ) -> None:
        self._sockets = sockets
        self._targets = targets
        self._dial_now = dial_now
        self._lane = lane
        self._associations: LeastUsed[_Association] = LeastUsed(idle)
        self._room = Room() if room is None else room
        self._room.enter(self)
        self._scope = trio.CancelScope()
        self._busy = trio.Event()
        self._closed = False

    @property
    def associations(self) -> int:
        """Clients that are served now."""
        return len(self._associations)

    async def serve(self, connections: trio.Nursery) -> None:
        """Serve until ``close``. (Nothing becomes a task of ``connections``, and nothing outlives this.)"""
        if self._closed:
            return
        try:
            for index, sock in enumerate(self._sockets):
                self._lane.watch(sock.fileno(), READABLE, self._reader(index, sock))
            with self._scope:
                await self._keep_time()
        finally:
            self.close()

    def close(self) -> None:
        """Stop at once: the kernel refuses what comes next, and all associations end."""
        if self._closed:
            return
        self._closed = True
        self._room.leave(self)
        for sock in self._sockets:
            self._lane.forget(sock.fileno())
            sock.close()
        for association in self._associations.clear():
            association.end("the port was closed")
        self._scope.cancel()

    def give_way(self) -> None:
        """End the least used association for the sake of another port's, or of another client's."""
        if (association := self._associations.pop()) is not None:
            association.end("others are used more")

    async def _keep_time(self) -> None:
        while True:
            if (deadline := self._associations.deadline()) is None:
                self._busy = trio.Event()
                await self._busy.wait()
            else:
                await trio.sleep_until(deadline)
                for association in self._associations.expire(trio.current_time()):
                    association.end("idle")

    # --- on the lane -------------------------------------------------------------------------------

    def _reader(self, index: int, sock: socket.socket) -> Callable[[int], None]:
        def on_readable(ready: int) -> None:
            received: dict[Client, list[bytes]] = {}
            size = 0
            try:
                for _ in range(BURST):
                    datagram, client = receive(sock)
                    if len(datagram) <= MAX_DATAGRAM:
                        received.setdefault(client, []).append(datagram)
                        size += len(datagram)
                    if size > MAX_BATCH:
                        break
            except BlockingIOError:
                pass
            except OSError as error:  # of an earlier datagram; it has been told now
                logger.debug("udp: %s", error.strerror)
            for client, datagrams in received.items():
                self._forward(index, sock, client, datagrams)

        return on_readable

    def _forward(self, index: int, sock: socket.socket, client: Client, datagrams: list[bytes]) -> None:
        key, now = (index, client), trio.current_time()
        if (association := self._associations.use(key, now)) is not None:
            association.send(datagrams)
        elif targets := self._targets():
            self._begin(key, targets[0], sock, client, datagrams)

    def _begin(
        self,
        key: Hashable,
        target: DialUdp,
        sock: socket.socket,
        client: Client,
        datagrams: list[bytes],
    ) -> None:
        def on_answer(datagram: bytes) -> None:
            self._associations.use(key, trio.current_time())
            try:
                answer(sock, client, datagram)
            except OSError as error:  # no room, or no way there: dropped
                logger.debug("udp: %s", error.strerror)

        association = _Association(on_answer, lambda: self._associations.remove(key))
        if not association.open(target, self._dial_now, datagrams):
            return
        self._room.make()
        self._associations.add(key, association, trio.current_time())
        if not self._busy.is_set():
            self._busy.set()
