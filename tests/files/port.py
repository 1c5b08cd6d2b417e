"""A stand-in for QEMU's virtio-serial port: two unix sockets, and bytes between them.

The law is the port's: it has no connections. Either side comes and goes; nothing is taken from a side while
the other is away, what was on its way then reaches whoever comes next, and the end of one side is no end for
the other. Threads that block: a call on the mount crosses here twice, and through trio that would be half of
its time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

CHUNK: Final = 64 * 1024


class Over(Exception):
    """The port was taken away."""


class Side:
    """One end of the port: a socket that takes one peer at a time, the last that came."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peer: socket.socket | None = None
        self._past: list[socket.socket] = []
        self._over = False
        self._changed = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(8)

    def accept(self) -> None:
        """Take peers until the port is closed."""
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self._forget()
                self._peer = peer
                self._changed.notify_all()

    def peer(self) -> socket.socket:
        """The peer of now, or the next."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._peer is not None)
            if self._over or self._peer is None:
                raise Over
            return self._peer

    def lose(self, peer: socket.socket) -> None:
        """``peer`` has ended; nothing if another has come since."""
        with self._changed:
            if peer is self._peer:
                self._forget()

    def drop(self) -> None:
        """Hang up on the peer, if there is one."""
        with self._changed:
            self._forget()

    def _forget(self) -> None:
        if self._peer is not None:
            # Who is in recv() or send() on it leaves; only then may its number become another's.
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)
            self._past.append(self._peer)
            self._peer = None

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._forget()
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Close what is left, once no thread uses it any more."""
        for left in (self._listener, *self._past):
            left.close()


class Port:
    """The port between ``host`` and ``guest``, the paths of the sockets that the two sides connect to."""

    def __init__(self, host: Path, guest: Path) -> None:
        self.host, self.guest = Side(host), Side(guest)
        self._passes = threading.Event()
        self._passes.set()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Both sides lose their connections, and until the end nothing passes between those that they make."""
        self._passes.clear()
        try:
            self.host.drop()
            self.guest.drop()
            yield
        finally:
            self._passes.set()

    def __enter__(self) -> Port:
        targets = [
            (self.host.accept, ()),
            (self.guest.accept, ()),
            (self._carry, (self.host, self.guest)),
            (self._carry, (self.guest, self.host)),
        ]
        self._threads = [threading.Thread(target=target, args=args, daemon=True) for target, args in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.host.close()
        self.guest.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self.host.release()
        self.guest.release()

    def _carry(self, source: Side, target: Side) -> None:
        with contextlib.suppress(Over):
            while True:
                peer = source.peer()
                target.peer()
                try:
                    data = peer.recv(CHUNK)
                except OSError:
                    data = b""
                if data:
                    self._deliver(data, target)
                else:
                    source.lose(peer)

    def _deliver(self, data: bytes, target: Side) -> None:
        self._passes.wait()
        peer = target.peer()
        try:
            peer.sendall(data)
        except OSError:
            target.lose(peer)  # and the rest is lost
