"""Drives a ``Session`` over any trio stream: the one place where the protocol meets I/O.

One task reads, one writes, one keeps time; handlers run in a nursery of their own. The law: when
``Link.run`` is over, for whatever reason, the transport is closed, no handler runs, and everything that
was waiting has failed with a ``LinkError``; and it gets over even if the peer neither reads nor writes.
Errors of the transport become ``LinkError`` in ``_transport_errors`` and nowhere else.
"""

from __future__ import annotations

import errno
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import trio

from protocol import codec, messages
from protocol.api import Notice, Request, Target
from protocol.bulk import Bulk, Run
from protocol.errors import (
    DecodeError,
    ErrorCode,
    LinkClosed,
    LinkError,
    LocalProtocolError,
    OpenRefused,
    RemoteProtocolError,
    RpcError,
    StreamReset,
)
from protocol.files import FileCall
from protocol.frames import MAX_PAYLOAD, Buffer
from protocol.lane import READABLE, Lane
from protocol.messages import Hello
from protocol.muxstream import Driver, Incoming, MuxStream, Traffic
from protocol.outlet import BROKEN, Drained, Fence, Outlet
from protocol.serial import SerialChannel
from protocol.service import Service
from protocol.serving import Serving
from protocol.session import HIGH_WATER, MAX_BACKLOG, Ended, Event, Lapsed, Role, Session, TimedOut

__all__ = ["Hello", "Incoming", "Link", "MuxStream", "Role", "SerialChannel", "Service"]

ReplyT = TypeVar("ReplyT")

OnResult = Callable[[messages.Result | LinkError], None]
"""What is told how a call ended; called where frames are read, so it must neither wait nor raise."""

OnOpened = Callable[[MuxStream | OpenRefused | LinkError], None]
"""What is told whether a stream was opened; as ``OnResult``."""

SendEarly = Callable[[bytes], None]
"""Sends what is to be said first, ``EARLY`` bytes at the most, to a stream that is not open yet; once."""

# Bytes per read. A full chunk with its header, so that bulk data takes one read a frame.
READ_SIZE: Final = 128 * 1024
# Seconds for the peer to take our last words; then the transport is closed without.
GOODBYE_TIMEOUT: Final = 1.0
# Seconds for the answer to ``open_now``, as ``open`` has by default.
OPEN_TIMEOUT: Final = 30.0
# Seconds without a slot coming back after which those who wait for one go on without. An emulated guest with 64 streams
# gives nothing back for 100 ms now and then, and what then goes inline holds up all others behind it.
STUCK_AFTER: Final = 0.25


class _Waiter:
    """Where the task that asked meets the answer."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._outcome: Any = None

    def resolve(self, outcome: Any) -> None:
        self._outcome = outcome
        self._event.set()

    async def wait(self) -> Any:
        await self._event.wait()
        return self._outcome


class Link:
    """One side of a conversation over ``transport``, which it owns. Runs once."""

    peer: Hello
    """The other side's hello; there once ``run`` has started."""
    on_written: Callable[[], None] | None = None
    """Called when ``backlog`` has become less, or memory for payloads free; it must neither wait nor raise."""

    def __init__(
        self,
        transport: trio.abc.Stream,
        role: Role,
        service: Service,
        hello: Hello,
        *,
        heartbeat: float = 5.0,
        dead_after: float = 20.0,
        max_payload: int = MAX_PAYLOAD,
        max_backlog: int = MAX_BACKLOG,
        pause_above: int | None = None,
        bulk: Bulk | None = None,
        lane: Lane | None = None,
        traffic: Traffic | None = None,
        fence: Fence | None = None,
    ) -> None:
        """``bulk``: memory for payloads that this side has; used in one session at a time. ``lane``: one that is
        served already, for longer than this link lives; without, it has its own. ``traffic``: what goes on counting.

        ``max_backlog``: bytes waiting to be written at which the peer is at fault for not reading them.

        ``pause_above``: bytes waiting at which nothing more is read from the peer. Only for one side of a link,
        whose peer always reads: two that pause would wait for each other.

        ``fence``: what the peer must see by another way before anything is written.
        """
        self._transport = transport
        self._service = service
        self._own_lane = lane is None
        self.lane = Lane() if lane is None else lane
        """For who carries streams on: it shares the turns in which this link is read."""
        self.traffic = Traffic() if traffic is None else traffic
        """What its streams have carried."""
        self.bulk = Bulk() if bulk is None else bulk
        self._open_session: Callable[[], Session] = lambda: Session(
            role,
            hello,
            trio.current_time(),
            heartbeat=heartbeat,
            dead_after=dead_after,
            max_payload=max_payload,
            max_backlog=max_backlog,
            bulk=self.bulk,
        )
        self._fence = fence
        self._pause_above = max_backlog if pause_above is None else pause_above
        self._session: Session | None = None
        self._error: LinkError | None = None
        self._greeted = False
        self._asking: dict[int, _Waiter] = {}
        self._opening: dict[int, _Waiter | OnOpened] = {}
        self._due: deque[tuple[float, int]] = deque()  # when to give up on those of ``open_now``, in order
        self._calling: dict[int, OnResult] = {}
        self._streams: dict[int, MuxStream] = {}
        self._over, self._gone = trio.Event(), trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._timer = trio.lowlevel.ParkingLot()
        self._alarm = 0.0
        self._receive_now: Callable[[], bytes | None] | None = getattr(transport, "receive_nowait", None)
        self._reader_wakeup = trio.lowlevel.ParkingLot()
        self._memory_wanted = trio.lowlevel.ParkingLot()
        self._receiving = False
        self._bug: Exception | None = None
        self._room_came = self._telling_room = False

    # --- life --------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until the link is over. Started when both hellos are exchanged.

        Returns after a goodbye of either side, or the end of the transport between two frames; raises
        ``LinkError`` for any other end, and for any end before the peer's hello.
        """
        if self._session is not None:
            raise LocalProtocolError("a link runs once")
        self._session = self._open_session()
        self.bulk.on_room, self.bulk.on_urgent = self._on_room, self._flush
        self.bulk.on_wanted = self._memory_wanted.unpark_all
        self._outlet = Outlet(self._session, self._transport, self, self._fence)
        self._driver = Driver(self._session, self._flush, self._outlet.express, self.lane, self.traffic)
        self._serving = Serving(self._service, self._driver, self._wait_for_room)
        self._started = task_status.started
        try:
            await self._drive()
        finally:
            self._session.goodbye("the peer left")
            self._end(LinkClosed("this side left the link"))
            await self._hang_up()
            if self._own_lane:
                self.lane.close()
            self._gone.set()
        assert self._error is not None
        if not (self._greeted and isinstance(self._error, LinkClosed)):
            raise self._error

    async def goodbye(self, reason: str = "") -> None:
        """End the link in good order, telling the peer why; returns when it is over."""
        session = self._live()
        session.goodbye(reason)
        self._end(LinkClosed(reason or "this side closed the link"))
        await self._gone.wait()

    async def _drive(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._serving.run)
            nursery.start_soon(self._read)
            if self._own_lane:
                nursery.start_soon(self.lane.run)
            nursery.start_soon(self._write)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._watch_memory)
            await self._over.wait()
            await self._serving.stop()
            with trio.move_on_after(GOODBYE_TIMEOUT):
                await self._outlet.emptied()
            nursery.cancel_scope.cancel()

    def _end(self, error: LinkError) -> None:
        """Fail everything that waits, and let ``run`` finish. Only the first reason counts."""
        if self._error is not None:
            return
        self._error = error
        opening = list(self._opening.values())
        for waiter in [*self._asking.values(), *opening]:
            if isinstance(waiter, _Waiter):
                waiter.resolve(error)
        self._serving.on_broken(error)
        for stream in self._streams.values():
            stream.on_broken(error)
        self._opening.clear()
        for waiting in opening:
            if not isinstance(waiting, _Waiter):
                waiting(_again(error))
        called = list(self._calling.values())
        self._calling.clear()
        for on_result in called:
            on_result(_again(error))
        self._asking.clear()
        self._streams.clear()
        self._over.set()
        self._room.unpark_all()
        self._outlet.wake()

    async def _hang_up(self) -> None:
        """Close the transport, whatever it and the peer do; say goodbye first where that is possible."""
        with trio.CancelScope(shield=True):
            if words := self._outlet.last_words():
                if self._fence is not None:
                    await self._outlet.held(self._fence)
                with trio.move_on_after(GOODBYE_TIMEOUT), self._transport_errors():
                    await self._transport.send_all(words)
            await trio.aclose_forcefully(self._transport)

    def _running(self) -> Session:
        if self._session is None:
            raise LocalProtocolError("this link is not running")
        return self._session

    def _live(self) -> Session:
        """The session, if it can be used; else raises ``LinkError``."""
        session = self._running()
        if self._error is not None:
            raise _again(self._error)
        if not self._greeted:
            raise LocalProtocolError("the hellos have not been exchanged")
        return session

    # --- the three tasks ---------------------------------------------------------------------------

    @contextmanager
    def _transport_errors(self) -> Iterator[None]:
        try:
            yield
        except BROKEN as error:
            lost = error.__cause__
            if not isinstance(lost, LinkError):
                lost = LinkError(f"the transport failed: {error or type(error).__name__}")
                lost.__cause__ = error
            self._dispatch(self._running().lose(lost))

    async def _read(self) -> None:
        """What the lane does not: the beginning, the end, and what has to wait for something."""
        session = self._running()
        with self._transport_errors():
            while data := await self._transport.receive_some(READ_SIZE):
                self._take(bytes(data))
                await self._let_others_follow()
                await self._read_in_lane()
                await self._let_others_follow()
            self._dispatch_all(session.receive_eof())

    async def _read_in_lane(self) -> None:
        """Return when there is something that the lane cannot do. Wakes up for nothing else."""
        descriptor = -1 if self._receive_now is None else self._transport.fileno()  # type: ignore[attr-defined]
        while self._receive_now is not None and self._can_go_on and (data := self._receive_now()):
            self._take(data)  # what is here already wakes nobody up
            await trio.lowlevel.checkpoint()
        if descriptor >= 0 and self._can_go_on:
            self.lane.watch(descriptor, READABLE, self._on_receivable)
            try:
                await self._reader_wakeup.park()
            finally:
                self.lane.forget(descriptor)
            if self._bug is not None:
                raise self._bug

    @property
    def _can_go_on(self) -> bool:
        """Whether more may be read at once."""
        return (
            self._error is None
            and self._serving.notices_done
            and self._driver.session.backlog <= self._pause_above
        )

    def _on_receivable(self, ready: int) -> None:
        assert self._receive_now is not None
        data = None
        try:
            if ready == READABLE and self._error is None and (data := self._receive_now()) is not None:
                self._take(data)
        except Exception as error:  # this link's end, and not that of all who share the lane
            self._bug = error
        if data is None or self._bug is not None or not self._can_go_on:
            self._reader_wakeup.unpark_all()

    def _take(self, data: bytes) -> None:
        session = self._driver.session
        self._receiving = True
        try:
            if (express := session.receive_express(data)) is not None:
                if self._error is None:
                    self._streams[express[0]].on_data(express[1], None)
            else:
                for event in session.receive_data(data, trio.current_time()):
                    self._dispatch(event)
                if session.is_sooner:
                    self._check_alarm()
        finally:
            self._receiving = False
        self._forget_closed()
        self._outlet.flush()
        if self._room_came:
            self._on_room()

    def _dispatch_all(self, events: list[Event]) -> None:
        # Without a pause: no task of ours sees the session ahead of what it has been told.
        for event in events:
            self._dispatch(event)
        self._forget_closed()
        self._flush()
        if self._driver.session.is_sooner:
            self._check_alarm()

    async def _let_others_follow(self) -> None:
        """Before more is read: what was said must be heard, and answers be taken."""
        await self._serving.wait_for_notices()
        while self._running().backlog > self._pause_above and self._error is None:
            await self._room.park()

    def _forget_closed(self) -> None:
        session = self._driver.session
        if session.closed:
            for number in session.take_closed():
                self._streams.pop(number, None)

    async def _write(self) -> None:
        with self._transport_errors():
            try:
                await self._outlet.run()
            except BROKEN:
                # The peer may have said why before it went: let the reader find that first.
                self._outlet.leave()
                with trio.move_on_after(GOODBYE_TIMEOUT):
                    await self._over.wait()
                raise

    def taken(self, drained: list[int]) -> list[Drained]:
        """(For the outlet.)"""
        # Not there yet are those whose first words went ahead of the answer (``open_now``): nobody waits for these.
        told: list[Drained] = []
        if drained:
            told += [self._streams[number] for number in drained if number in self._streams]
        if not self._receiving:  # else there are events yet for streams that have ended
            self._forget_closed()
        if self._room:
            self._room.unpark_all()
        return told

    def written(self) -> None:
        """(For the outlet.)"""
        if self.on_written is not None:
            self.on_written()

    def _on_room(self) -> None:
        """Slots have come back. Who uses them may cause more to, and is not told in the middle of that."""
        self._room_came = True
        if self._receiving or self._telling_room:
            return
        self._telling_room = True
        try:
            while self._room_came and self._error is None:
                self._room_came = False
                for stream in list(self._streams.values()):
                    stream.on_sendable()
                self.written()
        finally:
            self._telling_room = False

    async def _watch_memory(self) -> None:
        """See that nobody waits for ever for memory that the peer's readers do not give back."""
        bulk = self.bulk
        while True:
            while not bulk.wanted or bulk.stuck:
                await self._memory_wanted.park()
            seen = bulk.returns
            await trio.sleep(STUCK_AFTER)
            if bulk.wanted and bulk.returns == seen:
                bulk.stuck = True
                self._on_room()

    async def _keep_time(self) -> None:
        session = self._running()
        while True:
            session.is_sooner = False
            self._alarm = self._next_alarm()
            with trio.CancelScope(deadline=self._alarm):
                await self._timer.park()
            for event in session.handle_timeout(now := trio.current_time()):
                self._dispatch(event)
            self._expire(now)
            self._flush()

    def _check_alarm(self) -> None:
        """After anything that may be due earlier than all else."""
        if self._next_alarm() < self._alarm:
            self._timer.unpark_all()
        else:
            self._driver.session.is_sooner = False

    def _next_alarm(self) -> float:
        return min(self._running().next_timeout(), self._due[0][0] if self._due else math.inf)

    def _flush(self) -> None:
        """After anything was done to the session: have what it has to say written."""
        if not self._receiving:
            self._outlet.flush()

    async def _wait_for_room(self) -> Session:
        """The session, once control frames may be added to what waits to be written."""
        await trio.lowlevel.checkpoint()
        while (session := self._live()).backlog > HIGH_WATER:
            await self._room.park()
        return session

    # --- what the application asks -----------------------------------------------------------------

    async def request(self, message: Request[ReplyT], *, timeout: float | None = 30.0) -> ReplyT:
        """Ask the peer and return its reply.

        Raises ``RpcError`` if it fails there, or (``TIMEOUT``) is not answered within ``timeout`` seconds;
        ``LinkError`` when the link is over. Cancelled: the peer is told to stop.
        """
        answer = await self._ask(message, timeout)
        if isinstance(answer, messages.Reply):
            try:
                reply: ReplyT = codec.decode(message.REPLY, answer.value)
            except DecodeError as error:
                raise RpcError(ErrorCode.PROTOCOL, f"the reply to {message.METHOD}: {error}") from error
            return reply
        if isinstance(answer, TimedOut):
            raise RpcError(ErrorCode.TIMEOUT, f"no answer to {message.METHOD} within {timeout:g} s")
        raise RpcError(ErrorCode.parse(answer.code), answer.message, answer.hint)

    async def _ask(
        self, message: Request[Any], timeout: float | None
    ) -> messages.Reply | messages.Failure | TimedOut:
        deadline = trio.current_time() + (math.inf if timeout is None else timeout)
        with trio.CancelScope(deadline=deadline) as scope:
            session = await self._wait_for_room()
        if scope.cancelled_caught:
            return TimedOut(0)
        now = trio.current_time()
        left = None if timeout is None else max(0.0, deadline - now)
        number = session.request(message.METHOD, codec.encode(message), left, now)
        waiter = self._asking[number] = _Waiter()
        self._flush()
        self._check_alarm()
        try:
            answer = await waiter.wait()
        finally:
            if self._asking.pop(number, None) is not None:
                session.cancel(number)
                self._flush()
        if isinstance(answer, LinkError):
            raise _again(answer)
        return answer  # type: ignore[no-any-return]

    async def notify(self, notice: Notice) -> None:
        """Tell the peer. Returns when it is queued; raises ``LinkError`` when the link is over."""
        session = await self._wait_for_room()
        session.notify(notice.TOPIC, codec.encode(notice))
        self._flush()

    def post(self, notice: Notice) -> None:
        """Tell the peer, in order with the results of its calls; nothing if the link is over.

        Queued at once, whatever the backlog is: this is for news of which there is less than there are results.
        """
        session = self._running()
        if self._error is None and not session.over:
            session.notify(notice.TOPIC, codec.encode(notice))
            self._flush()

    async def open(self, target: Target, *, timeout: float | None = OPEN_TIMEOUT) -> MuxStream:
        """Open a stream to ``target``.

        Raises ``OpenRefused`` if the peer will not, or (``TIMEOUT``) has not within ``timeout`` seconds;
        ``LinkError`` when the link is over. Cancelled: the peer is told to stop.
        """
        with trio.CancelScope(deadline=trio.current_time() + (math.inf if timeout is None else timeout)):
            return await self._open(target)
        raise OpenRefused(ErrorCode.TIMEOUT, f"no answer to opening {target.KIND} within {timeout:g} s")

    async def _open(self, target: Target) -> MuxStream:
        session = await self._wait_for_room()
        number = session.open(target.KIND, codec.encode(target))
        waiter = self._opening[number] = _Waiter()
        self._flush()
        try:
            answer = await waiter.wait()
        finally:
            if self._opening.pop(number, None) is not None:
                session.reset(number, ErrorCode.CANCELLED)
                self._flush()
        if isinstance(answer, MuxStream):
            return answer
        if isinstance(answer, LinkError):
            raise _again(answer)
        raise answer

    def open_now(self, target: Target, on_answer: OnOpened) -> SendEarly | None:
        """``open`` for who cannot wait; ``on_answer`` gets the stream, or why there is none. None if it would wait.

        What is returned takes what can be sent before the answer: if there is no stream in the end, it was in vain.
        """
        session = self._running()
        if self._error is not None or not self._greeted or session.backlog > HIGH_WATER:
            return None
        try:
            number = session.open(target.KIND, codec.encode(target))
        except OpenRefused:
            return None
        self._opening[number] = on_answer
        while self._due and self._due[0][1] not in self._opening:
            self._due.popleft()
        self._due.append((trio.current_time() + OPEN_TIMEOUT, number))
        self._flush()
        if len(self._due) == 1:
            self._check_alarm()
        return partial(self._send_early, number)

    def _send_early(self, number: int, data: bytes) -> None:
        if number in self._opening:
            self.traffic.sent += len(data)
            if not self._outlet.express(number, data):
                self._driver.session.send_data(number, data)
                self._flush()

    def _expire(self, now: float) -> None:
        """Give up on streams that ``open_now`` asked for and that were not answered in time.

        That is no refusal: the peer may have opened it, and have what was sent early.
        """
        while self._due and (self._due[0][0] <= now or self._due[0][1] not in self._opening):
            _, number = self._due.popleft()
            if callable(waiting := self._opening.pop(number, None)):
                self._driver.session.reset(number, ErrorCode.CANCELLED)
                waiting(LinkError(f"no answer to opening it within {OPEN_TIMEOUT:g} s", ErrorCode.TIMEOUT))

    def call(
        self, call: FileCall[Any], payload: Buffer | Run, on_result: OnResult, *, gather: bool = False
    ) -> None:
        """Ask for a filesystem operation; ``on_result`` gets its result, or why there never will be one.

        Queued at once, whatever the backlog is, and it never waits: this is for callers that hold themselves to
        ``MAX_CALLS``. ``payload`` must not change; a run stays the caller's, to be given back when the result has
        come. Raises ``LinkError`` when the link is over. ``gather``: it may leave with what comes next, or once
        something was received, for who knows that something will be.
        """
        number = self._live().call(call.OP, codec.encode(call), payload)
        self._calling[number] = on_result
        if not gather:
            self._flush()

    @property
    def backlog(self) -> int:
        """Bytes that are being written, or wait to be; the data of streams does not count while it waits."""
        return self._running().backlog + self._outlet.backlog

    def answer(self, number: int, error: int, value: object = None, payload: Buffer | Run = b"") -> None:
        """The result of call ``number``: an errno, or 0 with the encoded ``value``. Nothing if the link is over.

        ``payload`` must not change; a run is given away in any case."""
        session = self._running()
        # The session may be over before the link knows: a call and the end can come in one read.
        if self._error is None and not session.over:
            session.result(number, error, value, payload)
            self._flush()
            return
        session.drop_call(number)
        if isinstance(payload, Run):
            payload.give_back()

    # --- what the peer says ------------------------------------------------------------------------

    def _dispatch(self, event: Event) -> None:
        if self._error is None:
            _HANDLERS[type(event)](self, event)
        elif isinstance(event, _WITH_LOAN) and event.loan is not None:
            event.loan.release()

    def _on_hello(self, event: Hello) -> None:
        self.peer = event
        self._greeted = True
        self._started(self)

    def _on_ended(self, event: Ended) -> None:
        self._end(event.error)

    def _on_answer(self, event: messages.Reply | messages.Failure | TimedOut) -> None:
        self._asking.pop(event.id).resolve(event)

    def _on_notify(self, event: messages.Notify) -> None:
        try:
            self._serving.on_notify(event)
        except RemoteProtocolError as error:
            for ended in self._running().abort(error):
                self._dispatch(ended)

    def _on_request(self, event: messages.Request) -> None:
        self._serving.on_request(event)

    def _on_cancel(self, event: messages.Cancel) -> None:
        self._serving.on_cancel(event)

    def _on_lapsed(self, event: Lapsed) -> None:
        self._serving.on_lapsed(event)

    def _on_call(self, event: messages.Call) -> None:
        if self._service.call is None:
            self.answer(event.id, errno.ENOSYS)
        else:
            self._service.call(event)

    def _on_result(self, event: messages.Result) -> None:
        self._calling.pop(event.id)(event)

    def _on_open(self, event: messages.Open) -> None:
        self._serving.on_open(event, self._streams)

    def _on_opened(self, event: messages.Opened) -> None:
        stream = MuxStream(self._driver, event.stream)
        self._streams[event.stream] = stream
        self._answer_open(event.stream, stream)

    def _on_refused(self, event: messages.Refused) -> None:
        self._answer_open(event.stream, OpenRefused(ErrorCode.parse(event.code), event.message, event.hint))

    def _answer_open(self, number: int, answer: MuxStream | OpenRefused) -> None:
        waiting = self._opening.pop(number)
        if isinstance(waiting, _Waiter):
            waiting.resolve(answer)
        else:
            waiting(answer)

    def _on_data(self, event: messages.Data) -> None:
        self._streams[event.stream].on_data(event.payload, event.loan)

    def _on_credit(self, event: messages.Credit) -> None:
        self._streams[event.stream].on_sendable()

    def _on_eof(self, event: messages.Eof) -> None:
        self._streams[event.stream].on_eof()

    def _on_reset(self, event: messages.Reset) -> None:
        error = StreamReset(ErrorCode.parse(event.code), event.message)
        self._serving.on_reset(event.stream, error)
        self._streams[event.stream].on_broken(error)


def _again(error: LinkError) -> LinkError:
    """A copy to raise: an exception raised in many tasks would collect all their tracebacks."""
    copy = type(error)(str(error), error.code)
    copy.__cause__ = error
    return copy


_WITH_LOAN: Final = (messages.Data, messages.Call, messages.Result)

_HANDLERS: Final[dict[type[Event], Callable[[Link, Any], None]]] = {
    messages.Hello: Link._on_hello,
    messages.Request: Link._on_request,
    messages.Reply: Link._on_answer,
    messages.Failure: Link._on_answer,
    messages.Cancel: Link._on_cancel,
    messages.Notify: Link._on_notify,
    messages.Call: Link._on_call,
    messages.Result: Link._on_result,
    messages.Open: Link._on_open,
    messages.Opened: Link._on_opened,
    messages.Refused: Link._on_refused,
    messages.Data: Link._on_data,
    messages.Credit: Link._on_credit,
    messages.Eof: Link._on_eof,
    messages.Reset: Link._on_reset,
    TimedOut: Link._on_answer,
    Lapsed: Link._on_lapsed,
    Ended: Link._on_ended,
}
