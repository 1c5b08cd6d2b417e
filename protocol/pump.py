"""A link's stream joined with a socket, without a copy and nearly without turns of trio.

What comes from the link is written to the socket where it arrives, where frames are read; what comes from the
socket is read, on the link's express lane (``lane``), into memory that the peer reads from (``bulk``), or goes inline
within the stream's credit. No task runs for a connection, unless somebody wants to wait for its end.

The laws are those of ``splice``: an end of file is passed on (half-close), a reset is a reset, a slow reader slows
its writer down, and in the end both are closed.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from protocol.bulk import INLINE_BELOW
from protocol.errors import ErrorCode, LocalProtocolError, StreamReset
from protocol.lane import READABLE, WRITABLE, Lane
from protocol.muxstream import MuxStream
from protocol.splice import LINGER_NONE, Spliced

CHUNK: Final = 512 * 1024
"""Bytes read from a socket at a time: what loopback has buffered when its reader is busy."""

INLINE_CHUNK: Final = 64 * 1024
"""The same, without memory for them: a full payload of a frame."""

_BROKEN: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Pump:
    """Carries bytes both ways between ``stream``, of a link, and ``connection``, which does not block; it owns both.

    ``on_end`` is called with what happened when both directions have ended or one broke, which is also how the end
    of the link shows. It must neither wait nor raise.
    """

    def __init__(
        self, stream: MuxStream, connection: socket.socket, on_end: Callable[[Spliced], None]
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._on_end = on_end
        self._lane = _lane(stream)
        self._descriptor = connection.fileno()
        self._from_socket = True  # that direction has not ended
        self._to_socket = True
        self._events = 0  # what is watched for
        self._much = False  # the last read brought more than goes inline
        self._inbound = self._outbound = 0
        self._error: str | None = None

    def start(self) -> None:
        self._stream.on_readable = self._deliver
        self._stream.on_room = self._resume
        self._stream.sink = self._take
        self._deliver()
        if self._error is None:
            self._watch(self._events | READABLE)

    def abort(self, reason: str) -> None:
        """Reset both sides; nothing happens if they have ended."""
        self._finish(reason)

    # --- the end -----------------------------------------------------------------------------------

    def _ended(self) -> None:
        """One direction has come to its end, or what was still to be said has been."""
        if not self._from_socket and not self._to_socket and self._stream.drained:
            self._finish("")

    def _finish(self, error: str) -> None:
        if self._error is not None:
            return
        self._error = error
        self._stream.on_readable = self._stream.on_room = self._stream.sink = None
        self._lane.forget(self._descriptor)
        self._stream.cut(ErrorCode.RESET if error else ErrorCode.CANCELLED, error)
        if error:
            reset(self._connection)
        else:
            self._connection.close()
        self._on_end(Spliced(self._inbound, self._outbound, error))

    def _break(self, error: Exception) -> None:
        self._finish(str(error.__cause__ or error) or type(error).__name__)

    def _cut(self, fault: Exception) -> None:
        """The peer, or the link, has cut the stream. What it had ended before is delivered, while there is a link."""
        if not isinstance(fault, StreamReset) or not self._stream.complete:
            self._break(fault)
        elif not self._to_socket:
            self._break(fault)  # nothing is left to be delivered
        elif self._from_socket:
            self._from_socket = False
            self._watch(self._events & ~READABLE)

    # --- the socket --------------------------------------------------------------------------------

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            try:
                self._lane.watch(self._descriptor, events, self._on_event)
            except (OSError, ValueError) as error:  # closed, by whoever had it before
                self._break(error)

    def _on_event(self, ready: int) -> None:
        events = self._events
        if ready == READABLE == events and not self._much:
            self._collect()
            return
        if events & WRITABLE and ready & ~READABLE:
            self._watch(events & ~WRITABLE)
            self._deliver()
        if events & READABLE and ready & ~WRITABLE and self._error is None:
            self._collect()

    def _resume(self) -> None:
        """There may be room for what the socket has."""
        if self._error is not None:
            return
        if not self._from_socket:
            self._ended()
        elif not self._events & READABLE:
            self._watch(self._events | READABLE)
            self._collect()

    # --- from the link ------------------------------------------------------------------------------

    def _take(self, data: bytes | memoryview) -> int:
        """Write what is just coming, for which nothing waits; returns how much the socket took."""
        if self._error is not None or self._events & WRITABLE or not self._to_socket:
            return 0
        try:
            count = os.write(self._descriptor, data)
        except BlockingIOError:
            count = 0
        except _BROKEN as error:
            self._break(error)
            return 0
        self._inbound += count
        if count < len(data):
            self._watch(self._events | WRITABLE)
        return count

    def _deliver(self) -> None:
        """Write what has come, as much as the socket takes."""
        if self._error is not None:
            return
        if (fault := self._stream.fault) is not None:
            self._cut(fault)
        if self._error is None and self._to_socket and not self._events & WRITABLE:
            try:
                self._write()
            except BlockingIOError:
                self._watch(self._events | WRITABLE)
            except _BROKEN as error:
                self._break(error)

    def _write(self) -> None:
        while (view := self._stream.peek()) is not None:
            count = os.write(self._descriptor, view)
            self._inbound += count
            self._stream.advance(count)
        if self._stream.ended:
            self._to_socket = False
            _shut_down(self._connection)
            if self._stream.fault is None:
                self._ended()
            else:
                self._finish("")

    # --- to the link --------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Send what the socket has; one piece, then it is the next one's turn."""
        try:
            self._read()
        except BlockingIOError:
            pass
        except _BROKEN as error:
            self._break(error)

    def _read(self) -> None:
        if self._much and (run := self._stream.take_run(CHUNK)) is not None:
            try:
                run.length = os.readv(self._descriptor, [run.view])
                self._sent(run.length)
                self._much = run.length >= INLINE_BELOW
                if self._much or (run.length and not self._stream.writable):
                    self._stream.send_run(run)
                elif run.length:
                    self._stream.send_now(bytes(run.content))
            finally:
                if run.slots:
                    run.give_back()
        elif not self._stream.writable or (self._much and self._stream.should_wait):
            self._watch(self._events & ~READABLE)
        else:
            size = INLINE_BELOW if self._stream.has_memory else INLINE_CHUNK
            data = os.read(self._descriptor, size)
            self._much = len(data) == INLINE_BELOW
            self._sent(len(data))
            if data:
                self._stream.send_now(data)

    def _sent(self, count: int) -> None:
        self._outbound += count
        if not count:
            self._from_socket = False
            self._watch(self._events & ~READABLE)
            self._stream.end_now()
            self._ended()


async def pump(stream: MuxStream, connection: trio.SocketStream) -> Spliced:
    """``splice`` for a stream of a link and a socket: ``a_to_b`` is what reached the socket.

    Cancelled: both sides are reset. Raises only for bugs.
    """
    ended: list[Spliced] = []
    done = trio.Event()

    def on_end(spliced: Spliced) -> None:
        ended.append(spliced)
        done.set()

    _lane(stream)
    carried = Pump(stream, detached(connection), on_end)
    try:
        carried.start()
        await done.wait()
    finally:
        carried.abort("cancelled")
    return ended[0]


def detached(connection: trio.SocketStream) -> socket.socket:
    """The socket of ``connection``, which has none any more."""
    return socket.socket(fileno=connection.socket.detach())


def _lane(stream: MuxStream) -> Lane:
    if stream.lane is None:
        raise LocalProtocolError("a stream without a link cannot be pumped")
    return stream.lane


def reset(connection: socket.socket) -> None:
    """Close ``connection`` so that its peer sees a reset, where there is such a thing."""
    # An error means that it is gone already, which is what we wanted.
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
    connection.close()


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has closed both directions already
            raise
