"""``server.c`` in Python, for hosts that cannot compile it: the same arguments, the same conversation.

    python3 fallback.py PORT

It runs in the guest, alone: nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
from dataclasses import dataclass

CHUNK = 256 * 1024
BACKLOG = 1024
ASKED = 8
#: As in server.c.
SEND_BUFFER = 128 * 1024


@dataclass(slots=True)
class Connection:
    sock: socket.socket
    mode: bytes = b""
    asked: bytes = b""
    """What has come of the generator's number, ``ASKED`` bytes."""
    count: int = 0
    """Bytes taken by a sink, left to a generator."""


class Server:
    def __init__(self, port: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._buffer = memoryview(bytearray(CHUNK))
        self._listener = socket.create_server(("0.0.0.0", port), backlog=BACKLOG)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def run(self) -> None:
        """Until stdin ends."""
        while True:
            for key, events in self._selector.select():
                if isinstance(key.data, Connection):
                    try:
                        self._serve(key.data, events)
                    except BlockingIOError:
                        continue
                    except OSError:
                        self._close(key.data)
                elif key.data is not None:
                    self._accept()
                elif not os.read(sys.stdin.fileno(), CHUNK):
                    return

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def _serve(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_READ:
            if length := connection.sock.recv_into(self._buffer):
                self._take(connection, self._buffer[:length])
            else:
                if connection.mode == b"S":
                    connection.sock.send(connection.count.to_bytes(8, "big"))
                return self._close(connection)
        if events & selectors.EVENT_WRITE:
            connection.count -= connection.sock.send(self._buffer[: connection.count])
            if not connection.count:
                connection.sock.shutdown(socket.SHUT_WR)
                self._selector.modify(connection.sock, selectors.EVENT_READ, connection)
        return None

    def _take(self, connection: Connection, data: memoryview) -> None:
        if not connection.mode:
            connection.mode = bytes(data[:1])
            connection.sock.send(data[:1])
            data = data[1:]
        if not data:
            return
        if connection.mode == b"S":
            connection.count += len(data)
        elif connection.mode == b"E":
            connection.sock.send(data)
        elif connection.mode == b"G":
            self._ask(connection, bytes(data))
        else:
            raise ConnectionAbortedError

    def _ask(self, connection: Connection, data: bytes) -> None:
        connection.asked = (connection.asked + data)[:ASKED]
        if len(connection.asked) == ASKED:
            connection.count = int.from_bytes(connection.asked, "big")
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(connection.sock, both, connection)

    def _close(self, connection: Connection) -> None:
        self._selector.unregister(connection.sock)
        connection.sock.close()


def main() -> None:
    server = Server(int(sys.argv[1]))
    print("listening", flush=True)
    server.run()


if __name__ == "__main__":
    main()
