"""One end of a link, sans-IO: bytes in, events out; operations in, bytes out.

``receive_data`` returns what happened as events: mostly the peer's frames themselves, once they were
found to be legal. ``data_to_send`` returns what to write: control frames first, in order, then data,
one chunk of one stream after another. Nothing here reads a clock; every call that needs the time gets
it, in seconds. The law: whatever the peer sends, the outcome is a legal state or one ``Ended`` event
with an error that says whose fault it is; memory is bounded by the named limits, and after ``Ended``
nothing more happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from protocol import messages
from protocol.bulk import INLINE_BELOW, Bulk, Loan, Run
from protocol.errors import (
    ErrorCode,
    LinkClosed,
    LinkError,
    LocalProtocolError,
    OpenRefused,
    RemoteProtocolError,
)
from protocol.frames import MAX_PAYLOAD, PREFIX, Buffer, Frame, FrameDecoder
from protocol.messages import AnyFrame, StreamFrame, clip
from protocol.rpc import IdSpace, IncomingRequests, OutgoingRequests
from protocol.states import TableKey
from protocol.stream import MAX_CHUNK, MuxedStream, State
from protocol.window import INITIAL_WINDOW

# Seconds for the peer's hello; it costs one round trip, so this is for peers that will never say it.
HELLO_TIMEOUT: Final = 10.0
# Streams that one side may have open at a time: each forwarded connection is one. With INITIAL_WINDOW
# it bounds what a peer can make us buffer: 256 MiB a direction, if every reader here stalls.
MAX_STREAMS: Final = 2048
# Bytes of control frames waiting to be written, above which the driver lets no new ones in...
HIGH_WATER: Final = 256 * 1024
# ...and above which the peer is at fault: it makes us answer and does not read the answers.
MAX_BACKLOG: Final = 4 * 1024 * 1024

# Calls that one side may have pending. The guest's kernel asks one for each thread that waits for a file, and
# a few dozen for readahead; who needs more waits for an answer.
MAX_CALLS: Final = 1024

_NEVER = math.inf


class Role(Enum):
    """Which end this is; it decides the parity of the ids this end hands out."""

    HOST = "host"
    GUEST = "guest"
    SERVER = "server"
    CLIENT = "client"

    @property
    def first_id(self) -> int:
        return 2 if self in (Role.HOST, Role.SERVER) else 1

    @property
    def peer_first_id(self) -> int:
        return 3 - self.first_id


@dataclass(frozen=True, slots=True)
class TimedOut:
    """A request of this side got no answer in time; the peer has been told to stop."""

    id: int


@dataclass(frozen=True, slots=True)
class Lapsed:
    """A request of the peer has lasted longer than it asked for; it still needs an answer."""

    id: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The link is over. ``LinkClosed`` is an ordinary end."""

    error: LinkError


Event = AnyFrame | TimedOut | Lapsed | Ended


class Batch(NamedTuple):
    """What to write now, and the streams whose queued data is all part of it."""

    buffers: list[Buffer]
    drained: list[int]


class Phase(TableKey):
    GREETING = auto()  # our hello is queued, the peer's has not come
    OPEN = auto()
    OVER = auto()


# For what is done for each frame: on Python 3.11 the member of an enum is a call away.
_GREETING: Final = Phase.GREETING
_OPEN: Final = Phase.OPEN
_OVER: Final = Phase.OVER


class Session:
    """One end of a link. See the module's docstring; seconds and bytes throughout."""

    def __init__(
        self,
        role: Role,
        hello: messages.Hello,
        now: float,
        *,
        heartbeat: float = 5.0,
        dead_after: float = 20.0,
        max_payload: int = MAX_PAYLOAD,
        max_backlog: int = MAX_BACKLOG,
        window: int = INITIAL_WINDOW,
        bulk: Bulk | None = None,
    ) -> None:
        """``bulk``: memory for payloads, used if the peer has the same; not that of another session that lives."""
        if not 0 < heartbeat < dead_after:
            raise LocalProtocolError("a heartbeat must come before the peer is taken for dead")
        self.peer: messages.Hello | None = None
        self._phase = _GREETING
        self._hello = hello
        self._now = now
        self._heartbeat, self._grace = heartbeat, dead_after - heartbeat
        self._closed_down = False
        self._role = role
        self._window = window
        self._bulk = Bulk() if bulk is None else bulk
        self._max_payload, self._max_backlog = max_payload, max_backlog
        self._decoder = FrameDecoder(max_payload=max_payload)
        self._control: list[Buffer] = []
        self.backlog = 0
        """Bytes of control frames waiting to be written."""
        self._asked = OutgoingRequests(role.first_id)
        self._serving = IncomingRequests(role.peer_first_id)
        self._own_ids, self._peer_ids = IdSpace(role.first_id), IdSpace(role.peer_first_id)
        self._own_calls, self._peer_calls = IdSpace(role.first_id), IdSpace(role.peer_first_id)
        self._called: dict[int, Run | None] = {}
        self._called_by_peer: dict[int, Loan | None] = {}
        self._by_header: dict[bytes, MuxedStream] = {}  # all streams
        self._own_streams: dict[int, MuxedStream] = {}
        self._peer_streams: dict[int, MuxedStream] = {}
        self._ready: dict[int, None] = {}  # an ordered set: whose turn it is
        self.is_sooner = True
        """Whether ``next_timeout`` may be earlier than it was; for its caller to reset."""
        self.closed: list[int] = []
        """Streams that have ended, for ``take_closed``."""
        self._token = 0
        self._hello_due = now + HELLO_TIMEOUT
        self._ping_due = self._pong_due = _NEVER
        self._send(hello)

    # --- output ------------------------------------------------------------------------------------

    @property
    def has_output(self) -> bool:
        return bool(self._control or self._ready or (self._bulk.urgent and not self.over))

    @property
    def is_idle(self) -> bool:
        """Whether a frame that is written now would overtake nothing."""
        return not (self._control or self._ready or self._bulk.urgent or self._phase is _OVER)

    @property
    def over(self) -> bool:
        return self._phase is _OVER

    def data_to_send(self) -> Batch:
        """Everything of control, then data up to about ``MAX_CHUNK``; no buffers when there is nothing.

        Little data at a time keeps control frames prompt, some each time keeps data from starving.
        """
        if self._phase is not _OVER and (frees := self._bulk.take_frees()):
            self._send(messages.Free(frees))
        buffers, self._control, self.backlog = self._control, [], 0
        drained: list[int] = []
        room = MAX_CHUNK
        while self._ready and room > 0:
            number = next(iter(self._ready))
            stream = self._stream(number)
            chunk = stream.next_chunk()
            room -= len(chunk)
            buffers += messages.encode_data(number, chunk)
            if stream.drained:
                drained.append(number)
            self._after(stream, again=True)
        return Batch(buffers, drained)

    def _send(self, frame: AnyFrame) -> None:
        self._queue(messages.encode(frame))

    def _queue(self, buffers: list[Buffer]) -> None:
        self._control += buffers
        for buffer in buffers:
            self.backlog += len(buffer)

    # --- input -------------------------------------------------------------------------------------

    def receive_data(self, data: Buffer, now: float) -> list[Event]:
        """Take bytes from the transport; how they are split makes no difference."""
        self._now = now
        events: list[Event] = []
        if self.over:
            return events
        decoder, receive = self._decoder, self._receive_frame
        decoder.receive_data(data)
        try:
            while not self.over and (frame := decoder.next_frame()) is not None:
                if (event := receive(frame)) is not None:
                    events.append(event)
        except RemoteProtocolError as error:
            events.append(self._fail(error))
        return events

    def receive_eof(self) -> list[Event]:
        """The transport will bring no more bytes."""
        if self.over:
            return []
        if self._decoder.buffered:
            return [self.lose(RemoteProtocolError("the peer's bytes ended in the middle of a frame"))]
        return [self.lose(LinkClosed("the peer closed the link"))]

    def abort(self, error: RemoteProtocolError) -> list[Event]:
        """The driver found what the peer said to be wrong. Ends the link and tells the peer why."""
        return [] if self.over else [self._fail(error)]

    def receive_express(self, data: bytes) -> tuple[int, bytes] | None:
        """Stream and bytes, if ``data`` is exactly one frame with the data of a stream; else nothing was taken."""
        if not self._by_header or len(data) <= PREFIX.size or self._decoder.buffered:
            return None
        header_len, payload_len = PREFIX.unpack_from(data)
        start = PREFIX.size + header_len
        stream = self._by_header.get(data[PREFIX.size : start])
        if stream is None or len(data) != start + payload_len or payload_len > MAX_CHUNK:
            return None
        # What must not be is said again, and heard, by ``receive_data``.
        return (stream.number, data[start:]) if stream.receive_express(payload_len) else None

    def _receive_frame(self, raw: Frame) -> Event | None:
        if self._phase is _GREETING:
            messages.check_major(raw, self._hello.major)
        frame = messages.decode(raw)
        transition = TRANSITIONS.get((self._phase, type(frame)))
        if transition is None:
            raise RemoteProtocolError(f"{type(frame).__name__} in phase {self._phase.name}")
        function, self._phase = transition
        event = function(self, frame)
        if self.backlog > self._max_backlog:
            raise RemoteProtocolError("the peer does not read what it makes us send", ErrorCode.LIMIT)
        return event

    # --- the end -----------------------------------------------------------------------------------

    def goodbye(self, reason: str = "") -> None:
        """End the link in good order: what is queued as control is still to be sent, then nothing."""
        if not self.over:
            self._send(messages.Goodbye(ErrorCode.GONE.value, clip(reason)))
            self._close()

    def lose(self, error: LinkError) -> Ended:
        """The transport is gone, with ``error``: there is nothing more to send."""
        self._control, self.backlog = [], 0
        self._close()
        return Ended(error)

    def _fail(self, error: LinkError) -> Ended:
        self.lose(error)
        self._send(messages.Goodbye(error.code.value, clip(str(error))))
        return Ended(error)

    def _close(self) -> None:
        self._phase = _OVER
        if self._closed_down:
            return
        self._closed_down = True
        self._bulk.end()
        for stream in (*self._own_streams.values(), *self._peer_streams.values()):
            stream.end()
        self._own_streams.clear()
        self._peer_streams.clear()
        self._by_header.clear()
        self._ready.clear()
        self._hello_due = self._ping_due = self._pong_due = _NEVER

    def _require_open(self) -> None:
        if self._phase is _OPEN:
            return
        if self._phase is _OVER:
            raise LinkClosed("the link is over")
        raise LocalProtocolError("nothing may be sent before the peer's hello")

    # --- time --------------------------------------------------------------------------------------

    def next_timeout(self) -> float:
        """When to call ``handle_timeout``; infinity for never."""
        if self.over:
            return _NEVER
        due = min(self._hello_due, self._ping_due, self._pong_due)
        return min(due, self._asked.next_deadline(), self._serving.next_deadline())

    def handle_timeout(self, now: float) -> list[Event]:
        """Do what is due at ``now``; harmless at any time."""
        if self.over:
            return []
        if now >= self._hello_due:
            return [self._fail(LinkError(f"no hello within {HELLO_TIMEOUT:g} s", ErrorCode.TIMEOUT))]
        if now >= self._pong_due:
            silence = f"no sign of the peer for {self._heartbeat + self._grace:g} s"
            return [self._fail(LinkError(silence, ErrorCode.TIMEOUT))]
        if now >= self._ping_due:
            self._token += 1
            self._ping_due, self._pong_due = _NEVER, now + self._grace
            self._send(messages.Ping(self._token))
        late = self._asked.expire(now)
        for request in late:
            self._send(messages.Cancel(request))
        return [*map(TimedOut, late), *map(Lapsed, self._serving.expire(now))]

    # --- requests and notices ----------------------------------------------------------------------

    def request(self, method: str, args: list[Any], timeout: float | None, now: float) -> int:
        """Ask; returns the id that the answer will carry. ``RpcError`` (``LIMIT``) if too many wait."""
        self._require_open()
        number = self._asked.begin(timeout, now)
        self.is_sooner = True
        try:
            self._send(messages.Request(number, method, args, timeout))
        except LocalProtocolError:
            self._asked.abandon(number)
            self._asked.settle(number)
            raise
        return number

    def cancel(self, number: int) -> None:
        """Give up a request of this side; nothing happens if its answer has come."""
        if not self.over and self._asked.abandon(number):
            self._send(messages.Cancel(number))

    def reply(self, number: int, value: object) -> None:
        """Answer a request of the peer's."""
        self._answer(messages.Reply(number, value))

    def fail(self, number: int, code: ErrorCode, message: str, hint: str = "") -> None:
        """Answer a request of the peer's with a failure."""
        self._answer(messages.Failure(number, code.value, clip(message), clip(hint)))

    def _answer(self, frame: messages.Reply | messages.Failure) -> None:
        self._require_open()
        self._serving.check(frame.id)
        self._send(frame)
        self._serving.answer(frame.id)

    def notify(self, topic: str, args: list[Any]) -> None:
        self._require_open()
        self._send(messages.Notify(topic, args))

    # --- calls -------------------------------------------------------------------------------------

    @property
    def calls_pending(self) -> int:
        """Calls of this side that wait for their result; ``MAX_CALLS`` is the most."""
        return len(self._called)

    def call(self, op: int, args: list[Any], payload: Buffer | Run = b"") -> int:
        """Ask for a filesystem operation; returns the id of its result. ``payload`` must not change.

        A run stays the caller's, who may send it again in another session, and gives it back at the end.
        """
        self._require_open()
        if len(self._called) >= MAX_CALLS:
            raise LocalProtocolError(f"{MAX_CALLS} calls are already waiting for a result")
        number = self._own_calls.last + 2
        run = None
        if isinstance(payload, Run):
            run, payload = self._reference(payload)
        reference = None if run is None else [run.first, run.length]
        self._queue(messages.encode_call(number, op, args, payload, reference, max_payload=self._max_payload))
        if run is not None:
            self._bulk.show(run)
        self._called[self._own_calls.take()] = run
        return number

    def _reference(self, run: Run) -> tuple[Run | None, bytes]:
        """The run, if it can be referred to; else its content."""
        if self._bulk.active and run.length >= INLINE_BELOW:
            return run, b""
        return None, bytes(run.content)

    def result(self, number: int, errno: int, value: object, payload: Buffer | Run = b"") -> None:
        """Answer a call of the peer's. ``payload`` must not change; a run is given away."""
        self._require_open()
        if number not in self._called_by_peer:
            raise LocalProtocolError(f"call {number} is not waiting for a result")
        if isinstance(payload, Run):
            self._result_by_run(number, errno, value, payload)
        else:
            self._queue_result(number, errno, value, payload)
        self.drop_call(number)

    def _result_by_run(self, number: int, errno: int, value: object, payload: Run) -> None:
        try:
            run, content = self._reference(payload)
            self._queue_result(number, errno, value, content, run)
            if run is not None:
                self._bulk.lend(run)
        finally:
            if payload.slots:
                payload.give_back()

    def _queue_result(
        self, number: int, errno: int, value: object, payload: Buffer, run: Run | None = None
    ) -> None:
        reference = None if run is None else [run.first, run.length]
        self._queue(
            messages.encode_result(number, errno, value, payload, reference, max_payload=self._max_payload)
        )

    def drop_call(self, number: int) -> None:
        """A call of the peer's is done with: nothing of it is read any more."""
        if (loan := self._called_by_peer.pop(number, None)) is not None:
            loan.release()

    # --- streams -----------------------------------------------------------------------------------

    def open(self, kind: str, args: list[Any]) -> int:
        """Ask for a stream; returns its number. ``OpenRefused`` (``LIMIT``) if too many are open."""
        self._require_open()
        if len(self._own_streams) >= MAX_STREAMS:
            raise OpenRefused(ErrorCode.LIMIT, f"{MAX_STREAMS} streams are already open")
        stream = MuxedStream(self._own_ids.take(), self._window, self._send)
        stream.open(kind, args)
        self._own_streams[stream.number] = self._by_header[stream.header] = stream
        return stream.number

    def accept(self, number: int) -> None:
        self._operate(number, MuxedStream.accept)

    def refuse(self, number: int, code: ErrorCode, message: str, hint: str = "") -> None:
        self._operate(number, lambda stream: stream.refuse(code, clip(message), clip(hint)))

    def send_data(self, number: int, data: Buffer) -> None:
        """Queue ``data`` (not copied: it must not change) for when there is credit."""
        self._operate(number, lambda stream: stream.send_data(data))

    def express(self, number: int, data: bytes) -> bytes | None:
        """The frame with ``data`` of stream ``number``, to be written at once; None if something goes before it."""
        if not self.is_idle or (stream := self._find(number)) is None:
            return None
        return stream.express(data)

    @property
    def has_memory(self) -> bool:
        """Whether the two sides have memory for payloads."""
        return self._bulk.active

    @property
    def memory_is_stuck(self) -> bool:
        """Whether it is not worth waiting for memory: the peer's readers have all of it, or there is none."""
        return self._bulk.stuck or not self._bulk.active

    def take_run(self, number: int, size: int) -> Run | None:
        """Room for up to ``size`` bytes of stream ``number``'s data in the plane's memory, if there is some for it."""
        stream = self._find(number)
        return None if stream is None else self._bulk.take(size, stream.account, least=1)

    def lends(self, number: int) -> bool:
        """Whether the peer still reads runs of stream ``number``."""
        stream = self._find(number)
        return stream is not None and stream.account.lent > 0

    def send_run(self, number: int, run: Run) -> None:
        """Send ``run``, which is given away. Only when nothing else is queued for the stream."""
        self._require_open()
        stream = self._stream(number)
        if not stream.drained:
            raise LocalProtocolError(f"data on stream {number} out of its order")
        stream.send_run([run.first, run.length])
        self._bulk.lend(run, stream.account)

    def drop_unsent(self, number: int) -> None:
        """Forget what ``send_data`` queued and ``data_to_send`` has not yet returned."""
        if (stream := self._find(number)) is not None:
            stream.drop_unsent()
            self._after(stream)

    def send_eof(self, number: int) -> None:
        """End this side's direction, after the data that is queued."""
        self._operate(number, MuxedStream.send_eof)

    def reset(self, number: int, code: ErrorCode, message: str = "") -> None:
        """Cut both directions."""
        self._operate(number, lambda stream: stream.reset(code, clip(message)))

    def consume(self, number: int, count: int) -> bool:
        """The application took ``count`` bytes; harmless when the stream is over meanwhile. True if the peer is to
        be told, which is queued."""
        return (stream := self._find(number)) is not None and stream.consume(count)

    def take_closed(self) -> list[int]:
        """The streams that have ended since the last call: no event will name them any more."""
        closed, self.closed = self.closed, []
        return closed

    def stream(self, number: int) -> MuxedStream:
        """What is known of a stream that is, or was."""
        return self._find(number) or MuxedStream.over(number)

    def knows(self, number: int) -> bool:
        """Whether a stream has frames yet to come, in either direction."""
        return self._find(number) is not None

    def _operate(self, number: int, operation: Callable[[MuxedStream], None]) -> None:
        self._require_open()
        stream = self._stream(number)
        operation(stream)
        self._after(stream)

    def _find(self, number: int) -> MuxedStream | None:
        return self._own_streams.get(number) or self._peer_streams.get(number)

    def _stream(self, number: int) -> MuxedStream:
        if (stream := self._find(number)) is None:
            raise LocalProtocolError(f"there is no stream {number}")
        return stream

    def _after(self, stream: MuxedStream, *, again: bool = False) -> None:
        """Bring the tables up to date; ``again``: the stream had its turn."""
        if again or not stream.ready:
            self._ready.pop(stream.number, None)
        if stream.ready:
            self._ready[stream.number] = None
        if stream.state is State.CLOSED:
            self._own_streams.pop(stream.number, None)
            self._peer_streams.pop(stream.number, None)
            self._by_header.pop(stream.header, None)
            self.closed.append(stream.number)

    # --- what the peer's frames do -----------------------------------------------------------------

    def _on_hello(self, frame: messages.Hello) -> Event:
        self.peer = frame
        self._hello_due, self._ping_due = _NEVER, self._now + self._heartbeat
        self.is_sooner = True
        offer = frame.bulk
        if offer is not None and self._role is Role.HOST and self._bulk.accept(offer.extents, offer.mark):
            self._send(messages.BulkBegin(self._bulk.busy()))
            self._bulk.begin(offer.busy)
        return frame

    def _on_bulk_begin(self, frame: messages.BulkBegin) -> None:
        if self._hello.bulk is None or self._bulk.active:
            raise RemoteProtocolError("the peer begins with memory that it was not offered")
        self._bulk.begin(frame.busy)

    def _on_free(self, frame: messages.Free) -> None:
        self._bulk.freed(frame.slots)

    def _on_goodbye(self, frame: messages.Goodbye) -> Event:
        code = ErrorCode.parse(frame.code)
        reason = clip(frame.reason) or "the peer closed the link"
        return self.lose(LinkClosed(reason) if code is ErrorCode.GONE else LinkError(reason, code))

    def _on_ping(self, frame: messages.Ping) -> None:
        self._send(messages.Pong(frame.token))

    def _on_pong(self, frame: messages.Pong) -> None:
        if self._pong_due == _NEVER or frame.token != self._token:
            raise RemoteProtocolError("a pong without its ping")
        self._ping_due, self._pong_due = self._now + self._heartbeat, _NEVER
        self.is_sooner = True

    def _on_request(self, frame: messages.Request) -> Event | None:
        self.is_sooner = True
        if self._serving.begin(frame.id, frame.timeout, self._now):
            return frame
        self._send(messages.Failure(frame.id, ErrorCode.LIMIT.value, "too many requests at a time"))
        return None

    def _on_answer(self, frame: messages.Reply | messages.Failure) -> Event | None:
        return frame if self._asked.settle(frame.id) else None

    def _on_cancel(self, frame: messages.Cancel) -> Event | None:
        return frame if self._serving.cancel(frame.id) else None

    def _on_notify(self, frame: messages.Notify) -> Event:
        return frame

    def _on_call(self, frame: messages.Call) -> Event:
        self._peer_calls.claim(frame.id)
        if len(self._called_by_peer) >= MAX_CALLS:
            raise RemoteProtocolError(f"more than {MAX_CALLS} calls at a time", ErrorCode.LIMIT)
        if frame.run is not None:
            loan = self._bulk.receive(frame.run, answered=True)
            frame = messages.Call(frame.id, frame.op, frame.args, loan.view, frame.run, loan)
        self._called_by_peer[frame.id] = frame.loan
        return frame

    def _on_result(self, frame: messages.Result) -> Event:
        if frame.id not in self._called:
            raise RemoteProtocolError(f"a result of call {frame.id}, which is not pending")
        if (run := self._called.pop(frame.id)) is not None:
            self._bulk.shown(run)
        if frame.run is not None:
            loan = self._bulk.receive(frame.run)
            frame = messages.Result(frame.id, frame.errno, frame.value, loan.view, frame.run, loan)
        return frame

    def _on_open(self, frame: messages.Open) -> Event:
        self._peer_ids.claim(frame.stream)
        if len(self._peer_streams) >= MAX_STREAMS:
            raise RemoteProtocolError(f"more than {MAX_STREAMS} streams at a time", ErrorCode.LIMIT)
        stream = MuxedStream(frame.stream, self._window, self._send)
        stream.receive(frame)
        self._peer_streams[frame.stream] = self._by_header[stream.header] = stream
        return frame

    def _on_stream_frame(self, frame: StreamFrame) -> Event | None:
        stream = self._find(frame.stream)
        if stream is None:
            self._check_late(frame)
            return None
        if isinstance(frame, messages.Data) and frame.run is not None:
            return self._on_run(stream, frame.run)
        tell = stream.receive(frame)
        self._after(stream)
        return frame if tell else None

    def _on_run(self, stream: MuxedStream, reference: list[int]) -> Event | None:
        loan = self._bulk.receive(reference)
        frame = messages.Data(stream.number, loan.view, reference, loan)
        tell = False
        try:
            tell = stream.receive(frame)
        finally:
            if not tell:
                loan.release()
        return frame if tell else None

    def _check_late(self, frame: StreamFrame) -> None:
        """A stream's last credits and a reset may cross its end on the way; nothing else may."""
        if not self._own_ids.used(frame.stream) and not self._peer_ids.used(frame.stream):
            raise RemoteProtocolError(f"{type(frame).__name__} for stream {frame.stream}, which never was")
        if not isinstance(frame, messages.Credit | messages.Reset):
            raise RemoteProtocolError(f"{type(frame).__name__} for stream {frame.stream}, which is over")


_Action = Callable[[Session, Any], Event | None]

TRANSITIONS: Final[dict[tuple[Phase, type[AnyFrame]], tuple[_Action, Phase]]] = {
    (Phase.GREETING, messages.Hello): (Session._on_hello, Phase.OPEN),
    (Phase.GREETING, messages.Goodbye): (Session._on_goodbye, Phase.OVER),
    (Phase.OPEN, messages.Ping): (Session._on_ping, Phase.OPEN),
    (Phase.OPEN, messages.Pong): (Session._on_pong, Phase.OPEN),
    (Phase.OPEN, messages.Request): (Session._on_request, Phase.OPEN),
    (Phase.OPEN, messages.Reply): (Session._on_answer, Phase.OPEN),
    (Phase.OPEN, messages.Failure): (Session._on_answer, Phase.OPEN),
    (Phase.OPEN, messages.Cancel): (Session._on_cancel, Phase.OPEN),
    (Phase.OPEN, messages.Notify): (Session._on_notify, Phase.OPEN),
    (Phase.OPEN, messages.Call): (Session._on_call, Phase.OPEN),
    (Phase.OPEN, messages.Result): (Session._on_result, Phase.OPEN),
    (Phase.OPEN, messages.Open): (Session._on_open, Phase.OPEN),
    (Phase.OPEN, messages.Opened): (Session._on_stream_frame, Phase.OPEN),
    (Phase.OPEN, messages.Refused): (Session._on_stream_frame, Phase.OPEN),
    (Phase.OPEN, messages.Data): (Session._on_stream_frame, Phase.OPEN),
    (Phase.OPEN, messages.Credit): (Session._on_stream_frame, Phase.OPEN),
    (Phase.OPEN, messages.Eof): (Session._on_stream_frame, Phase.OPEN),
    (Phase.OPEN, messages.Reset): (Session._on_stream_frame, Phase.OPEN),
    (Phase.OPEN, messages.BulkBegin): (Session._on_bulk_begin, Phase.OPEN),
    (Phase.OPEN, messages.Free): (Session._on_free, Phase.OPEN),
    (Phase.OPEN, messages.Goodbye): (Session._on_goodbye, Phase.OVER),
}
