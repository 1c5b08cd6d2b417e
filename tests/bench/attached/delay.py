"""A line on which every byte is under way for a while, as a process of its own.

    python3 delay.py LISTEN TARGET SECONDS

What connects to port LISTEN of localhost is connected to port TARGET. Each byte is held for SECONDS, in both directions,
so a round trip takes twice that. Nothing else is slower: what follows does not wait for what is held, as on a long
wire, and unlike with a relay that sleeps between reading and writing.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from typing import Final

CHUNK: Final = 256 << 10

MAX_UNDER_WAY: Final = 4096
"""Pieces in one direction: at 0.1 s and 64 KiB each that is 2.5 GB/s, which loopback does not move."""

_Held = queue.Queue[tuple[float, bytes]]


def carry(source: socket.socket, target: socket.socket, delay: float) -> None:
    """Until ``source`` ends; then ``target`` is told, as late as everything else."""
    held: _Held = queue.Queue(MAX_UNDER_WAY)
    threading.Thread(target=_deliver, args=(held, target), daemon=True).start()
    data = b"-"
    while data:
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        held.put((time.monotonic() + delay, data))


def _deliver(held: _Held, target: socket.socket) -> None:
    while True:
        due, data = held.get()
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            if not data:
                return target.shutdown(socket.SHUT_WR)
            target.sendall(data)
        except OSError:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)
            data = b""


def connect(one: socket.socket, port: int, delay: float) -> None:
    """Lead ``one`` there."""
    try:
        other = socket.create_connection(("127.0.0.1", port))
    except OSError:
        return one.close()
    for end in (one, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for source, target in ((one, other), (other, one)):
        threading.Thread(target=carry, args=(source, target, delay), daemon=True).start()
    return None


def main() -> None:
    listen, target, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with socket.create_server(("127.0.0.1", listen)) as listener:
        while True:
            connect(listener.accept()[0], target, delay)


if __name__ == "__main__":
    main()
