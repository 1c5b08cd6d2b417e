"""Notifications to the kernel, for a server that must not wait: ask now, be called back when it is done.

The laws:
- Trio's thread never writes a notification (see ``notification_writer``), and calls back on none but that.
- Notifications of one key (a node) go one after the other, and those that wait for the same are one: what
  is asked for while one is under way is done once more after it.
- ``then`` is called in any case; that the kernel knows no such node is normal. What waits is bounded.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import trio

from guest_agent.fuse import abi
from guest_agent.fuse import notification_writer as writer
from guest_agent.fuse.device import Connection

log = logging.getLogger(__name__)

MAX_WAITING = 4096
"""Callbacks of one connection. Each stands for a request of the kernel's, of which the link to the host has
at most 1,024 under way."""

RESTART_AFTER = 0.2
"""Seconds until a writer process that died (the OOM killer) is replaced."""

FAREWELL = 1.0
"""Seconds for the writer process to end by itself."""

Then = Callable[[], None]

_NORMAL = {0, errno.ENOENT, errno.ENODEV, errno.ENOTCONN}
"""Done; nothing is cached of it; unmounted."""


class NotifierFull(Exception):
    """``MAX_WAITING`` callbacks wait already."""


class Notifier:
    """The notifications of one connection; made by ``Notifiers.attach``."""

    def __init__(self, write: Callable[[Notifier, Hashable, bytes], None]) -> None:
        self._write = write
        self._running: dict[Hashable, list[Then]] = {}
        self._next: dict[Hashable, tuple[bytes, list[Then]]] = {}
        self._waiting = 0

    def invalidate_data(self, node: int, then: Then) -> None:
        """Drop a node's cached data and attributes, then call ``then``, on trio's thread. Raises ``NotifierFull``.

        Never hold back the answer to a READ, a WRITE or a SETATTR of the size of the same node for it: the pages
        of such a request are locked, or may not be written back, and the invalidation waits for them. Answer,
        then invalidate. Other requests may wait.
        """
        self.submit(node, abi.inval_inode(node, 0, 0), then)

    def invalidate_entry(self, parent: int, name: bytes, then: Then) -> None:
        """Drop what the kernel knows of a name, then call ``then``. It waits for the directory's lock, so never
        hold back the answer to a request that works on names of ``parent``. Raises ``NotifierFull``."""
        self.submit((parent, name), abi.inval_entry(parent, name), then)

    def sequence(self, notifications: bytes, then: Then) -> None:
        """Write several, one after the other. Who asks bounds how many of these are under way."""
        self._waiting += 1
        key = object()
        self._running[key] = [then]
        self._write(self, key, notifications)

    def submit(self, key: Hashable, notification: bytes, then: Then) -> None:
        """Any notification of ``abi``; ``key`` is the same for the same bytes."""
        if self._waiting >= MAX_WAITING:
            raise NotifierFull(f"{MAX_WAITING} notifications wait for the kernel")
        self._waiting += 1
        if key not in self._running:
            self._running[key] = [then]
            self._write(self, key, notification)
        elif key in self._next:
            self._next[key][1].append(then)
        else:
            self._next[key] = (notification, [then])

    def done(self, key: Hashable) -> None:
        """The notification of ``key`` that was under way has been carried out."""
        thens = self._running.pop(key)
        if key in self._next:
            notification, self._running[key] = self._next.pop(key)
            self._write(self, key, notification)
        self._call(thens)

    def abandon(self) -> None:
        """There is nobody left to notify: call everybody back."""
        thens = [then for waiting in self._running.values() for then in waiting]
        thens += [then for _, waiting in self._next.values() for then in waiting]
        self._running, self._next = {}, {}
        self._call(thens)

    def _call(self, thens: list[Then]) -> None:
        self._waiting -= len(thens)
        for then in thens:
            try:
                then()
            except Exception:
                log.exception("notifier.callback")


class Notifiers:
    """All connections' notifiers, and the process that writes for them. ``run`` it for as long as they are used."""

    def __init__(self) -> None:
        self._connections: dict[int, tuple[Connection, Notifier]] = {}
        self._numbers: dict[Notifier, int] = {}
        self._under_way: dict[int, tuple[Notifier, Hashable, bytes]] = {}
        self._last = 0
        self._link: socket.socket | None = None
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._stuck = trio.Event()

    def attach(self, connection: Connection) -> Notifier:
        """A notifier for ``connection``, until ``detach``. It works once ``run`` does."""
        notifier = Notifier(self._write)
        number = self._number()
        self._connections[number] = connection, notifier
        self._numbers[notifier] = number
        self._send(writer.HEAD.pack(writer.OPEN, number, 0), connection.fd)
        return notifier

    def detach(self, notifier: Notifier) -> None:
        """Before the connection is closed. Whoever still waits is called back."""
        number = self._numbers.pop(notifier)
        del self._connections[number]
        self._under_way = {
            ticket: item for ticket, item in self._under_way.items() if item[0] is not notifier
        }
        self._send(writer.HEAD.pack(writer.CLOSE, number, 0))
        notifier.abandon()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the writer process until cancelled."""
        started = False
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours:
                with theirs:
                    process = await _spawn(theirs)
                ours.setblocking(False)
                self._begin(ours)
                if not started:
                    task_status.started()
                    started = True
                try:
                    await self._converse(ours)
                finally:
                    self._link = None
                    trio.lowlevel.notify_closing(ours)
                    ours.close()  # its end of file ends the process
                    while self._outbox:
                        _drop(self._outbox.popleft()[1])
                    with trio.move_on_after(FAREWELL, shield=True):
                        await process.wait()
            log.error("notifier.died code=%s", process.returncode)
            await trio.sleep(RESTART_AFTER)

    def _begin(self, link: socket.socket) -> None:
        """Tell a new process all it needs; what its predecessor was at is done again, which never hurts."""
        self._link = link
        for number, (connection, _) in self._connections.items():
            self._send(writer.HEAD.pack(writer.OPEN, number, 0), connection.fd)
        for ticket, (notifier, _, notification) in self._under_way.items():
            self._send(writer.HEAD.pack(writer.WRITE, self._numbers[notifier], ticket) + notification)

    async def _converse(self, link: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._unstick, link)
            while message := await self._receive(link):
                ticket, error = writer.RESULT.unpack(message)
                self._finished(ticket, error)
            nursery.cancel_scope.cancel()

    async def _receive(self, link: socket.socket) -> bytes:
        while True:
            try:
                return link.recv(writer.RESULT.size)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(link)
            except ConnectionError:
                return b""

    def _finished(self, ticket: int, error: int) -> None:
        notifier, key, _ = self._under_way.pop(ticket, (None, None, b""))
        if notifier is None:
            return  # of a connection that was detached
        if error not in _NORMAL:
            log.warning("notifier.error key=%r error=%s", key, os.strerror(error))
        notifier.done(key)

    def _write(self, notifier: Notifier, key: Hashable, notification: bytes) -> None:
        ticket = self._number()
        self._under_way[ticket] = notifier, key, notification
        self._send(writer.HEAD.pack(writer.WRITE, self._numbers[notifier], ticket) + notification)

    def _number(self) -> int:
        self._last += 1
        return self._last

    # --- the socket, which may be full for a moment --------------------------------------------------

    def _send(self, message: bytes, fd: int | None = None) -> None:
        if self._link is not None:
            # A copy: the connection may be closed before the message has left.
            self._outbox.append((message, None if fd is None else os.dup(fd)))
            self._flush(self._link)

    def _flush(self, link: socket.socket) -> None:
        while self._outbox:
            message, fd = self._outbox[0]
            rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            try:
                link.sendmsg([message], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return self._stuck.set()
            except ConnectionError:
                return None  # the process is gone; the next one is told everything
            self._outbox.popleft()
            _drop(fd)
        return None

    async def _unstick(self, link: socket.socket) -> None:
        while True:
            await self._stuck.wait()
            self._stuck = trio.Event()
            with suppress(ConnectionError):
                await trio.lowlevel.wait_writable(link)
            self._flush(link)


def _drop(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


async def _spawn(link: socket.socket) -> trio.Process:
    package_root = Path(__file__).parents[2]
    command = [sys.executable, "-P", "-S", "-m", writer.__name__, str(link.fileno())]
    environment = {**os.environ, "PYTHONPATH": str(package_root)}
    return await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=[link.fileno()],
        env=environment,
        cwd="/",
        start_new_session=True,
    )
