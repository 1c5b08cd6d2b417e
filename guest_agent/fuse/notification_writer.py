"""The process that writes notifications: ``python3 -m guest_agent.fuse.notification_writer FD``.

The kernel carries a notification out in the thread that writes it, waiting for page and inode locks that
requests hold until they are answered, and not even SIGKILL ends that wait. Were it a thread of the file
server's, then a killed server could stay half alive, with its descriptor in hand, so that systemd would
never start the successor that could answer. So it is a process of its own, which matters to nobody.

FD is a SOCK_SEQPACKET socket. A message is ``HEAD`` and, for WRITE, a notification or several, which are written in
their order by one thread; with OPEN comes the descriptor. Each WRITE is answered by a ``RESULT``, in any order. End
of file ends the process.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from typing import Final

OPEN: Final = 1
CLOSE: Final = 2
WRITE: Final = 3

HEAD: Final = struct.Struct("<IIQ")
"""What to do, the connection (a number of the server's), and a ticket that the result will carry."""
RESULT: Final = struct.Struct("<QI")
"""The ticket, and 0 or the errno; of several notifications the last one's."""

MAX_MESSAGE: Final = 100 << 10
"""The longest notification is INVAL_ENTRY with a name of 255 bytes: 296 bytes, and 256 of those are 74 KiB
(``promises.MAX_SEQUENCE``). From 128 KiB on malloc would map memory anew for each message."""

THREADS: Final = 8
"""At most for each connection's data, and as many for its names; one is busy for as long as pages of its file are
being read from the host, or its directory is locked. Apart, for a LOOKUP that holds the lock of its directory may
be answered only after the drop of data: names of that directory, which wait for the lock, must not stand before it."""

_INVAL_ENTRY: Final = struct.pack("<i", 3)
"""FUSE_NOTIFY_INVAL_ENTRY, the second word of a notification. The first is its length."""
_LENGTH: Final = struct.Struct("<I")


class Writers:
    """The threads for one connection's data or names. They are made as they are needed, and end with ``close``."""

    def __init__(self, fd: int, results: socket.socket) -> None:
        self._fd = fd
        self._results = results
        self._work: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0
        self._lock = threading.Lock()

    def write(self, ticket: int, notifications: bytes) -> None:
        with self._lock:
            self._unfinished += 1
            more = self._threads < min(self._unfinished, THREADS)
            self._threads += more
        if more:
            threading.Thread(target=self._run, daemon=True).start()
        self._work.put((ticket, notifications))

    def close(self) -> None:
        """End the threads after what was asked for; the last one closes the descriptor."""
        with self._lock:
            threads = self._threads
        if not threads:
            os.close(self._fd)
        for _ in range(threads):
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            ticket, notifications = item
            error = 0
            while notifications:
                (length,) = _LENGTH.unpack_from(notifications)
                error = self._write(notifications[:length])
                notifications = notifications[length:]
            with self._lock:
                self._unfinished -= 1
            with suppress(ConnectionError):  # the server is gone, and this process goes next
                self._results.send(RESULT.pack(ticket, error))
        with self._lock:
            self._threads -= 1
            last = self._threads == 0
        if last:
            os.close(self._fd)

    def _write(self, notification: bytes) -> int:
        try:
            os.write(self._fd, notification)
        except OSError as failure:
            return failure.errno or 0
        return 0


def run(link: socket.socket) -> None:
    """Until the server's end is closed."""
    connections: dict[int, tuple[Writers, Writers]] = {}
    while True:
        message, fds, _, _ = socket.recv_fds(link, MAX_MESSAGE, 1)
        if not message:
            return
        action, connection, ticket = HEAD.unpack_from(message)
        if action == OPEN:
            connections[connection] = Writers(fds[0], link), Writers(os.dup(fds[0]), link)
        elif action == CLOSE:
            for writers in connections.pop(connection):
                writers.close()
        elif action == WRITE:
            data, names = connections[connection]
            notifications = message[HEAD.size :]
            (names if notifications[4:8] == _INVAL_ENTRY else data).write(ticket, notifications)


def main(arguments: list[str]) -> None:
    # Of a service that stops, every process gets SIGTERM; this one ends with the server that it serves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(ConnectionError):
        run(socket.socket(fileno=int(arguments[0])))
    os._exit(0)  # no waiting for threads that the kernel holds


if __name__ == "__main__":
    main(sys.argv[1:])
