"""Listeners as many as are asked for, which echo; stdlib only, so that it runs in the VM as well.

Each line of the standard input is ``listen FIRST COUNT`` or ``close FIRST COUNT``, about ports of 127.0.0.1; each is
answered by ``done`` once it is. It ends with its input.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import socket

BACKLOG = 1024


class Server:
    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._listeners: dict[int, socket.socket] = {}

    def run(self) -> None:
        self._selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd == 0:
                    if not (lines := os.read(0, 65536)):
                        return
                    for line in lines.splitlines():
                        self._obey(*line.split())
                elif key.data == "listener":
                    self._accept(key.fileobj)
                else:
                    self._echo(key.fileobj)

    def _obey(self, word: bytes, first: bytes, count: bytes) -> None:
        for port in range(int(first), int(first) + int(count)):
            if word == b"listen":
                listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
                listener.setblocking(False)
                self._listeners[port] = listener
                self._selector.register(listener, selectors.EVENT_READ, "listener")
            else:
                self._close(self._listeners.pop(port))
        print("done", flush=True)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ)

    def _echo(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            if data:
                connection.sendall(data)  # what the tests say fits into a socket's buffer
        except OSError:
            data = b""
        if not data:
            self._close(connection)

    def _close(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        sock.close()


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Server().run()


if __name__ == "__main__":
    main()
