from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages
from protocol.errors import (
    ErrorCode,
    LinkClosed,
    LinkError,
    LocalProtocolError,
    OpenRefused,
    RemoteProtocolError,
)
from protocol.frames import FrameDecoder
from protocol.messages import AnyFrame, Hello
from protocol.rpc import MAX_REQUESTS
from protocol.session import (
    HELLO_TIMEOUT,
    MAX_BACKLOG,
    MAX_STREAMS,
    TRANSITIONS,
    Ended,
    Event,
    Lapsed,
    Phase,
    Role,
    Session,
    TimedOut,
)
from protocol.stream import MAX_CHUNK
from protocol.window import INITIAL_WINDOW, MAX_WINDOW

WINDOW = 1000


def wire(*frames: AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


def output(session: Session) -> bytes:
    data = b""
    while batch := session.data_to_send().buffers:
        data += b"".join(batch)
    return data


def parsed(data: bytes) -> list[AnyFrame]:
    decoder, frames = FrameDecoder(), []
    decoder.receive_data(data)
    while (raw := decoder.next_frame()) is not None:
        frames.append(messages.decode(raw))
    assert decoder.buffered == 0
    return frames


def said(session: Session) -> list[AnyFrame]:
    return parsed(output(session))


def fresh(role: Role = Role.HOST, **options: Any) -> Session:
    return Session(role, Hello(name=role.value), 0.0, window=WINDOW, **options)


def greeted(role: Role = Role.HOST, **options: Any) -> Session:
    """A session past the hellos. The peer of a host uses odd ids."""
    session = fresh(role, **options)
    session.receive_data(wire(Hello(name="peer")), 0.0)
    output(session)
    return session


def hears(session: Session, *frames: AnyFrame, now: float = 0.0) -> list[Event]:
    return session.receive_data(wire(*frames), now)


def error_of(events: list[Event]) -> LinkError:
    assert events
    ended = events[-1]
    assert isinstance(ended, Ended)
    return ended.error


# --- hello -----------------------------------------------------------------------------------------


def test_the_first_word_is_hello() -> None:
    session = fresh()
    assert said(session) == [Hello(name="host")]
    assert hears(session, Hello(name="peer")) == [Hello(name="peer")]
    assert session.peer == Hello(name="peer")


def test_nothing_may_be_asked_before_the_peers_hello() -> None:
    with pytest.raises(LocalProtocolError):
        fresh().notify("x", [])


@pytest.mark.parametrize("frame", [messages.Ping(1), messages.Open(1, "tcp", [], 9), messages.Credit(2, 1)])
def test_anything_before_hello_is_an_error(frame: AnyFrame) -> None:
    assert isinstance(error_of(hears(fresh(), frame)), RemoteProtocolError)


def test_a_second_hello_is_an_error() -> None:
    assert "Hello in phase OPEN" in str(error_of(hears(greeted(), Hello())))


def test_another_major_is_refused_and_the_peer_is_told_why() -> None:
    session = fresh()
    error = error_of(hears(session, Hello(major=9)))
    assert error.code is ErrorCode.VERSION
    (goodbye,) = said(session)
    assert goodbye == messages.Goodbye("version", str(error))
    assert error_of(hears(fresh(), goodbye)).code is ErrorCode.VERSION


def test_a_minor_and_a_digest_are_only_information() -> None:
    hello = Hello(minor=77, digest="other", capabilities=["unheard-of"])
    assert hears(fresh(), hello) == [hello]


def test_a_silent_peer_is_given_up() -> None:
    session = fresh()
    assert session.next_timeout() == HELLO_TIMEOUT
    assert session.handle_timeout(HELLO_TIMEOUT - 0.1) == []
    assert error_of(session.handle_timeout(HELLO_TIMEOUT)).code is ErrorCode.TIMEOUT


# --- heartbeat -------------------------------------------------------------------------------------


def test_a_heartbeat_is_answered_and_comes_again() -> None:
    session = greeted(heartbeat=5, dead_after=20)
    assert session.next_timeout() == 5
    session.handle_timeout(5)
    (ping,) = said(session)
    assert isinstance(ping, messages.Ping)
    assert session.next_timeout() == 20
    assert hears(session, messages.Pong(ping.token), now=7) == []
    assert session.next_timeout() == 12


def test_only_a_pong_is_a_sign_of_life() -> None:
    session = greeted(heartbeat=5, dead_after=20)
    session.handle_timeout(5)
    for now in range(6, 20):
        hears(session, messages.Notify("chatter", []), now=now)
    assert session.handle_timeout(19.9) == []
    assert error_of(session.handle_timeout(20)).code is ErrorCode.TIMEOUT


def test_a_ping_is_answered() -> None:
    session = greeted()
    assert hears(session, messages.Ping(42)) == []
    assert said(session) == [messages.Pong(42)]


@pytest.mark.parametrize("token", [0, 1, 2])
def test_a_pong_without_its_ping_is_an_error(token: int) -> None:
    session = greeted()
    if token:
        session.handle_timeout(5)
        hears(session, messages.Pong(1))
    assert isinstance(error_of(hears(session, messages.Pong(token))), RemoteProtocolError)


# --- requests --------------------------------------------------------------------------------------


def test_a_request_and_its_reply() -> None:
    session = greeted()
    number = session.request("status", [1], 2.5, 0.0)
    assert said(session) == [messages.Request(number, "status", [1], 2.5)]
    assert hears(session, messages.Reply(number, ["ok"])) == [messages.Reply(number, ["ok"])]


def test_a_request_in_time_or_cancelled() -> None:
    session = greeted()
    number = session.request("status", [], 2.5, 1.0)
    output(session)
    assert session.next_timeout() == 3.5
    assert session.handle_timeout(3.5) == [TimedOut(number)]
    assert said(session) == [messages.Cancel(number)]
    assert hears(session, messages.Reply(number, [])) == []  # too late, and exactly once
    assert isinstance(error_of(hears(session, messages.Reply(number, []))), RemoteProtocolError)


def test_cancelling_an_answered_request_says_nothing() -> None:
    session = greeted()
    number = session.request("status", [], None, 0.0)
    hears(session, messages.Failure(number, "internal", "no"))
    output(session)
    session.cancel(number)
    assert said(session) == []


def test_a_served_request_lapses_and_is_still_answered() -> None:
    session = greeted()
    assert hears(session, messages.Request(1, "status", [], 2.0), now=1.0)
    assert session.handle_timeout(3.0) == [Lapsed(1)]
    session.fail(1, ErrorCode.TIMEOUT, "too slow")
    assert said(session) == [messages.Failure(1, "timeout", "too slow")]


def test_a_reply_that_does_not_fit_leaves_the_request_to_be_failed() -> None:
    session = greeted()
    hears(session, messages.Request(1, "status", []))
    with pytest.raises(LocalProtocolError):
        session.reply(1, ["x" * 300_000])
    session.fail(1, ErrorCode.LIMIT, "too long")
    assert said(session) == [messages.Failure(1, "limit", "too long")]


def test_a_request_that_does_not_fit_leaves_no_trace() -> None:
    session = greeted()
    for _ in range(MAX_REQUESTS + 1):
        with pytest.raises(LocalProtocolError, match="header"):
            session.request("status", [object()], None, 0.0)
    session.request("status", [], None, 0.0)


def test_too_many_requests_are_answered_with_a_limit() -> None:
    session = greeted()
    numbers = range(1, 2 * MAX_REQUESTS + 2, 2)
    events = hears(session, *[messages.Request(number, "wait", []) for number in numbers])
    assert len(events) == MAX_REQUESTS
    (failure,) = said(session)
    assert isinstance(failure, messages.Failure)
    assert (failure.id, failure.code) == (numbers[-1], "limit")


@pytest.mark.parametrize("number", [0, -1, 2, 2**60 + 1])
def test_a_request_needs_a_new_id_of_the_peers_own(number: int) -> None:
    assert isinstance(error_of(hears(greeted(), messages.Request(number, "x", []))), RemoteProtocolError)


# --- streams ---------------------------------------------------------------------------------------


def open_stream(session: Session) -> int:
    number = session.open("tcp", [])
    hears(session, messages.Opened(number, WINDOW))
    output(session)
    return number


def test_streams_take_turns_and_control_goes_first() -> None:
    session = greeted()
    first, second = session.open("tcp", []), session.open("tcp", [])
    hears(session, messages.Opened(first, MAX_WINDOW), messages.Opened(second, MAX_WINDOW))
    output(session)
    session.send_data(first, b"a" * 3 * MAX_CHUNK)
    session.send_data(second, b"b" * (MAX_CHUNK + 1))
    session.notify("late but urgent", [])
    batches = []
    while buffers := (batch := session.data_to_send()).buffers:
        frames = parsed(b"".join(buffers))
        batches.append(([getattr(frame, "stream", "control") for frame in frames], batch.drained))
    assert batches == [
        (["control", first], []),
        ([second], []),
        ([first], []),
        ([second, first], [second, first]),
    ]


def test_data_waits_for_credit() -> None:
    session = greeted()
    number = open_stream(session)
    assert session.stream(number).writable
    session.send_data(number, b"x" * (WINDOW + 5))
    assert said(session) == [messages.Data(number, b"x" * WINDOW)]
    assert not session.has_output
    assert not session.stream(number).drained
    assert hears(session, messages.Credit(number, 3)) == [messages.Credit(number, 3)]
    assert said(session) == [messages.Data(number, b"x" * 3)]
    session.drop_unsent(number)
    assert session.stream(number).drained
    hears(session, messages.Credit(number, 3))
    assert said(session) == []


def test_more_data_than_the_window_is_an_error() -> None:
    session = greeted()
    number = open_stream(session)
    assert len(hears(session, messages.Data(number, b"x" * WINDOW))) == 1
    assert isinstance(error_of(hears(session, messages.Data(number, b"x"))), RemoteProtocolError)


def test_a_closed_stream_shrugs_at_what_may_have_crossed_its_end() -> None:
    session = greeted()
    number = open_stream(session)
    session.send_eof(number)
    hears(session, messages.Eof(number))
    assert session.take_closed() == [number]
    assert hears(session, messages.Credit(number, 1), messages.Reset(number, "reset", "")) == []
    assert "which is over" in str(error_of(hears(session, messages.Data(number, b"x"))))


@pytest.mark.parametrize("stream", [0, -4, 1, 3, 2, 2**63])
@pytest.mark.parametrize("cls", [messages.Credit, messages.Eof])
def test_a_stream_that_never_was(cls: type[Any], stream: int) -> None:
    frame = cls(stream, 1) if cls is messages.Credit else cls(stream)
    assert "which never was" in str(error_of(hears(greeted(), frame)))


def test_our_streams_are_limited_here_and_the_peers_there() -> None:
    session = greeted()
    for _ in range(MAX_STREAMS):
        session.open("tcp", [])
    with pytest.raises(OpenRefused) as caught:
        session.open("tcp", [])
    assert caught.value.code is ErrorCode.LIMIT
    offers = [messages.Open(1 + 2 * index, "tcp", [], 1) for index in range(MAX_STREAMS)]
    assert len(hears(session, *offers)) == MAX_STREAMS
    assert error_of(hears(session, messages.Open(9999, "tcp", [], 1))).code is ErrorCode.LIMIT


def test_operations_on_a_stream_that_is_gone() -> None:
    session = greeted()
    number = open_stream(session)
    hears(session, messages.Reset(number, "reset", "bye"))
    with pytest.raises(LocalProtocolError):
        session.send_data(number, b"x")
    session.consume(number, 5)
    session.drop_unsent(number)
    assert not session.knows(number)
    assert not session.stream(number).writable
    assert session.stream(number).drained


# --- the end ---------------------------------------------------------------------------------------


def test_goodbye_comes_after_what_is_queued() -> None:
    session = greeted()
    session.notify("last", [])
    session.goodbye("enough")
    assert said(session) == [messages.Notify("last", []), messages.Goodbye("gone", "enough")]
    with pytest.raises(LinkClosed):
        session.notify("more", [])
    assert hears(session, messages.Ping(1)) == []
    assert session.next_timeout() == math.inf


def test_the_peers_goodbye_ends_in_good_order_or_not() -> None:
    error = error_of(hears(greeted(), messages.Goodbye("gone", "enough"), messages.Ping(1)))
    assert isinstance(error, LinkClosed)
    assert str(error) == "enough"
    error = error_of(hears(greeted(), messages.Goodbye("limit", "too much")))
    assert not isinstance(error, LinkClosed)
    assert error.code is ErrorCode.LIMIT


def test_the_end_of_bytes_between_frames_or_within_one() -> None:
    assert isinstance(error_of(greeted().receive_eof()), LinkClosed)
    session = greeted()
    session.receive_data(wire(messages.Ping(1))[:-1], 0.0)
    assert isinstance(error_of(session.receive_eof()), RemoteProtocolError)
    assert session.receive_eof() == []
    assert not session.has_output


def test_what_came_before_the_error_still_counts() -> None:
    session = greeted()
    events = session.receive_data(wire(messages.Notify("good", [])) + bytes(8) + wire(messages.Ping(1)), 0.0)
    assert events[0] == messages.Notify("good", [])
    assert isinstance(error_of(events), RemoteProtocolError)
    assert len(events) == 2
    assert [type(frame) for frame in said(session)] == [messages.Goodbye]


def test_a_peer_that_makes_us_talk_and_does_not_listen() -> None:
    session = greeted()
    events: list[Event] = []
    pings = wire(*[messages.Ping(2**62)] * 1000)
    for _ in range(MAX_BACKLOG // 10_000):
        events += session.receive_data(pings, 0.0)
        assert session.backlog <= MAX_BACKLOG
        if events:
            break
    assert error_of(events).code is ErrorCode.LIMIT


# --- properties ------------------------------------------------------------------------------------

ids = st.integers(-1, 8)
texts = st.sampled_from(["", "x", "gone", "limit"])
frames = st.one_of(
    st.builds(messages.Ping, st.integers(0, 3)),
    st.builds(messages.Pong, st.integers(0, 3)),
    st.builds(messages.Request, ids, texts, st.just([]), st.none() | st.floats()),
    st.builds(messages.Reply, ids, st.just([])),
    st.builds(messages.Failure, ids, texts, texts),
    st.builds(messages.Cancel, ids),
    st.builds(messages.Notify, texts, st.just([])),
    st.builds(messages.Open, ids, texts, st.just([]), st.integers(0, 2000)),
    st.builds(messages.Opened, ids, st.integers(0, 2000)),
    st.builds(messages.Refused, ids, texts, texts),
    st.builds(messages.Data, ids, st.binary(max_size=600)),
    st.builds(messages.Credit, ids, st.integers(-1, 2000)),
    st.builds(messages.Eof, ids),
    st.builds(messages.Reset, ids, texts, texts),
    st.builds(messages.Goodbye, texts, texts),
    st.builds(messages.Call, ids, st.integers(0, 3), st.just([]), st.binary(max_size=9)),
    st.builds(messages.Result, ids, st.integers(-1, 40), st.none(), st.binary(max_size=9)),
    st.just(Hello()),
)


def busy() -> Session:
    """A session with a stream in every state, a request and a call in each direction."""
    session = greeted()
    for _ in range(4):
        session.open("tcp", [])
    hears(session, messages.Opened(4, WINDOW), messages.Opened(6, WINDOW), messages.Opened(8, WINDOW))
    session.send_eof(6)
    session.reset(8, ErrorCode.RESET)
    hears(
        session,
        messages.Open(1, "tcp", [], 10),
        messages.Open(3, "tcp", [], 10),
        messages.Open(5, "tcp", [], 10),
    )
    session.accept(3)
    session.accept(5)
    session.send_data(5, b"x" * 100)
    hears(session, messages.Eof(5), messages.Request(1, "x", [], 1.0), messages.Call(1, 1, []))
    session.request("y", [], 1.0, 0.0)
    session.call(1, [])
    session.handle_timeout(5.0)
    return session


def check_outcome(session: Session, events: list[Event]) -> None:
    """Either life goes on, or there is one clean end after which nothing happens."""
    ends = [event for event in events if isinstance(event, Ended)]
    assert len(ends) == int(session.over)
    for ended in ends:
        assert events[-1] is ended
        assert session.next_timeout() == math.inf
        said(session)
        assert hears(session, messages.Ping(1)) == []
        assert not session.has_output
    assert session.backlog <= MAX_BACKLOG


@given(st.booleans(), st.lists(frames, max_size=20))
def test_any_frames_in_any_state(at_once: bool, sequence: list[AnyFrame]) -> None:
    session = busy()
    events: list[Event] = []
    if at_once:
        events = hears(session, *sequence, now=6.0)
    else:
        for frame in sequence:
            events += hears(session, frame, now=6.0)
            if not session.over:
                said(session)
    check_outcome(session, events)


@given(
    st.lists(frames, max_size=8), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)
)
def test_mutated_bytes(sequence: list[AnyFrame], damage: list[tuple[int, int]]) -> None:
    stream = bytearray(wire(*sequence))
    for position, value in damage:
        if stream:
            stream[position % len(stream)] = value
    for session in (busy(), fresh()):
        check_outcome(session, session.receive_data(stream, 6.0))


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    for session in (busy(), fresh()):
        check_outcome(session, session.receive_data(data, 6.0))


@given(st.lists(frames, max_size=15), st.lists(st.integers(1, 60), min_size=1))
def test_any_split_gives_the_same_events(sequence: list[AnyFrame], sizes: list[int]) -> None:
    stream = wire(*sequence)
    whole, split = busy(), busy()
    expected = whole.receive_data(stream, 6.0)
    events, position, turn = [], 0, 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        events += split.receive_data(stream[position : position + size], 6.0)
        position, turn = position + size, turn + 1
    assert list(map(repr, events)) == list(map(repr, expected))
    assert output(split) == output(whole)


def test_every_frame_has_its_place() -> None:
    assert {cls for phase, cls in TRANSITIONS if phase is Phase.OPEN} == set(messages.TYPES.values()) - {
        Hello
    }


# --- two sessions, wired together ------------------------------------------------------------------


@dataclass
class End:
    """One side of a pair: a session, the bytes on their way to it, and what it did and saw."""

    session: Session
    inbox: bytearray = field(default_factory=bytearray)
    offers: list[int] = field(default_factory=list)
    writable: set[int] = field(default_factory=set)
    sent: dict[int, bytes] = field(default_factory=dict)
    received: dict[int, bytes] = field(default_factory=dict)
    unread: Counter[int] = field(default_factory=Counter)
    ended: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    answers: list[int] = field(default_factory=list)
    to_answer: list[int] = field(default_factory=list)
    notices: list[Any] = field(default_factory=list)
    noticed: list[Any] = field(default_factory=list)


class Pair:
    """Two ends, and the operations a test may draw. Ids are picked by an arbitrary number."""

    def __init__(self) -> None:
        self.ends = [End(Session(role, Hello(), 0.0, window=WINDOW)) for role in (Role.HOST, Role.GUEST)]
        self.settle()

    def operate(self, name: str, side: int, number: int) -> None:
        getattr(self, name)(self.ends[side], self.ends[1 - side], number)

    @staticmethod
    def pick(choices: Any, number: int) -> int | None:
        options = sorted(choices)
        return options[number % len(options)] if options else None

    def open(self, end: End, peer: End, number: int) -> None:
        stream = end.session.open("tcp", [])
        end.sent[stream] = end.received[stream] = b""

    def accept(self, end: End, peer: End, number: int) -> None:
        if end.offers:
            stream = end.offers.pop(0)
            if number % 5 == 0:
                end.session.refuse(stream, ErrorCode.REFUSED, "")
                end.cut.add(stream)
            else:
                end.session.accept(stream)
                end.writable.add(stream)

    def write(self, end: End, peer: End, number: int) -> None:
        if (stream := self.pick(end.writable, number)) is not None:
            data = bytes([number % 251]) * (number % 1500)
            end.session.send_data(stream, data)
            end.sent[stream] += data

    def finish(self, end: End, peer: End, number: int) -> None:
        if (stream := self.pick(end.writable, number)) is not None:
            end.session.send_eof(stream)
            end.writable.discard(stream)

    def reset(self, end: End, peer: End, number: int) -> None:
        live = [stream for stream in end.sent if end.session.knows(stream) and stream not in end.offers]
        if (stream := self.pick(set(live) - end.cut, number)) is not None:
            end.session.reset(stream, ErrorCode.CANCELLED)
            end.cut.add(stream)
            end.writable.discard(stream)

    def read(self, end: End, peer: End, number: int) -> None:
        if (stream := self.pick([s for s, count in end.unread.items() if count], number)) is not None:
            count = 1 + number % end.unread[stream]
            end.unread[stream] -= count
            end.session.consume(stream, count)

    def ask(self, end: End, peer: End, number: int) -> None:
        end.asked.add(end.session.request("x", [], None, 0.0))

    def give_up(self, end: End, peer: End, number: int) -> None:
        if (request := self.pick(end.asked - set(end.answers), number)) is not None:
            end.session.cancel(request)
            end.given_up.add(request)

    def answer(self, end: End, peer: End, number: int) -> None:
        if end.to_answer:
            request = end.to_answer.pop(number % len(end.to_answer))
            end.session.reply(request, [])

    def tell(self, end: End, peer: End, number: int) -> None:
        end.session.notify("n", [number])
        end.notices.append([number])

    def move(self, end: End, peer: End, number: int) -> None:
        """Write a batch, and let the peer have some of the bytes under way."""
        peer.inbox += b"".join(end.session.data_to_send().buffers)
        part = peer.inbox[: number % 3000]
        del peer.inbox[: len(part)]
        self.take(peer, peer.session.receive_data(part, 0.0))

    def take(self, end: End, events: list[Event]) -> None:
        for event in events:
            match event:
                case messages.Open(stream=stream):
                    end.offers.append(stream)
                    end.sent[stream] = end.received[stream] = b""
                case messages.Opened(stream=stream):
                    end.writable.add(stream)
                case messages.Data(stream=stream, payload=payload):
                    assert stream not in end.cut
                    end.received[stream] += payload
                    end.unread[stream] += len(payload)
                    assert end.unread[stream] <= WINDOW
                case messages.Eof(stream=stream):
                    end.ended.add(stream)
                case messages.Refused(stream=stream) | messages.Reset(stream=stream):
                    assert stream not in end.cut
                    end.cut.add(stream)
                    end.writable.discard(stream)
                    if stream in end.offers:
                        end.offers.remove(stream)
                case messages.Request(id=request):
                    end.to_answer.append(request)
                case messages.Reply(id=request):
                    end.answers.append(request)
                case messages.Notify(args=args):
                    end.noticed.append(args)
                case Ended(error=error):
                    raise error

    @staticmethod
    def busy(end: End) -> bool:
        return bool(end.session.has_output or end.inbox or end.unread.total() or end.offers or end.to_answer)

    def settle(self) -> None:
        """Deliver everything, accept everything, read everything, answer everything."""
        while any(map(self.busy, self.ends)):
            for end, peer in (self.ends, reversed(self.ends)):
                self.move(end, peer, 2999)
                while end.offers:
                    self.accept(end, peer, 1)
                for stream, count in list(end.unread.items()):
                    end.session.consume(stream, count)
                    end.unread[stream] = 0
                while end.to_answer:
                    self.answer(end, peer, 0)


operations = st.tuples(
    st.sampled_from(
        [
            "open",
            "accept",
            "accept",
            "write",
            "write",
            "finish",
            "reset",
            "read",
            "ask",
            "give_up",
            "answer",
            "tell",
        ]
        + ["move"] * 6
    ),
    st.integers(0, 1),
    st.integers(0, 5000),
)


@given(st.lists(operations, max_size=120))
def test_a_pair_loses_nothing_and_duplicates_nothing(steps: list[tuple[str, int, int]]) -> None:
    pair = Pair()
    for name, side, number in steps:
        pair.operate(name, side, number)
        for end, peer in (pair.ends, reversed(pair.ends)):
            for stream, data in end.received.items():
                assert peer.sent.get(stream, b"").startswith(data)
    pair.settle()
    for end, peer in (pair.ends, reversed(pair.ends)):
        for stream in end.sent:
            if stream not in end.cut | peer.cut:
                assert peer.received[stream] == end.sent[stream]
                assert (stream in peer.ended) == (stream not in end.writable)
            if stream in end.cut | peer.cut or stream in end.ended & peer.ended:
                assert not end.session.knows(stream)
        assert len(set(end.answers)) == len(end.answers)
        assert end.asked - end.given_up <= set(end.answers) <= end.asked
        assert peer.noticed == end.notices


def test_the_default_window_keeps_a_full_chunk_under_way() -> None:
    assert INITIAL_WINDOW >= 2 * MAX_CHUNK


def test_streams_end_with_their_session() -> None:
    session = greeted()
    number = open_stream(session)
    stream = session.stream(number)
    session.send_data(number, b"x" * 2 * WINDOW)
    assert not stream.drained
    session.goodbye()
    assert stream.drained
    assert not stream.writable
