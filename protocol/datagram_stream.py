"""A link's stream as datagrams both ways (``datagrams``), without a task.

The law is UDP's: a datagram arrives whole, in order or not at all; nobody waits for it, and nothing is kept for later.
What the stream does not take at once is dropped, the newest first, and counted. So either side holds no more than one
batch that goes out and one datagram that comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from protocol.datagrams import DatagramReader, encode
from protocol.errors import DecodeError, ErrorCode, LocalProtocolError
from protocol.muxstream import MuxStream

MAX_BATCH: Final = 64 * 1024
"""Bytes after which no further datagram is added to what is sent at once."""


class DatagramStream:
    """A stream of a link, which this owns, as datagrams both ways.

    ``deliver`` gets each datagram that comes, ``on_end`` is called once when the stream has ended or broke, or ``end``
    was called. Neither may wait or raise.
    """

    def __init__(
        self, stream: MuxStream, deliver: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        if stream.lane is None:
            raise LocalProtocolError("a stream without a link has no lane")
        self.lane: Final = stream.lane
        self.dropped = 0
        """Datagrams that the stream did not take."""
        self._stream = stream
        self._deliver = deliver
        self._on_end = on_end
        self._reader = DatagramReader()
        self._over = False

    def start(self) -> None:
        self._stream.on_readable = self._on_readable
        self._stream.sink = self._take
        self._on_readable()

    def send(self, datagrams: Sequence[bytes]) -> None:
        """Send them at once, or drop them. What is over drops everything."""
        if self._over or not self._stream.writable:
            self.dropped += len(datagrams)
            return
        with suppress(trio.BrokenResourceError):  # of which ``on_readable`` tells
            self._stream.send_now(encode(datagrams))

    def end(self, code: ErrorCode, reason: str) -> None:
        """Cut the stream; nothing happens if it is over."""
        if self._over:
            return
        self._over = True
        self._stream.on_readable = self._stream.sink = None
        self._stream.cut(code, reason)
        self._on_end()

    def _take(self, data: bytes | memoryview) -> int:
        if self._over:
            return 0
        try:
            datagrams = self._reader.receive_data(data)
        except DecodeError as error:
            self.end(ErrorCode.PROTOCOL, str(error))
            return 0
        for datagram in datagrams:
            if not self._over:
                self._deliver(datagram)
        return 0 if self._over else len(data)

    def _on_readable(self) -> None:
        while not self._over and self._stream.fault is None and (view := self._stream.peek()) is not None:
            size = len(view)
            self._take(view)
            if not self._over:
                self._stream.advance(size)
        if self._over:
            return
        if self._stream.fault is not None:
            self.end(ErrorCode.CANCELLED, "")
        elif self._stream.ended:
            code = ErrorCode.CANCELLED if self._reader.complete else ErrorCode.PROTOCOL
            self.end(code, "the other end has ended")
