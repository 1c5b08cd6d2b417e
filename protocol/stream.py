"""One multiplexed stream: its states, its windows and what it has yet to send.

The states are data: ``TRANSITIONS[(state, input)]`` is what happens and where it leads; whatever is not
in the table is an error, ours if we asked for it, else the peer's. The law: each side ends its
direction exactly once, by ``EOF`` or ``RESET``, and a ``RESET`` is answered by one unless its receiver
had ended already. Who asks for a stream may send up to ``EARLY`` bytes before the answer, so that a question and
its answer take one round trip and not two; a refusal is therefore answered by a ``RESET``, too. So both sides
know when the last frame of a stream has been seen, late data for a
stream that was cut is dropped but still counted against the window, and data for a stream that is
over is an error and not a shrug.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import auto
from typing import Any, Final

from protocol.bulk import Account
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.frames import PREFIX, Buffer
from protocol.messages import AnyFrame, Credit, Data, Eof, Open, Opened, Refused, Reset, data_header
from protocol.states import TableKey
from protocol.window import ReceiveWindow, SendWindow

# The most data of one stream in one frame; then it is the next stream's turn.
MAX_CHUNK: Final = 64 * 1024
# Bytes that may follow the question for a stream, before the answer; the window that this grants counts them, and is
# never smaller. A request of HTTP or of a database fits.
EARLY: Final = 16 * 1024


class State(TableKey):
    """Where a stream is, seen from this side. Ended means: an ``EOF`` was sent."""

    IDLE = auto()
    OPENING = auto()  # we asked
    OFFERED = auto()  # the peer asked
    OPEN = auto()
    LOCAL_ENDED = auto()
    REMOTE_ENDED = auto()
    REFUSED = auto()  # by us; until the peer's answer there may be data that it sent before it knew
    RESETTING = auto()  # we cut it; the peer's answer is on its way
    ENDED_RESETTING = auto()  # the same, but an EOF went before: the peer may be done without answering
    CLOSED = auto()


class Input(TableKey):
    SEND_OPEN = auto()
    SEND_OPENED = auto()
    SEND_REFUSED = auto()
    SEND_DATA = auto()
    SEND_EOF = auto()
    SEND_RESET = auto()
    RECV_OPEN = auto()
    RECV_OPENED = auto()
    RECV_REFUSED = auto()
    RECV_DATA = auto()
    RECV_CREDIT = auto()
    RECV_EOF = auto()
    RECV_RESET = auto()


_RECEIVED: Final[dict[type[AnyFrame], Input]] = {
    Open: Input.RECV_OPEN,
    Opened: Input.RECV_OPENED,
    Refused: Input.RECV_REFUSED,
    Data: Input.RECV_DATA,
    Credit: Input.RECV_CREDIT,
    Eof: Input.RECV_EOF,
    Reset: Input.RECV_RESET,
}


class MuxedStream:
    """The sans-IO half of a stream. ``send`` queues a control frame for the peer."""

    def __init__(self, number: int, window: int, send: Callable[[AnyFrame], None]) -> None:
        self.number = number
        self.state = State.IDLE
        self._send = send
        self._receive_window = ReceiveWindow(window)
        self._send_window = SendWindow()
        self._outgoing: deque[memoryview] = deque()
        self._eof_waits = False
        self.account = Account()
        self.header = data_header(number)
        """Of a frame with this stream's data: what is sent and received by the thousand is not encoded each time."""

    @classmethod
    def over(cls, number: int) -> MuxedStream:
        """One that has ended."""
        stream = cls(number, 1, lambda frame: None)
        stream.state = State.CLOSED
        return stream

    # --- this side ---------------------------------------------------------------------------------

    def open(self, kind: str, args: object) -> None:
        """Ask the peer for it."""
        self._step(Input.SEND_OPEN, Open(self.number, kind, args, self._receive_window.size))
        self._send_window.grant(self._early)

    def accept(self) -> None:
        self._step(Input.SEND_OPENED, Opened(self.number, self._receive_window.size))

    def refuse(self, code: ErrorCode, message: str, hint: str) -> None:
        self._step(Input.SEND_REFUSED, Refused(self.number, code.value, message, hint))

    def send_data(self, data: Buffer) -> None:
        """Queue ``data``, which must not change until it is sent: nothing is copied here."""
        if self._eof_waits:
            raise LocalProtocolError(f"data on stream {self.number} after its end")
        self._step(Input.SEND_DATA, None)
        if data:
            self._outgoing.append(memoryview(data))

    def express(self, data: bytes) -> bytes | None:
        """The frame with ``data``, if it may be sent now; it has been, then."""
        if (
            not data
            or self._outgoing
            or self.state not in _SENDING
            or self._send_window.available < len(data)
        ):
            return None
        self._send_window.spend(len(data))
        return PREFIX.pack(len(self.header), len(data)) + self.header + data

    def receive_express(self, count: int) -> bool:
        """Take ``count`` bytes of a ``Data`` frame; False if it is not as simple as that, or must not be."""
        return self.state in _RECEIVING and count > 0 and self._receive_window.receive_at_once(count)

    def send_run(self, reference: list[int]) -> None:
        """Send data by reference (``bulk``), at once: it needs no credit. Only when nothing is queued."""
        if self._eof_waits or self._outgoing:
            raise LocalProtocolError(f"data on stream {self.number} out of its order")
        self._step(Input.SEND_DATA, None)
        self._send(Data(self.number, b"", reference))

    def end(self) -> None:
        """The session is over: nothing is sent any more, and who asks is told so."""
        self._drop_direction()
        self.state = State.CLOSED

    def drop_unsent(self) -> None:
        """Forget the data that was queued and not sent; an end that waited for it goes now."""
        self._outgoing.clear()
        self._send_waiting_eof()

    def send_eof(self) -> None:
        """End this side's direction, after the data that is queued."""
        if self._eof_waits:
            raise LocalProtocolError(f"stream {self.number} ended twice")
        if self._outgoing and (self.state, Input.SEND_EOF) in TRANSITIONS:
            self._eof_waits = True
        else:
            self._step(Input.SEND_EOF, Eof(self.number))

    def reset(self, code: ErrorCode, message: str) -> None:
        self._step(Input.SEND_RESET, Reset(self.number, code.value, message))

    def consume(self, count: int) -> bool:
        """The application took ``count`` received bytes. True if the peer is to be told, which is queued."""
        credit = self._receive_window.consume(count)
        if not credit or self.state not in _RECEIVING:
            return False
        self._send(Credit(self.number, credit))
        return True

    # --- what the scheduler asks -------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether there is data to send and credit to send it."""
        return bool(self._outgoing) and self._send_window.available > 0

    @property
    def drained(self) -> bool:
        """Whether all data that was queued has been sent (or dropped)."""
        return not self._outgoing

    @property
    def writable(self) -> bool:
        """Whether data queued now could be sent at once."""
        return not self._outgoing and self._send_window.available > 0 and self.state in _SENDING

    def next_chunk(self) -> memoryview:
        """The next bytes to send, at most ``MAX_CHUNK`` and the credit. Only when ``ready``.

        When they are the last before an end that waits, the caller sends them before it looks at the
        control queue again: the ``EOF`` is queued here.
        """
        head = self._outgoing.popleft()
        room = min(MAX_CHUNK, self._send_window.available)
        chunk, rest = head[:room], head[room:]
        if rest:
            self._outgoing.appendleft(rest)
        self._send_window.spend(len(chunk))
        self._send_waiting_eof()
        return chunk

    def _send_waiting_eof(self) -> None:
        if self._eof_waits and not self._outgoing:
            self._eof_waits = False
            self._step(Input.SEND_EOF, Eof(self.number))

    # --- the peer ----------------------------------------------------------------------------------

    def receive(self, frame: AnyFrame) -> bool:
        """Take a frame of the peer's; True if the application should learn of it.

        Raises ``RemoteProtocolError`` if it may not come now.
        """
        return self._step(_RECEIVED[type(frame)], frame)

    # --- transitions -------------------------------------------------------------------------------

    def _step(self, event: Input, frame: Any) -> bool:
        transition = TRANSITIONS.get((self.state, event))
        if transition is None:
            what = f"stream {self.number}: {event.name} in state {self.state.name}"
            if event in _RECEIVED.values():
                raise RemoteProtocolError(what)
            raise LocalProtocolError(what)
        function, target = transition
        tell = function(self, frame)
        self.state = target
        return tell

    def _emit(self, frame: AnyFrame) -> bool:
        self._send(frame)
        return False

    def _allow(self, frame: None) -> bool:
        return False

    def _cut(self, frame: Reset) -> bool:
        self._drop_direction()
        self._send(frame)
        return False

    def _tell(self, frame: AnyFrame) -> bool:
        return True

    def _take_refusal(self, frame: Refused) -> bool:
        self._drop_direction()
        self._send(Reset(self.number, ErrorCode.RESET.value, ""))
        return True

    def _ignore(self, frame: AnyFrame) -> bool:
        return False

    @property
    def _early(self) -> int:
        return min(EARLY, self._receive_window.size)  # both sides have the same

    def _take_grant(self, frame: Open) -> bool:
        self._send_window.grant(frame.window)
        return True

    def _take_answer(self, frame: Opened) -> bool:
        if frame.window != self._early:
            self._send_window.grant(frame.window - self._early)
        return True

    def _take_credit(self, frame: Credit) -> bool:
        self._send_window.grant(frame.count)
        return True

    def _take_data(self, frame: Data) -> bool:
        if not frame.payload:
            raise RemoteProtocolError(f"stream {self.number}: a data frame without data")
        if frame.run is None:
            self._receive_window.receive(len(frame.payload))
        return True

    def _drop_data(self, frame: Data) -> bool:
        self._take_data(frame)
        return False

    def _answer_reset(self, frame: Reset) -> bool:
        self._drop_direction()
        self._send(Reset(self.number, ErrorCode.RESET.value, ""))
        return True

    def _drop_direction(self) -> None:
        self._outgoing.clear()
        self._eof_waits = False


_SENDING: Final = (State.OPEN, State.REMOTE_ENDED, State.OPENING)
_RECEIVING: Final = (State.OPEN, State.LOCAL_ENDED)

_Action = Callable[[MuxedStream, Any], bool]
_M = MuxedStream

TRANSITIONS: Final[dict[tuple[State, Input], tuple[_Action, State]]] = {
    (State.IDLE, Input.SEND_OPEN): (_M._emit, State.OPENING),
    (State.IDLE, Input.RECV_OPEN): (_M._take_grant, State.OFFERED),
    #
    (State.OPENING, Input.SEND_DATA): (_M._allow, State.OPENING),
    (State.OPENING, Input.RECV_OPENED): (_M._take_answer, State.OPEN),
    (State.OPENING, Input.RECV_REFUSED): (_M._take_refusal, State.CLOSED),
    (State.OPENING, Input.SEND_RESET): (_M._cut, State.RESETTING),
    #
    (State.OFFERED, Input.SEND_OPENED): (_M._emit, State.OPEN),
    (State.OFFERED, Input.SEND_REFUSED): (_M._emit, State.REFUSED),
    (State.OFFERED, Input.RECV_DATA): (_M._take_data, State.OFFERED),
    (State.OFFERED, Input.RECV_RESET): (_M._answer_reset, State.CLOSED),
    #
    (State.REFUSED, Input.RECV_DATA): (_M._drop_data, State.REFUSED),
    (State.REFUSED, Input.RECV_RESET): (_M._ignore, State.CLOSED),
    #
    (State.OPEN, Input.SEND_DATA): (_M._allow, State.OPEN),
    (State.OPEN, Input.SEND_EOF): (_M._emit, State.LOCAL_ENDED),
    (State.OPEN, Input.SEND_RESET): (_M._cut, State.RESETTING),
    (State.OPEN, Input.RECV_DATA): (_M._take_data, State.OPEN),
    (State.OPEN, Input.RECV_CREDIT): (_M._take_credit, State.OPEN),
    (State.OPEN, Input.RECV_EOF): (_M._tell, State.REMOTE_ENDED),
    (State.OPEN, Input.RECV_RESET): (_M._answer_reset, State.CLOSED),
    #
    (State.LOCAL_ENDED, Input.SEND_RESET): (_M._cut, State.ENDED_RESETTING),
    (State.LOCAL_ENDED, Input.RECV_DATA): (_M._take_data, State.LOCAL_ENDED),
    (State.LOCAL_ENDED, Input.RECV_CREDIT): (_M._ignore, State.LOCAL_ENDED),
    (State.LOCAL_ENDED, Input.RECV_EOF): (_M._tell, State.CLOSED),
    (State.LOCAL_ENDED, Input.RECV_RESET): (_M._answer_reset, State.CLOSED),
    #
    (State.REMOTE_ENDED, Input.SEND_DATA): (_M._allow, State.REMOTE_ENDED),
    (State.REMOTE_ENDED, Input.SEND_EOF): (_M._emit, State.CLOSED),
    (State.REMOTE_ENDED, Input.SEND_RESET): (_M._cut, State.RESETTING),
    (State.REMOTE_ENDED, Input.RECV_CREDIT): (_M._take_credit, State.REMOTE_ENDED),
    (State.REMOTE_ENDED, Input.RECV_RESET): (_M._answer_reset, State.CLOSED),
    #
    (State.RESETTING, Input.RECV_OPENED): (_M._ignore, State.RESETTING),
    (State.RESETTING, Input.RECV_REFUSED): (_M._ignore, State.CLOSED),
    (State.RESETTING, Input.RECV_DATA): (_M._drop_data, State.RESETTING),
    (State.RESETTING, Input.RECV_CREDIT): (_M._ignore, State.RESETTING),
    (State.RESETTING, Input.RECV_EOF): (_M._ignore, State.RESETTING),
    (State.RESETTING, Input.RECV_RESET): (_M._ignore, State.CLOSED),
    #
    (State.ENDED_RESETTING, Input.RECV_DATA): (_M._drop_data, State.ENDED_RESETTING),
    (State.ENDED_RESETTING, Input.RECV_CREDIT): (_M._ignore, State.ENDED_RESETTING),
    (State.ENDED_RESETTING, Input.RECV_EOF): (_M._ignore, State.CLOSED),
    (State.ENDED_RESETTING, Input.RECV_RESET): (_M._ignore, State.CLOSED),
}
