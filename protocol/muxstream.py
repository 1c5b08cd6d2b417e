"""A multiplexed stream as trio knows streams.

The law: ``send_all`` returns when its last byte is on its way, so each stream holds one caller's data
and no queue; what was received is bounded by the stream's window and the slots lent to it, and credit and
slots go back only for what the application has taken. An end (``b""``) that has arrived stays readable, with
all before it, even if the stream is cut afterwards; without one, a cut discards what was not read, as TCP does.

Beside trio's interface there is one without copies and without turns of trio, for who joins a stream with a
socket (``pump``): ``peek``, ``advance`` and ``on_readable``; ``take_run``, ``send_run`` and ``send_now``.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from protocol.bulk import INLINE_BELOW, Loan, Run
from protocol.errors import ErrorCode, LinkError, LocalProtocolError, StreamReset
from protocol.lane import Lane
from protocol.session import Session

Sink = Callable[[bytes | memoryview], int]
"""Takes bytes that have just come, and returns how many; it must neither wait nor raise."""


@dataclass(slots=True)
class Traffic:
    """Bytes that streams have carried, from the peer and to it."""

    received: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Driver:
    """What the streams of one link have in common.

    ``flush``: the session may have something to write. ``express``: sends a stream's data at once, ahead of nothing;
    False if that cannot be done. ``lane``: where the link is read, and whoever joins a stream with a descriptor may
    read that. ``traffic`` counts what they carry.
    """

    session: Session
    flush: Callable[[], None]
    express: Callable[[int, bytes], bool] | None = None
    lane: Lane | None = None
    traffic: Traffic = field(default_factory=Traffic)


class MuxStream(trio.abc.HalfCloseableStream):
    """One stream of a link. Made by ``Link.open`` and ``Incoming.accept``.

    A reset by the peer is ``trio.BrokenResourceError`` with a ``StreamReset`` as its ``__cause__``; the
    loss of the link is the same with a ``LinkError``.
    """

    def __init__(self, driver: Driver, number: int) -> None:
        self.lane = driver.lane
        """Where the stream is read, and whoever joins it with a descriptor may read that."""
        self._driver = driver
        self._session = driver.session
        self._number = number
        self._flush = driver.flush
        self._traffic = driver.traffic
        self._half = driver.session.stream(number)
        self.sink: Sink | None = None
        """Gets what comes, if nothing waits to be read; the rest, and all without it, is for ``peek``."""
        self.on_room: Callable[[], None] | None = None
        """Called when there may be credit or memory to send with; it must neither wait nor raise."""
        self.on_readable: Callable[[], None] | None = None
        """Called when there is something new to ``peek`` at, an end, or a break; it must neither wait nor raise."""
        self._received: deque[tuple[memoryview, Loan | None]] = deque()
        self._ended = False  # the peer's direction
        self._finished = False  # ours
        self._closed = False
        self._broken: StreamReset | LinkError | None = None
        self._sending = self._receiving = False
        self._senders: trio.lowlevel.ParkingLot | None = None  # that wait; most streams never have any
        self._receivers: trio.lowlevel.ParkingLot | None = None

    # --- the application ---------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``, as fast as the peer grants credit for it."""
        with self._exclusive_send():
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            if not data:
                return
            data = self._send_runs(data)
            if not data:
                return
            self._traffic.sent += len(data)
            # Queued without a copy, so it must be bytes: the caller may reuse anything else.
            self._session.send_data(self._number, data if isinstance(data, bytes) else bytes(data))
            self._flush()
            try:
                while not self._half.drained:
                    await self._wait_to_send()
                    self._check_sendable()
            except BaseException:
                self._session.drop_unsent(self._number)
                raise
            self._check_sendable()

    def _send_runs(self, data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
        """What is left of ``data`` after the plane's memory took what it has room for."""
        while len(data) >= INLINE_BELOW:
            if (run := self._session.take_run(self._number, len(data))) is None:
                break
            try:
                run.length = min(len(data), len(run.view))
                view = memoryview(data)
                run.view[: run.length] = view[: run.length]
                data = view[run.length :]
                self._traffic.sent += run.length
                self._session.send_run(self._number, run)
            finally:
                if run.slots:
                    run.give_back()
            self._flush()
        return data

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is credit."""
        with self._exclusive_send():
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            while not self._half.writable:
                await self._wait_to_send()
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
                await self._wait_to_receive()
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

    # --- without copies ----------------------------------------------------------------------------

    def peek(self) -> memoryview | None:
        """The next received bytes, at least one, until ``advance``; None if there are none now."""
        return self._received[0][0] if self._received else None

    def advance(self, count: int) -> None:
        """``count`` bytes of what ``peek`` gave are not needed any more."""
        view, loan = self._received[0]
        if count < len(view):
            self._received[0] = (view[count:], loan)
        else:
            self._received.popleft()
            if loan is not None:
                loan.release()  # which says so if the peer is to have it back at once
        if loan is None:
            self._consumed(count)

    @property
    def ended(self) -> bool:
        """Whether the peer's direction has ended, and all of it was read. Raises when nothing can be read any more."""
        return not self._received and self._check_receivable()

    def take_run(self, size: int) -> Run | None:
        """Memory for up to ``size`` bytes to send; None if there is none for this stream now. Raises as
        ``send_all``."""
        self._check_sendable()
        return self._session.take_run(self._number, size) if self._half.drained else None

    @property
    def should_wait(self) -> bool:
        """Whether there will be memory again soon (``on_room``), for more than what goes inline."""
        return self._session.lends(self._number) or not self._session.memory_is_stuck

    def send_run(self, run: Run) -> None:
        """Send ``run.length`` bytes of ``run``, which is given away. Raises as ``send_all``."""
        self._check_sendable()
        self._traffic.sent += run.length
        self._session.send_run(self._number, run)
        self._flush()

    def send_now(self, data: bytes) -> None:
        """Send ``data``, or queue what there is no credit for; only when ``writable``. Raises as ``send_all``."""
        self._check_sendable()
        self._traffic.sent += len(data)
        if self._driver.express is None or not self._driver.express(self._number, data):
            self._session.send_data(self._number, data)
            self._flush()

    def end_now(self) -> None:
        """End this direction, after what is queued. Raises as ``send_all``."""
        self._check_sendable()
        self._finished = True
        self._session.send_eof(self._number)
        self._flush()

    @property
    def fault(self) -> Exception | None:
        """Why nothing can be sent any more: the peer, or the link."""
        return self._broken

    @property
    def complete(self) -> bool:
        """Whether all that the peer had to say has come."""
        return self._ended

    @property
    def has_memory(self) -> bool:
        """Whether this session has memory for payloads."""
        return self._session.has_memory

    @property
    def is_closed(self) -> bool:
        """Whether this end was closed."""
        return self._closed

    @property
    def drained(self) -> bool:
        """Whether nothing waits to be sent."""
        return self._half.drained

    @property
    def writable(self) -> bool:
        """Whether there is credit, and nothing waits for more."""
        return self._half.writable

    # --- the link ----------------------------------------------------------------------------------

    def on_data(self, data: bytes | memoryview, loan: Loan | None) -> None:
        self._traffic.received += len(data)
        if self._closed or (self._broken is not None and not self._ended):
            if loan is not None:
                loan.release()
            return
        if self.sink is not None and not self._received:
            taken = self.sink(data)
            if loan is None:
                self._consumed(taken)
            if taken == len(data) or self.is_closed:
                if loan is not None:
                    loan.release()
                return
            data = memoryview(data)[taken:]
        self._received.append((memoryview(data), loan))
        self._wake_reader()

    def _consumed(self, count: int) -> None:
        if self._session.consume(self._number, count):
            self._flush()

    def on_eof(self) -> None:
        self._ended = True
        self._wake_reader()

    def _wake_reader(self) -> None:
        self._wake_receivers()
        if self.on_readable is not None:
            self.on_readable()

    async def _wait_to_send(self) -> None:
        self._senders = trio.lowlevel.ParkingLot()
        await self._senders.park()

    async def _wait_to_receive(self) -> None:
        self._receivers = trio.lowlevel.ParkingLot()
        await self._receivers.park()

    def _wake_senders(self) -> None:
        if self._senders is not None:
            self._senders.unpark_all()
            self._senders = None

    def _wake_receivers(self) -> None:
        if self._receivers is not None:
            self._receivers.unpark_all()
            self._receivers = None

    def _discard(self) -> None:
        """What was received will not be read."""
        received, self._received = self._received, deque()
        for _, loan in received:
            if loan is not None:
                loan.release()

    def on_sendable(self) -> None:
        """Data was sent, or credit or memory came."""
        self._wake_senders()
        if self.on_room is not None:
            self.on_room()

    def cut(self, code: ErrorCode, message: str) -> None:
        """Close this end at once; the peer sees a reset unless both directions have ended."""
        if self._closed:
            return
        self._closed = True
        self._discard()
        if self._session.knows(self._number):
            self._session.reset(self._number, code, message)
            self._flush()
        self._wake()

    def abandon(self) -> None:
        """It was never opened: what the peer sent before it knew goes nowhere."""
        self._closed = True
        self._discard()

    def on_broken(self, error: StreamReset | LinkError) -> None:
        """Cut by the peer, or with the link."""
        self._broken = error
        if not self._ended:
            self._discard()
        self._wake()
        if self.on_readable is not None:
            self.on_readable()

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
        view = self._received[0][0]
        taken = bytes(view if max_bytes is None else view[:max_bytes])
        self.advance(len(taken))
        return taken

    def _wake(self) -> None:
        self._wake_senders()
        self._wake_receivers()


class Incoming:
    """A stream the peer wants to open, not yet answered."""

    def __init__(self, driver: Driver, number: int) -> None:
        self.number = number
        self._session, self._flush = driver.session, driver.flush
        self._answered = False
        self._broken: StreamReset | LinkError | None = None
        self.scope: trio.CancelScope | None = None
        """That of its handler, if there is one."""
        # Made before the answer, so that nothing the peer says next can find nobody there.
        self.stream = MuxStream(driver, number)

    async def accept(self) -> MuxStream:
        """The open stream. Raises ``trio.BrokenResourceError`` if the peer or the link has gone meanwhile."""
        await trio.lowlevel.checkpoint()
        return self.accept_now()

    def accept_now(self) -> MuxStream:
        """``accept`` for who cannot wait."""
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
            if self.scope is not None:
                self.scope.cancel()

    def finish(self, code: ErrorCode, message: str, hint: str = "") -> None:
        """The handler is done: refuse what it did not answer, cut what it did not close."""
        if self._answered:
            self.stream.cut(code, message)
        elif self._broken is None:
            self._refuse(code, message, hint)

    def _refuse(self, code: ErrorCode, message: str, hint: str) -> None:
        self._answered = True
        self.stream.abandon()
        self._session.refuse(self.number, code, message, hint)
        self._flush()

    def _check_unanswered(self) -> None:
        if self._broken is not None:
            raise trio.BrokenResourceError(str(self._broken)) from self._broken
        if self._answered:
            raise LocalProtocolError("this stream has been answered already")
