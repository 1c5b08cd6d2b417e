"""Stdio that was handed over, as an agent's transport.

sshd gives a command one socket for both directions, or two pipes. A socket is used as it is; anything else is joined to
one end of a socket pair of ours, since an agent wants a descriptor that takes a record whole or not at all.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from contextlib import suppress

import trio

from protocol.serial import READ_SIZE, SocketPort

log = logging.getLogger(__name__)

PIPE_READ = 65536
"""Bytes: a pipe's capacity (pipe(7))."""

DRAIN = 2.0
"""Seconds for a pipe to take what was said last."""


class Stdio(SocketPort):
    """The transport. ``heard`` is set with whatever comes; who looks at it resets it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream, "the connection was lost")
        self._socket = stream.socket
        self.heard = True
        self.closed = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await super().receive_some(max_bytes)
        self.heard = True
        return data

    def receive_nowait(self) -> bytes | None:
        self.heard = True
        try:
            return os.read(self._socket.fileno(), READ_SIZE) or None
        except OSError:
            return None

    def hang_up(self) -> None:
        """Let its user find that it is broken: who has it open closes it, and nobody else, since its descriptor may be
        watched."""
        with suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    async def aclose(self) -> None:
        self.closed.set()
        await super().aclose()


class Pipes:
    """What reads from ``reading`` and writes to ``writing`` (which it owns), behind a socket of its own."""

    def __init__(self, reading: int, writing: int, inner: trio.SocketStream) -> None:
        self._in, self._out = trio.lowlevel.FdStream(reading), trio.lowlevel.FdStream(writing)
        self._inner = inner
        self.done = trio.Event()

    async def carry(self) -> None:
        """Until both directions have ended, or the writing one is broken; what is read last is written."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry_in)
                await _carry(self._inner, self._out)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):  # or only the first would be closed
                for stream in (self._in, self._out, self._inner):
                    await trio.aclose_forcefully(stream)
            self.done.set()

    async def _carry_in(self) -> None:
        await _carry(self._in, self._inner)
        with suppress(OSError):
            self._inner.socket.shutdown(socket.SHUT_WR)


async def _carry(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
    try:
        while data := await source.receive_some(PIPE_READ):
            await sink.send_all(data)
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        log.debug("stdio.pipe error=%r", error)


def join(reading: int, writing: int) -> tuple[Stdio, Pipes | None]:
    """The transport over two descriptors, which it takes; and what must run for it, if they are not one socket.

    Raises ``OSError``, having closed both.
    """
    if is_one_socket(reading, writing):
        os.close(writing)
        return Stdio(_stream(socket.socket(fileno=reading))), None
    try:
        ours, theirs = socket.socketpair()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    return Stdio(_stream(ours)), Pipes(reading, writing, _stream(theirs))


def is_one_socket(reading: int, writing: int) -> bool:
    """Whether both are the same unix stream socket."""
    first, second = os.fstat(reading), os.fstat(writing)
    if not stat.S_ISSOCK(first.st_mode) or (first.st_dev, first.st_ino) != (second.st_dev, second.st_ino):
        return False
    with socket.socket(fileno=os.dup(reading)) as found:
        return found.family == socket.AF_UNIX and found.type == socket.SOCK_STREAM


def _stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
