"""The measuring end: what is timed, over plain sockets to a port behind which ``server`` is.

The law: only what has arrived counts. A sample of throughput ends when the far end has said what it got, or has
sent its last byte, so that buffers on the way (a proxy takes in megabytes at once) neither help nor hurt; its
seconds include that. Every wait is bounded: who is stuck is a ``MeasureFailed``.
"""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HOST = "127.0.0.1"

CHUNK = 256 * 1024
#: Of a sending socket; the server's is the same. What waits in it is what the end of a sample waits for.
SEND_BUFFER = 128 * 1024
#: Seconds for one exchange or connect, and for what has been sent to arrive: ``ssh -L`` buffers 2 MiB a stream.
PATIENCE = 20.0
DRAIN = 60.0


class MeasureFailed(Exception):
    """No sample came of it; the message is a clause."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that arrived, in that many seconds."""

    amount: int
    seconds: float

    @property
    def rate(self) -> float:
        """MB/s (10^6 bytes)."""
        return self.amount / self.seconds / 1e6


def percentile(values: Sequence[float], fraction: float) -> float:
    """The least of ``values`` that no fewer than ``fraction`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


@contextlib.contextmanager
def failures() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise MeasureFailed("nothing came for too long") from None
    except OSError as error:
        raise MeasureFailed(f"the connection failed: {error.strerror or error}") from None


# --- latency ---------------------------------------------------------------------------------------


def round_trips(port: int, count: int) -> list[float]:
    """Seconds of each of ``count`` exchanges of one byte, one after the other over one connection."""
    with failures(), _connection(port, b"E") as sock:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            sock.send(b".")
            _receive(sock, 1)
            times.append(time.perf_counter() - started)
        return times


def connects(port: int, count: int) -> list[float]:
    """Seconds of each of ``count`` connections: opened, one byte exchanged, closed."""
    times = []
    with failures():
        for _ in range(count):
            started = time.perf_counter()
            with _connection(port, b"E"):
                pass
            times.append(time.perf_counter() - started)
    return times


# --- throughput ------------------------------------------------------------------------------------


def push(port: int, streams: int, seconds: float, amount: int) -> Moved:
    """Send over ``streams`` connections, for ``seconds`` and ``amount`` bytes in all at the most, and wait until
    all has arrived."""
    share = max(1, amount // streams)
    with failures(), _connections(port, b"S", streams) as socks:
        sent = dict.fromkeys(socks, 0)
        started = time.perf_counter()
        with _Ready(socks, selectors.EVENT_WRITE) as ready:
            for sock in ready.until(started + seconds):
                sent[sock] += sock.send(_ZEROS[: share - sent[sock]])
                if sent[sock] == share:
                    ready.discard(sock)
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(DRAIN)
        arrived = {sock: int.from_bytes(_receive(sock, 8), "big") for sock in socks}
        elapsed = time.perf_counter() - started
    if arrived != sent:
        raise MeasureFailed(f"of {sum(sent.values())} bytes {sum(arrived.values())} arrived")
    return Moved(sum(sent.values()), elapsed)


def pull(port: int, streams: int, seconds: float, amount: int) -> Moved:
    """Let the server send over ``streams`` connections, for ``seconds`` and ``amount`` bytes in all at the most,
    and take in all that it has sent."""
    share = max(1, amount // streams)
    with failures(), _connections(port, b"G", streams) as socks:
        taken = dict.fromkeys(socks, 0)
        buffer = memoryview(bytearray(CHUNK))
        started = time.perf_counter()
        for sock in socks:
            sock.send(share.to_bytes(8, "big"))
        with _Ready(socks, selectors.EVENT_READ) as ready:
            for sock in ready.until(started + seconds):
                if not (length := sock.recv_into(buffer)):
                    _check_end(taken[sock], share)
                    ready.discard(sock)
                taken[sock] += length
            for sock in ready:
                sock.shutdown(socket.SHUT_WR)
            for sock in ready.until(time.perf_counter() + DRAIN):
                if not (length := sock.recv_into(buffer)):
                    ready.discard(sock)
                taken[sock] += length
            if list(ready):
                raise TimeoutError
        return Moved(sum(taken.values()), time.perf_counter() - started)


def _check_end(taken: int, share: int) -> None:
    if taken != share:
        raise MeasureFailed(f"a connection ended after {taken} of {share} bytes")


class _Ready:
    """Sockets, made non-blocking, of which some can send or receive now."""

    def __init__(self, socks: Sequence[socket.socket], events: int) -> None:
        self._selector = selectors.DefaultSelector()
        for sock in socks:
            sock.setblocking(False)
            self._selector.register(sock, events)

    def __enter__(self) -> _Ready:
        return self

    def __exit__(self, *exception: object) -> None:
        self._selector.close()

    def __iter__(self) -> Iterator[socket.socket]:
        """Those that have not been discarded."""
        return iter([_socket(key) for key in self._selector.get_map().values()])

    def discard(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)

    def until(self, moment: float) -> Iterator[socket.socket]:
        """Whoever is ready, again and again, until that time of ``perf_counter`` or none is left."""
        while self._selector.get_map() and (left := moment - time.perf_counter()) > 0:
            for key, _ in self._selector.select(left):
                yield _socket(key)


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


# --- connections -----------------------------------------------------------------------------------

_ZEROS = memoryview(bytes(CHUNK))


@contextlib.contextmanager
def _connection(port: int, mode: bytes) -> Iterator[socket.socket]:
    """A connection that the server has answered, so that it is there from end to end."""
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        sock.connect((HOST, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.send(mode)
        if _receive(sock, 1) != mode:
            raise MeasureFailed("something else answers there")
        yield sock


@contextlib.contextmanager
def _connections(port: int, mode: bytes, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(_connection(port, mode)) for _ in range(count)]
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        yield socks


def _receive(sock: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes; raises ``MeasureFailed`` if the connection ends first."""
    data = b""
    while len(data) < length:
        if not (more := sock.recv(length - len(data))):
            raise MeasureFailed("the connection was closed")
        data += more
    return data
