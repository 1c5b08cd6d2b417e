"""A multiplexed stream as trio knows streams.

The law: ``send_all`` returns when its last byte is on its way, so each stream holds one caller's data
and no queue; what was received is bounded by the stream's window, and credit goes back only for what
the application has taken. An end (``b""``) that has arrived stays readable, with all before it, even
if the stream is cut afterwards; without one, a cut discards what was not read, as TCP does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from protocol.errors import ErrorCode, LinkError, LocalProtocolError, StreamReset
from protocol.session import Session


class MuxStream(trio.abc.HalfCloseableStream):
    """One stream of a link. Made by ``Link.open`` and ``Incoming.accept``.

    A reset by the peer is ``trio.BrokenResourceError`` with a ``StreamReset`` as its ``__cause__``; the
    loss of the link is the same with a ``LinkError``.
    """

    def __init__(self, session: Session, number: int, flush: Callable[[], None]) -> None:
        self._session = session
        self._number = number
        self._flush = flush  # the session may have something to write
        self._received = bytearray()
        self._ended = False  # the peer's direction
        self._finished = False  # ours
        self._closed = False
        self._broken: StreamReset | LinkError | None = None
        self._sending = self._receiving = False
        self._send_wakeup = trio.lowlevel.ParkingLot()
        self._receive_wakeup = trio.lowlevel.ParkingLot()

    # --- the application ---------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``, as fast as the peer grants credit for it."""
        with self._exclusive_send():
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            if not data:
                return
            # Queued without a copy, so it must be bytes: the caller may reuse anything else.
            self._session.send_data(self._number, data if isinstance(data, bytes) else bytes(data))
            self._flush()
            try:
                while not self._session.drained(self._number):
                    await self._send_wakeup.park()
                    self._check_sendable()
            except BaseException:
                self._session.drop_unsent(self._number)
                raise
            self._check_sendable()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is credit."""
        with self._exclusive_send():
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            while not self._session.writable(self._number):
                await self._send_wakeup.park()
                self._check_sendable()

    async def send_eof(self) -> None:
        """End this direction; the other one lives on. Twice is once."""
        with self._exclusive_send():
            await trio.lowlevel.checkpoint()
            if self._finished and not self._closed:
                return
            self._check_sendable()
            self._finished = True
            self._session.send_eof(self._number)
            self._flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte, or ``b""`` after the peer's end of its direction."""
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while not self._received:
                if self._check_receivable():
                    return b""
                await self._receive_wakeup.park()
            self._check_receivable()
            return self._take(max_bytes)
        finally:
            self._receiving = False

    async def reset(self, code: ErrorCode, message: str = "") -> None:
        """Cut both directions and close this end; the peer learns ``code`` and ``message``.

        Does not wait for the peer. Nothing is sent when both directions have ended already.
        """
        self.cut(code, message)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close this end. Unless both directions have ended, the peer sees a reset (``cancelled``)."""
        self.cut(ErrorCode.CANCELLED, "closed by the peer")
        await trio.lowlevel.checkpoint()

    # --- the link ----------------------------------------------------------------------------------

    def on_data(self, data: bytes) -> None:
        self._received += data
        self._receive_wakeup.unpark_all()

    def on_eof(self) -> None:
        self._ended = True
        self._receive_wakeup.unpark_all()

    def on_sendable(self) -> None:
        """Data was sent, or credit came."""
        self._send_wakeup.unpark_all()

    def cut(self, code: ErrorCode, message: str) -> None:
        """Close this end at once; the peer sees a reset unless both directions have ended."""
        if self._closed:
            return
        self._closed = True
        self._received.clear()
        if self._session.knows(self._number):
            self._session.reset(self._number, code, message)
            self._flush()
        self._wake()

    def on_broken(self, error: StreamReset | LinkError) -> None:
        """Cut by the peer, or with the link."""
        self._broken = error
        if not self._ended:
            self._received.clear()
        self._wake()

    # --- inner -------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive_send(self) -> Iterator[None]:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            yield
        finally:
            self._sending = False

    def _check_sendable(self) -> None:
        if self._closed or self._finished:
            raise trio.ClosedResourceError("this end of the stream was closed")
        if self._broken is not None:
            raise trio.BrokenResourceError(str(self._broken)) from self._broken

    def _check_receivable(self) -> bool:
        """True at the end of the peer's direction; raises if nothing can be received any more."""
        if self._closed:
            raise trio.ClosedResourceError("this end of the stream was closed")
        if self._broken is not None and not self._ended:
            raise trio.BrokenResourceError(str(self._broken)) from self._broken
        return self._ended

    def _take(self, max_bytes: int | None) -> bytes:
        taken = bytes(self._received if max_bytes is None else self._received[:max_bytes])
        del self._received[: len(taken)]
        self._session.consume(self._number, len(taken))
        self._flush()
        return taken

    def _wake(self) -> None:
        self._send_wakeup.unpark_all()
        self._receive_wakeup.unpark_all()


class Incoming:
    """A stream the peer wants to open, not yet answered; ``scope`` is that of its handler."""

    def __init__(self, session: Session, number: int, flush: Callable[[], None]) -> None:
        self.number = number
        self._session = session
        self._flush = flush
        self._answered = False
        self._broken: StreamReset | LinkError | None = None
        self.scope = trio.CancelScope()
        # Made before the answer, so that nothing the peer says next can find nobody there.
        self.stream = MuxStream(session, number, flush)

    async def accept(self) -> MuxStream:
        """The open stream. Raises ``trio.BrokenResourceError`` if the peer or the link has gone meanwhile."""
        await trio.lowlevel.checkpoint()
        self._check_unanswered()
        self._answered = True
        self._session.accept(self.number)
        self._flush()
        return self.stream

    async def refuse(self, code: ErrorCode, message: str, hint: str = "") -> None:
        """Answer no. Raises as ``accept`` does."""
        await trio.lowlevel.checkpoint()
        self._check_unanswered()
        self._refuse(code, message, hint)

    # --- the link ----------------------------------------------------------------------------------

    def on_broken(self, error: StreamReset | LinkError) -> None:
        """The peer or the link has gone: the handler of an unanswered offer is cancelled."""
        if not self._answered:
            self._broken = error
            self.scope.cancel()

    def finish(self, code: ErrorCode, message: str, hint: str = "") -> None:
        """The handler is done: refuse what it did not answer, cut what it did not close."""
        if self._answered:
            self.stream.cut(code, message)
        elif self._broken is None:
            self._refuse(code, message, hint)

    def _refuse(self, code: ErrorCode, message: str, hint: str) -> None:
        self._answered = True
        self._session.refuse(self.number, code, message, hint)
        self._flush()

    def _check_unanswered(self) -> None:
        if self._broken is not None:
            raise trio.BrokenResourceError(str(self._broken)) from self._broken
        if self._answered:
            raise LocalProtocolError("this stream has been answered already")
