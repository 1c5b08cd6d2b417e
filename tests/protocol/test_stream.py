from __future__ import annotations

import itertools

import pytest

from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.messages import AnyFrame, Credit, Data, Eof, Open, Opened, Refused, Reset
from protocol.stream import EARLY, MAX_CHUNK, TRANSITIONS, Input, MuxedStream, State

WINDOW = 100


class Side:
    """A stream with what it has said so far."""

    def __init__(self) -> None:
        self.said: list[AnyFrame] = []
        self.stream = MuxedStream(1, WINDOW, self.said.append)

    def do(self, event: Input) -> bool:
        """Apply an input, by the call or the frame that stands for it."""
        stream = self.stream
        match event:
            case Input.SEND_OPEN:
                stream.open("tcp", [])
            case Input.SEND_OPENED:
                stream.accept()
            case Input.SEND_REFUSED:
                stream.refuse(ErrorCode.REFUSED, "", "")
            case Input.SEND_DATA:
                stream.send_data(b"x")
            case Input.SEND_EOF:
                stream.send_eof()
            case Input.SEND_RESET:
                stream.reset(ErrorCode.CANCELLED, "")
            case Input.RECV_OPEN:
                return stream.receive(Open(1, "tcp", [], WINDOW))
            case Input.RECV_OPENED:
                return stream.receive(Opened(1, WINDOW))
            case Input.RECV_REFUSED:
                return stream.receive(Refused(1, "refused", ""))
            case Input.RECV_DATA:
                return stream.receive(Data(1, b"x"))
            case Input.RECV_CREDIT:
                return stream.receive(Credit(1, 1))
            case Input.RECV_EOF:
                return stream.receive(Eof(1))
            case Input.RECV_RESET:
                return stream.receive(Reset(1, "reset", ""))
        return False


# The shortest way into each state.
WAYS = {
    State.IDLE: [],
    State.OPENING: [Input.SEND_OPEN],
    State.OFFERED: [Input.RECV_OPEN],
    State.OPEN: [Input.SEND_OPEN, Input.RECV_OPENED],
    State.LOCAL_ENDED: [Input.RECV_OPEN, Input.SEND_OPENED, Input.SEND_EOF],
    State.REMOTE_ENDED: [Input.SEND_OPEN, Input.RECV_OPENED, Input.RECV_EOF],
    State.REFUSED: [Input.RECV_OPEN, Input.SEND_REFUSED],
    State.RESETTING: [Input.SEND_OPEN, Input.RECV_OPENED, Input.SEND_RESET],
    State.ENDED_RESETTING: [Input.SEND_OPEN, Input.RECV_OPENED, Input.SEND_EOF, Input.SEND_RESET],
    State.CLOSED: [Input.SEND_OPEN, Input.RECV_REFUSED],
}


def side_in(state: State) -> Side:
    side = Side()
    for event in WAYS[state]:
        side.do(event)
    assert side.stream.state is state
    side.said.clear()
    return side


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Input)))
def test_any_input_in_any_state(state: State, event: Input) -> None:
    side = side_in(state)
    if (state, event) in TRANSITIONS:
        side.do(event)
        assert side.stream.state is TRANSITIONS[state, event][1]
        return
    error = RemoteProtocolError if event.name.startswith("RECV") else LocalProtocolError
    with pytest.raises(error, match=f"{event.name} in state {state.name}"):
        side.do(event)
    assert side.stream.state is state
    assert side.said == []


@pytest.mark.parametrize("state", [State.OFFERED, State.OPEN, State.LOCAL_ENDED, State.REMOTE_ENDED])
def test_a_reset_is_answered_and_told(state: State) -> None:
    side = side_in(state)
    assert side.do(Input.RECV_RESET)
    assert [type(frame) for frame in side.said] == [Reset]


@pytest.mark.parametrize("state", [State.RESETTING, State.ENDED_RESETTING])
def test_after_our_reset_nothing_is_told_and_data_still_counts(state: State) -> None:
    side = side_in(state)
    assert not side.stream.receive(Data(1, b"x" * WINDOW))
    with pytest.raises(RemoteProtocolError, match="credit"):
        side.stream.receive(Data(1, b"x"))


def test_data_goes_in_chunks_within_the_credit() -> None:
    side = side_in(State.OPEN)
    side.stream.send_data(b"a" * 70)
    side.stream.send_data(b"b" * 70)
    chunks = []
    while side.stream.ready:
        chunks.append(bytes(side.stream.next_chunk()))
    assert chunks == [b"a" * 70, b"b" * 30]
    drained = [side.stream.drained]
    side.stream.receive(Credit(1, MAX_CHUNK * 2))
    assert bytes(side.stream.next_chunk()) == b"b" * 40
    assert [*drained, side.stream.drained] == [False, True]
    side.stream.send_data(b"c" * (MAX_CHUNK + 1))
    assert [len(side.stream.next_chunk()), len(side.stream.next_chunk())] == [MAX_CHUNK, 1]


def test_the_end_waits_for_the_data_before_it() -> None:
    side = side_in(State.OPEN)
    side.stream.send_data(b"x" * (WINDOW + 1))
    side.stream.send_eof()
    for call in (side.stream.send_eof, lambda: side.stream.send_data(b"late")):
        with pytest.raises(LocalProtocolError):
            call()
    side.stream.next_chunk()
    assert side.said == []
    side.stream.receive(Credit(1, 1))
    side.stream.next_chunk()
    assert side.said == [Eof(1)]
    assert side.stream.state is State.LOCAL_ENDED


def test_a_reset_drops_the_data_that_waits() -> None:
    side = side_in(State.OPEN)
    side.stream.send_data(b"x" * 500)
    side.stream.send_eof()
    side.do(Input.SEND_RESET)
    assert not side.stream.ready
    assert [type(frame) for frame in side.said] == [Reset]


def test_dropping_unsent_data_lets_a_waiting_end_go() -> None:
    side = side_in(State.OPEN)
    side.stream.send_data(b"x" * 500)
    side.stream.send_eof()
    side.stream.drop_unsent()
    assert side.said == [Eof(1)]


def test_credit_is_sent_while_the_peer_can_use_it() -> None:
    side = side_in(State.OPEN)
    side.stream.receive(Data(1, b"x" * WINDOW))
    side.stream.consume(WINDOW // 2)
    assert side.said == [Credit(1, WINDOW // 2)]
    side.stream.receive(Eof(1))
    side.stream.consume(WINDOW // 2)
    assert len(side.said) == 1


def test_empty_data_is_an_error_of_the_peer_and_nothing_from_us() -> None:
    side = side_in(State.OPEN)
    with pytest.raises(RemoteProtocolError, match="without data"):
        side.stream.receive(Data(1, b""))
    side.stream.send_data(b"")
    assert not side.stream.ready
    assert side.stream.drained


# --- before the answer -----------------------------------------------------------------------------


def test_some_data_goes_before_the_answer_and_counts_in_the_window() -> None:
    said: list[AnyFrame] = []
    stream = MuxedStream(1, 2 * EARLY, said.append)
    stream.open("tcp", [])
    stream.send_data(b"x" * 3 * EARLY)
    assert len(stream.next_chunk()) == EARLY
    assert not stream.ready
    stream.receive(Opened(1, 2 * EARLY))
    assert len(stream.next_chunk()) == EARLY
    assert not stream.ready


def test_an_answer_that_takes_back_what_was_granted_early() -> None:
    stream = MuxedStream(1, EARLY, lambda frame: None)
    stream.open("tcp", [])
    with pytest.raises(RemoteProtocolError, match="credit"):
        stream.receive(Opened(1, EARLY - 1))


def test_what_is_offered_may_bring_data_within_the_window() -> None:
    side = side_in(State.OFFERED)
    assert side.stream.receive(Data(1, b"x" * WINDOW))
    with pytest.raises(RemoteProtocolError, match="credit"):
        side.stream.receive(Data(1, b"x"))


def test_the_end_is_not_said_before_the_answer() -> None:
    side = side_in(State.OPENING)
    side.stream.send_data(b"x")
    with pytest.raises(LocalProtocolError):
        side.stream.send_eof()


def test_who_is_refused_says_that_nothing_more_comes() -> None:
    side = side_in(State.OPENING)
    side.stream.send_data(b"x" * 2 * WINDOW)
    assert side.do(Input.RECV_REFUSED)
    assert [type(frame) for frame in side.said] == [Reset]
    assert not side.stream.ready
    assert side.stream.drained


def test_who_refuses_drops_what_was_sent_before_it_was_known() -> None:
    side = side_in(State.REFUSED)
    assert not side.stream.receive(Data(1, b"x" * WINDOW))
    with pytest.raises(RemoteProtocolError, match="credit"):
        side.stream.receive(Data(1, b"x"))
    assert not side.do(Input.RECV_RESET)
    assert side.said == []


def test_a_refusal_and_a_reset_that_cross() -> None:
    one, other = Side(), Side()
    one.do(Input.SEND_OPEN)
    one.do(Input.SEND_RESET)
    other.do(Input.RECV_OPEN)
    other.do(Input.SEND_REFUSED)
    assert not one.do(Input.RECV_REFUSED)
    assert not other.do(Input.RECV_RESET)
    assert one.stream.state is other.stream.state is State.CLOSED
