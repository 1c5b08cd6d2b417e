"""The short ways say and hear the same as the long ones, whatever the sequence of frames and wherever it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages
from protocol.errors import ErrorCode, LinkError, LocalProtocolError, OpenRefused
from protocol.messages import AnyFrame, Credit, Data, Eof, Hello, Open, Opened, Refused, Reset
from protocol.resync import MAGIC, MAX_RECORD, UNKNOWN, Resync, State, preamble
from protocol.session import Ended, Event, Role, Session
from protocol.stream import MAX_CHUNK

WINDOW = 100
"""Small, so that a peer soon uses it up."""

Do = Callable[[Session], None]


def express(session: Session, data: bytes) -> Data | None:
    """What ``receive_express`` took, as the event that it stands for."""
    taken = session.receive_express(data)
    return None if taken is None else Data(*taken)


def wire(*frames: AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


def said(session: Session) -> bytes:
    return b"".join(session.data_to_send().buffers)


def greeted(window: int = WINDOW) -> Session:
    """A host's session that the guest has greeted, with nothing left to say."""
    session = Session(Role.HOST, Hello(), 0.0, window=window)
    session.receive_data(wire(Hello()), 0.0)
    said(session)
    return session


def with_stream(window: int = WINDOW, grant: int = WINDOW) -> Session:
    """The same, with stream 1 open; ``grant`` is what the guest takes."""
    session = greeted(window)
    session.receive_data(wire(Open(1, "tcp", [], grant)), 0.0)
    session.accept(1)
    said(session)
    return session


def take(session: Session, data: bytes) -> list[Event]:
    """As ``Link`` does it."""
    event = express(session, data)
    return session.receive_data(data, 0.0) if event is None else [event]


def comparable(events: list[Event]) -> list[object]:
    """Exceptions have no equality of their own."""
    return [
        (type(event.error), event.error.code, str(event.error)) if isinstance(event, Ended) else event
        for event in events
    ]


# --- what is heard ---------------------------------------------------------------------------------

STREAMS = st.sampled_from([1, 1, 1, 2, 2, 3, 4])
"""Those that the guest opens are odd, the host's own are even; two of each are open at the start."""

CONTENT = st.integers(1, 12).map(bytes) | st.integers(1, WINDOW).map(bytes)

SAID: st.SearchStrategy[AnyFrame] = st.one_of(
    st.builds(Credit, STREAMS, st.integers(1, 50)),
    st.builds(Eof, STREAMS),
    st.builds(Reset, STREAMS, st.just("reset"), st.just("")),
    st.builds(messages.Ping, st.integers(0, 9)),
    st.builds(messages.Notify, st.just("event"), st.just([])),
)
FAULTS: st.SearchStrategy[AnyFrame] = st.one_of(
    st.builds(Data, st.sampled_from([1, 5, 6]), st.just(b"") | CONTENT),
    st.builds(Open, st.sampled_from([1, 3, 5, 7]), st.just("tcp"), st.just([]), st.just(WINDOW)),
    st.builds(Opened, st.sampled_from([2, 4, 6]), st.just(WINDOW)),
    st.builds(Refused, st.sampled_from([4, 6]), st.just("refused"), st.just(""), st.just("")),
    st.builds(messages.Request, st.integers(1, 20), st.just("status"), st.just([]), st.none()),
    st.just(messages.Goodbye("gone", "")),
)
"""Of which some are, depending on what was before."""

FRAMES = st.integers(0, 19).flatmap(
    lambda roll: st.builds(Data, STREAMS, CONTENT) if roll < 14 else SAID if roll < 19 else FAULTS
)


def with_streams() -> Session:
    """A session with streams 1 to 4 open."""
    session = with_stream()
    for _ in range(2):
        session.open("tcp", [])
    session.receive_data(wire(Opened(2, WINDOW), Opened(4, WINDOW), Open(3, "tcp", [], WINDOW)), 0.0)
    session.accept(3)
    said(session)
    return session


@st.composite
def reads(draw: st.DrawFn) -> list[bytes]:
    """What the transport brings at a time: mostly a frame, sometimes more, or a part."""
    pieces: list[bytes] = []
    for frame in draw(st.lists(FRAMES, max_size=6)):
        data = wire(frame)
        how = draw(st.sampled_from(["whole", "whole", "whole", "with the one before", "cut"]))
        if how == "with the one before" and pieces:
            pieces[-1] += data
        elif how == "cut":
            at = draw(st.integers(0, len(data)))
            pieces += [data[:at], data[at:]]
        else:
            pieces.append(data)
    return [piece for piece in pieces if piece]


@dataclass(frozen=True)
class Step:
    """Something that this side does."""

    name: str
    number: int
    count: int

    def __call__(self, session: Session) -> None:
        match self.name:
            case "open":
                session.open("tcp", [])
            case "accept":
                session.accept(self.number)
            case "refuse":
                session.refuse(self.number, ErrorCode.REFUSED, "")
            case "send":
                session.send_data(self.number, bytes(self.count))
            case "end":
                session.send_eof(self.number)
            case "reset":
                session.reset(self.number, ErrorCode.CANCELLED)
            case "consume":
                session.consume(self.number, self.count)
            case "notify":
                session.notify("event", [])
            case "write":
                said(session)
            case "hear credit":
                session.receive_data(wire(Credit(self.number, self.count)), 0.0)
            case "hear the end":
                session.receive_data(wire(Eof(self.number)), 0.0)
            case "hear a reset":
                session.receive_data(wire(Reset(self.number, "reset", "")), 0.0)
            case _:
                raise AssertionError(self.name)


STEPS = st.builds(
    Step,
    st.sampled_from(["consume"] * 8 + ["send", "write"] * 2 + ["open", "accept", "refuse", "end", "reset"]),
    STREAMS | st.sampled_from([5, 7]),
    st.integers(1, 60),
)


def outcome(do: Do, session: Session) -> tuple[type, str] | None:
    """The error that it came to, so that two sessions can be compared."""
    try:
        do(session)
    except (LocalProtocolError, OpenRefused, LinkError) as error:
        return type(error), str(error)
    return None


@given(st.lists(st.one_of(STEPS, reads()), max_size=25))
def test_the_same_is_heard_and_answered_by_the_short_way(script: list[Step | list[bytes]]) -> None:
    short, long = with_streams(), with_streams()
    for step in script:
        if isinstance(step, Step):
            assert outcome(step, short) == outcome(step, long)
        else:
            for data in step:
                assert comparable(take(short, data)) == comparable(long.receive_data(data, 0.0))
        assert (short.over, short.backlog, short.has_output) == (long.over, long.backlog, long.has_output)
    assert short.take_closed() == long.take_closed()
    while said_by_short := said(short):
        assert said_by_short == said(long)
    assert not said(long)
    assert comparable(short.receive_eof()) == comparable(long.receive_eof())


@given(st.lists(st.integers(1, WINDOW), max_size=30))
def test_the_short_way_counts_what_the_peer_sends(counts: list[int]) -> None:
    """Until the window is used up, which is the peer's fault on either way."""
    session, left = with_stream(), WINDOW
    for count in counts:
        events = take(session, wire(Data(1, bytes(count))))
        if count > left:
            assert isinstance(events[-1], Ended)
            assert events[-1].error.code is ErrorCode.PROTOCOL
            return
        assert events == [Data(1, bytes(count))]
        session.consume(1, count)
        left += credit(said(session)) - count


def credit(data: bytes) -> int:
    """What a single frame of credit grants; 0 for no frame."""
    return next((count for count in range(1, 2 * WINDOW) if wire(Credit(1, count)) == data), 0) if data else 0


def test_one_frame_with_data_is_taken_the_short_way() -> None:
    assert express(with_stream(), wire(Data(1, b"x"))) == Data(1, b"x")
    big = with_stream(window=MAX_CHUNK)
    assert express(big, wire(Data(1, bytes(MAX_CHUNK)))) == Data(1, bytes(MAX_CHUNK))


ONE = wire(Data(1, b"x"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ONE[:7],
        ONE[:8],
        ONE[:-1],
        ONE + b"\0",
        ONE * 2,
        bytes(8),
        b"\xff" * 100,
        wire(Data(1, b"")),
        wire(Data(1, bytes(WINDOW + 1))),
        wire(Data(2, b"x")),
        wire(Data(1, b"", [0, 5000])),
        wire(Eof(1)),
        wire(messages.Ping(1)),
    ],
)
def test_anything_else_is_left_untouched(data: bytes) -> None:
    session, untouched = with_stream(), with_stream()
    assert session.receive_express(data) is None
    assert comparable(session.receive_data(data, 0.0)) == comparable(untouched.receive_data(data, 0.0))
    assert said(session) == said(untouched)


def test_a_frame_that_is_longer_than_one_may_be_is_left_untouched() -> None:
    assert with_stream(window=1 << 20).receive_express(wire(Data(1, bytes(MAX_CHUNK))) + b"x") is None
    header = wire(Data(1, bytes(MAX_CHUNK)))[8:-MAX_CHUNK]
    long = len(header).to_bytes(4, "big") + (MAX_CHUNK + 1).to_bytes(4, "big") + header + bytes(MAX_CHUNK + 1)
    assert with_stream(window=1 << 20).receive_express(long) is None


@pytest.mark.parametrize(
    ("before", "taken"),
    [
        ([], True),
        (["end"], True),
        (["reset"], False),
        (["end", "reset"], False),
        (["hear the end"], False),
        (["hear the end", "end"], False),
        (["hear a reset"], False),
    ],
)
def test_data_is_taken_the_short_way_while_a_stream_may_have_some(before: list[str], taken: bool) -> None:
    short, long = with_stream(), with_stream()
    for name in before:
        Step(name, 1, 0)(short)
        Step(name, 1, 0)(long)
    assert (short.receive_express(ONE) is not None) is taken
    if not taken:
        assert comparable(short.receive_data(ONE, 0.0)) == comparable(long.receive_data(ONE, 0.0))


def test_nothing_is_not_sent() -> None:
    session = with_stream()
    assert session.express(1, b"") is None
    session.send_data(1, b"")
    assert not session.has_output


def test_an_offer_has_no_short_way() -> None:
    session = greeted()
    session.receive_data(wire(Open(1, "tcp", [], WINDOW)), 0.0)
    assert session.receive_express(ONE) is None
    assert session.express(1, b"x") is None


def test_the_rest_of_a_frame_is_not_taken_for_one() -> None:
    session = with_stream()
    around = wire(Data(1, ONE))
    at = around.index(ONE)
    assert session.receive_data(around[:at], 0.0) == []
    assert session.receive_express(ONE) is None
    assert session.receive_data(ONE, 0.0) == [Data(1, ONE)]


def test_the_short_way_is_closed_before_the_hello_and_after_the_end() -> None:
    session = Session(Role.HOST, Hello(), 0.0)
    assert session.receive_express(ONE) is None
    session = with_stream()
    session.goodbye()
    assert session.receive_express(ONE) is None
    assert session.express(1, b"x") is None


# --- what is said ----------------------------------------------------------------------------------

SAYING = st.one_of(
    st.tuples(st.just("express"), st.integers(1, WINDOW + 20)),
    st.tuples(st.just("express"), st.integers(1, 20)),
    st.tuples(st.sampled_from(["hear credit", "hear credit", "send"]), st.integers(1, 60)),
    st.tuples(st.sampled_from(["notify", "write", "write", "hear the end"]), st.just(0)),
    st.tuples(st.sampled_from(["hear a reset", "end", *["write"] * 6]), st.just(0)),
)


@given(st.lists(SAYING, max_size=30))
def test_the_same_is_said_on_the_same_credit(script: list[tuple[str, int]]) -> None:
    short, long = with_stream(), with_stream()
    for number, (name, count) in enumerate(script):
        if name == "express":
            say(short, long, bytes([number]) * count)
            continue
        step = Step(name, 1, count)
        assert outcome(step, short) == outcome(step, long)
        assert short.stream(1).writable == long.stream(1).writable
    while said_by_short := said(short):
        assert said_by_short == said(long)
    assert not said(long)


def say(short: Session, long: Session, data: bytes) -> None:
    """By the short way if it is open, which it is exactly if nothing is before it and all of it may go."""
    busy = long.has_output or not long.stream(1).drained
    frame = short.express(1, data)
    before = said(short) if frame is None and not busy else b""
    assert before == b"", "what is refused has not been queued"
    error = outcome(lambda session: session.send_data(1, data), long)
    if frame is None:
        assert busy or error is not None or said_at_once(long) != data
        assert outcome(lambda session: session.send_data(1, data), short) == error
        assert busy or error is not None or said_at_once(short) != data
    else:
        assert not busy
        assert error is None
        assert said(long) == frame == wire(Data(1, data))
        assert long.stream(1).drained
        assert not short.has_output
    assert (short.stream(1).writable, short.stream(1).drained) == (
        long.stream(1).writable,
        long.stream(1).drained,
    )


def said_at_once(session: Session) -> bytes:
    """The data of the one frame that is written now; part of what was queued, if there is too little credit."""
    data = said(session)
    return data[len(wire(Data(1, b"x"))) - 1 :]


@pytest.mark.parametrize("name", ["notify", "send", "hear a ping"])
def test_the_short_way_does_not_overtake_anything(name: str) -> None:
    session = with_stream(grant=20)
    if name == "hear a ping":
        session.receive_data(wire(messages.Ping(1)), 0.0)
    else:
        Step(name, 1, 10)(session)
    assert session.express(1, b"x") is None
    said(session)
    assert session.express(1, b"x") == wire(Data(1, b"x"))


def test_the_short_way_does_not_overtake_what_waits_for_credit() -> None:
    session = with_stream(grant=20)
    session.send_data(1, bytes(25))
    said(session)
    assert not session.has_output
    assert session.express(1, b"x") is None
    session.receive_data(wire(Credit(1, 5)), 0.0)
    said(session)
    assert session.express(1, b"x") is None, "the credit is used up"
    session.receive_data(wire(Credit(1, 1)), 0.0)
    assert session.express(1, b"xx") is None, "never a part"
    assert session.express(1, b"x") is not None
    assert session.express(1, b"x") is None


def test_a_stream_that_is_not_open_has_no_short_way() -> None:
    session = greeted()
    assert session.express(99, b"x") is None
    number = session.open("tcp", [])
    assert session.express(number, b"x") is None, "not before the question"
    said(session)
    assert session.express(number, b"x") == wire(Data(number, b"x")), "early"
    session.receive_data(wire(Opened(number, WINDOW)), 0.0)
    assert session.express(number, b"x") == wire(Data(number, b"x"))
    session.send_eof(number)
    said(session)
    assert session.express(number, b"x") is None


# --- records ---------------------------------------------------------------------------------------

A, B, B2 = (bytes([number]) * 8 for number in (1, 2, 3))


def established(nonce: bytes = A, peer: bytes = B) -> Resync:
    resync = Resync()
    resync.begin(nonce, 0.0)
    resync.receive_data(preamble(peer, nonce))
    assert resync.state is State.ESTABLISHED
    resync.data_to_send()
    return resync


def record(data: bytes, nonce: bytes = B) -> bytes:
    return b"".join(established(nonce, A).records(data)) or established(nonce, A).record(data)


PIPED = st.one_of(
    st.binary(max_size=30).map(record),
    st.binary(max_size=30).map(record),
    st.binary(max_size=30).map(record),
    st.lists(st.binary(max_size=5), max_size=3).map(lambda datas: record(b"".join(map(record, datas)))),
    st.integers(1, 20).map(bytes),
    st.just(preamble(B, A)),
    st.just(preamble(B, UNKNOWN)),
    st.just(preamble(B2, UNKNOWN)),
    st.just(preamble(B2, A)),
    st.just(record(b"of the dead", B2)),
    st.just(record(b"cut off")[:-5]),
    st.just(record(b"")),
    st.just(MAGIC),
    st.binary(min_size=1, max_size=8),
)


@st.composite
def pipe_reads(draw: st.DrawFn) -> list[bytes]:
    """What was written, read in other pieces."""
    pieces = [b""]
    for data in draw(st.lists(PIPED, max_size=12)):
        how = draw(st.sampled_from(["whole", "whole", "with the one before", "cut"]))
        if how == "with the one before":
            pieces[-1] += data
        elif how == "cut":
            at = draw(st.integers(0, len(data)))
            pieces[-1] += data[:at]
            pieces.append(data[at:])
        else:
            pieces.append(data)
    return pieces


@given(pipe_reads(), st.data())
def test_an_exchange_is_receiving_and_reading(pieces: list[bytes], data: st.DataObject) -> None:
    short, long = established(), established()
    for piece in pieces:
        if data.draw(st.integers(0, 5)) == 0:  # somebody else reads a part
            at_most = data.draw(st.integers(1, 10))
            for resync in (short, long):
                resync.receive_data(piece)
            assert short.read(at_most) == long.read(at_most)
        else:
            long.receive_data(piece)
            assert short.exchange(piece) == long.read()
        assert (short.state, short.readable) == (long.state, long.readable)
        assert short.data_to_send() == long.data_to_send()
    for resync in (short, long):
        if resync.state is State.LOST:
            resync.begin(b"anew" * 2, 1.0)  # what was not read is searched
            resync.receive_data(preamble(B2, b"anew" * 2) + record(b"new", B2))
    assert (short.state, short.read(), short.data_to_send()) == (long.state, long.read(), long.data_to_send())


def test_what_was_not_read_comes_before_what_is_exchanged() -> None:
    resync = established()
    resync.receive_data(record(b"first"))
    assert resync.read(2) == b"fi"
    assert resync.exchange(record(b"second")) == b"rstsecond"


def test_what_looks_like_a_record_within_one_is_not_exchanged() -> None:
    resync = established()
    inner = record(b"inner")
    outer = record(b"<" + inner + b">")
    assert resync.exchange(outer[:5]) == b""
    assert resync.exchange(inner) == b""
    assert resync.exchange(outer[5 + len(inner) :]) == b"<" + inner + b">"


@pytest.mark.parametrize("noise", [preamble(B, A), preamble(B, UNKNOWN), bytes(1), bytes(200), record(b"")])
def test_what_means_nothing_between_records_means_nothing(noise: bytes) -> None:
    resync = established()
    assert [resync.exchange(data) for data in (noise, record(b"one"), noise, record(b"two") + noise)] == [
        b"",
        b"one",
        b"",
        b"two",
    ]


@pytest.mark.parametrize("end", [preamble(B2, UNKNOWN), record(b"of the dead", B2), b"?"])
def test_nothing_is_exchanged_after_the_session(end: bytes) -> None:
    resync = established()
    assert resync.exchange(end) == b""
    assert resync.state is State.LOST
    assert resync.exchange(record(b"late")) == b""


def test_nothing_is_exchanged_before_the_session() -> None:
    resync = established()
    resync.begin(b"anew" * 2, 1.0)
    assert resync.exchange(b"\xd7\0\0\4late" + UNKNOWN) == b"", "the nonce of nobody"
    assert resync.exchange(preamble(B, b"anew" * 2) + record(b"new")) == b"new"


@pytest.mark.parametrize("size", [1, 1000, MAX_RECORD - 1, MAX_RECORD])
def test_a_record_of_any_size_is_exchanged(size: int) -> None:
    resync = established()
    content = bytes([size % 256]) * size
    assert resync.exchange(record(content)) == content
    assert resync.exchange(record(content)) == content
    assert resync.readable == 0


def test_a_record_that_is_longer_than_one_may_be_is_the_end() -> None:
    resync = established()
    assert resync.exchange(b"\xd7" + (MAX_RECORD + 1).to_bytes(3, "big") + bytes(MAX_RECORD + 1) + B) == b""
    assert resync.state is State.LOST


def test_a_record_is_made_the_same_either_way() -> None:
    resync = established()
    for data in (b"x", bytes(1000), bytes(MAX_RECORD)):
        assert [resync.record(data)] == list(resync.records(data))
