"""Sessions that use memory for payloads: what goes by reference and what inline, and that no slot is lost or mixed up."""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protocol import messages
from protocol.bulk import FREE_AT, INLINE_BELOW, MAX_RUN, SLOT, Bulk, Loan, Run
from protocol.errors import ErrorCode, LinkClosed, LinkError, LocalProtocolError, RemoteProtocolError
from protocol.frames import FrameDecoder
from protocol.messages import AnyFrame, BulkBegin, BulkOffer, Call, Data, Eof, Free, Goodbye, Hello, Result
from protocol.session import Ended, Event, Role, Session

SLOTS = 16
HALF = SLOTS * SLOT
OPTIONS: dict[str, Any] = {"max_payload": MAX_RUN}
HOST, GUEST = 0, 1


class Pair:
    """A host and a guest with the same memory. ``carry`` moves what both have to say."""

    def __init__(self, *, slots: int = SLOTS, used: bool = True) -> None:
        self.half = slots * SLOT
        self.slots = slots
        self.memory = memoryview(bytearray(2 * self.half))
        self.bulks = [self.fresh(HOST), self.fresh(GUEST)]
        self.used = used
        self.start()

    def fresh(self, side: int) -> Bulk:
        """The memory as a new process sees it."""
        bulk = Bulk()
        halves = self.memory[: self.half], self.memory[self.half :]
        bulk.attach(halves[side], halves[1 - side])
        bulk.accept = lambda extents, mark: self.used
        return bulk

    def start(self) -> None:
        host, guest = self.bulks
        self.sessions = [
            Session(Role.HOST, Hello(), 0.0, bulk=host, **OPTIONS),
            Session(Role.GUEST, Hello(bulk=BulkOffer([], b"", guest.busy())), 0.0, bulk=guest, **OPTIONS),
        ]
        self.heard: tuple[list[Event], list[Event]] = ([], [])
        self.carry()

    def carry(self) -> None:
        while any(session.has_output for session in self.sessions):
            for side in (HOST, GUEST):
                data = b"".join(self.sessions[side].data_to_send().buffers)
                self.heard[1 - side].extend(self.sessions[1 - side].receive_data(data, 0.0))

    def lose(self) -> None:
        for session in self.sessions:
            if not session.over:
                session.lose(LinkClosed("lost"))

    def last(self, side: int) -> Any:
        self.carry()
        return self.heard[side][-1]

    def run(self, side: int, content: bytes) -> Run:
        run = self.bulks[side].take(len(content))
        assert run is not None
        run.length = len(content)
        run.view[: run.length] = content
        return run

    def stream(self) -> int:
        number = self.sessions[HOST].open("tcp", [])
        self.carry()
        self.sessions[GUEST].accept(number)
        self.carry()
        return number

    def send_run(self, number: int, content: bytes, side: int = HOST) -> None:
        run = self.sessions[side].take_run(number, len(content))
        assert run is not None
        run.length = len(content)
        run.view[: run.length] = content
        self.sessions[side].send_run(number, run)

    def free(self) -> list[int]:
        """Slots of both halves, when all that was released has come home."""
        for side in (HOST, GUEST):
            data = b"".join(self.sessions[side].data_to_send().buffers)
            self.heard[1 - side].extend(self.sessions[1 - side].receive_data(data, 0.0))
        return [bulk.free for bulk in self.bulks]


def wire(*frames: AnyFrame) -> bytes:
    return b"".join(b"".join(messages.encode(frame)) for frame in frames)


def parsed(data: bytes) -> list[AnyFrame]:
    decoder, frames = FrameDecoder(max_payload=MAX_RUN), []
    decoder.receive_data(data)
    while (raw := decoder.next_frame()) is not None:
        frames.append(messages.decode(raw))
    return frames


def said(session: Session) -> list[AnyFrame]:
    return parsed(b"".join(session.data_to_send().buffers))


def error_of(events: list[Event]) -> LinkError:
    assert isinstance(events[-1], Ended)
    return events[-1].error


def release_all(events: list[Event]) -> None:
    for event in events:
        if isinstance(event, Data | Call | Result) and event.loan is not None:
            event.loan.release()


# --- the agreement ---------------------------------------------------------------------------------


def test_both_agree_on_memory() -> None:
    pair = Pair()
    assert [bulk.active for bulk in pair.bulks] == [True, True]
    assert [bulk.free for bulk in pair.bulks] == [SLOTS, SLOTS]


def test_a_host_that_does_not_find_it_goes_without() -> None:
    pair = Pair(used=False)
    assert [bulk.active for bulk in pair.bulks] == [False, False]


def test_a_guest_without_memory_offers_none_and_is_asked_for_none() -> None:
    bulk = Bulk()
    bulk.accept = lambda extents, mark: True
    session = Session(Role.HOST, Hello(), 0.0, bulk=bulk)
    session.receive_data(wire(Hello()), 0.0)
    assert [type(frame) for frame in said(session)] == [Hello]
    assert not bulk.active


def guest(*, offers: bool = True) -> tuple[Session, Bulk]:
    """A guest whose peer has said hello."""
    memory = memoryview(bytearray(2 * HALF))
    bulk = Bulk()
    bulk.attach(memory[HALF:], memory[:HALF])
    session = Session(Role.GUEST, Hello(bulk=BulkOffer([], b"") if offers else None), 0.0, bulk=bulk)
    session.receive_data(wire(Hello()), 0.0)
    session.data_to_send()
    return session, bulk


@pytest.mark.parametrize(
    "frames",
    [
        [BulkBegin(b""), BulkBegin(b"")],
        [BulkBegin(b"\x00\x00\x01")],
        [BulkBegin(b""), Free(b"\x01")],
        [BulkBegin(b""), Free(b"\x00" * 100)],
        [Free(b"")],
        [Call(2, 1, [], b"", [0, SLOT])],
        [messages.Open(2, "tcp", [], 9), Data(2, b"", [0, SLOT])],
        [BulkBegin(b""), Call(2, 1, [], b"", [0, SLOT]), Call(4, 1, [], b"", [0, SLOT])],
        [BulkBegin(b""), Call(2, 1, [], b"", [SLOTS, 1])],
        [BulkBegin(b""), Call(2, 1, [], b"", [2**64 - 1, 2**64 - 1])],
        [BulkBegin(b""), Call(2, 1, [], b"", [-(2**63), 5000])],
        [BulkBegin(b""), Call(2, 1, [], b"", [0, 0])],
        [BulkBegin(b""), messages.Open(2, "tcp", [], 9), messages.Reset(2, "", ""), Data(2, b"", [0, SLOT])],
        [BulkBegin(b""), Data(2, b"", [0, SLOT])],
        [BulkBegin(b""), Result(1, 0, None, b"", [0, SLOT])],
    ],
)
def test_the_peers_faults_end_the_link_and_lose_no_slot(frames: list[AnyFrame]) -> None:
    session, bulk = guest()
    events = session.receive_data(wire(*frames), 0.0)
    assert isinstance(error_of(events), RemoteProtocolError)
    release_all(events)
    assert not bulk.in_use
    assert bulk.busy() == b""
    assert isinstance(said(session)[-1], Goodbye)


def test_what_was_not_offered_cannot_begin() -> None:
    session, _ = guest(offers=False)
    assert "not offered" in str(error_of(session.receive_data(wire(BulkBegin(b"")), 0.0)))


def test_a_guest_cannot_begin_with_the_hosts_memory() -> None:
    pair = Pair()
    assert "not offered" in str(error_of(pair.sessions[HOST].receive_data(wire(BulkBegin(b"")), 0.0)))


@pytest.mark.parametrize("busy", [b"\x00\x00\x01", b"\xff" * 1000])
def test_an_offer_with_slots_that_do_not_exist(busy: bytes) -> None:
    bulk = Pair().fresh(HOST)
    session = Session(Role.HOST, Hello(), 0.0, bulk=bulk)
    events = session.receive_data(wire(Hello(bulk=BulkOffer([], b"", busy))), 0.0)
    assert isinstance(error_of(events), RemoteProtocolError)
    assert not bulk.active


@pytest.mark.parametrize("ends", ["eof", "reset", "opening"])
def test_data_where_there_may_be_none_is_not_kept(ends: str) -> None:
    pair = Pair()
    host = pair.sessions[HOST]
    number = host.open("tcp", []) if ends == "opening" else pair.stream()
    before = {"eof": wire(Eof(number)), "reset": wire(messages.Reset(number, "reset", "")), "opening": b""}
    events = host.receive_data(before[ends] + wire(Data(number, b"", [0, SLOT])), 0.0)
    assert isinstance(error_of(events), RemoteProtocolError)
    assert not pair.bulks[HOST].in_use
    assert pair.bulks[HOST].busy() == b""


# --- the end ---------------------------------------------------------------------------------------


def ways_to_end(pair: Pair, side: int) -> list[Any]:
    session = pair.sessions[side]
    return [
        lambda: session.receive_data(wire(Goodbye("gone", "")), 0.0),
        lambda: session.receive_data(wire(Goodbye("internal", "a bug")), 0.0),
        lambda: session.receive_data(b"\xff" * 20, 0.0),
        lambda: session.receive_eof(),
        lambda: session.goodbye(),
        lambda: session.lose(LinkClosed("lost")),
        lambda: session.abort(RemoteProtocolError("nonsense")),
        lambda: session.handle_timeout(5.0) + session.handle_timeout(1000.0),
    ]


@pytest.mark.parametrize("way", range(8))
def test_however_a_session_ends_its_memory_does(way: int) -> None:
    pair = Pair()
    pair.sessions[HOST].call(1, [], pair.run(HOST, bytes(SLOT)))
    number = pair.stream()
    (call,) = (event for event in pair.heard[GUEST] if isinstance(event, Call))
    session, bulk = pair.sessions[GUEST], pair.bulks[GUEST]
    ways_to_end(pair, GUEST)[way]()
    assert session.over
    assert not bulk.active
    assert not session.knows(number)
    assert bulk.busy() != b"", "the call's payload is still read"
    assert call.loan is not None
    call.loan.release()
    assert bulk.busy() == b""


def test_a_session_that_is_over_leaves_the_next_one_its_slots() -> None:
    """The link of the old one may still be hanging up."""
    pair = Pair()
    old = pair.sessions[GUEST]
    old.goodbye()
    pair.lose()
    pair.start()
    number = pair.stream()
    for _ in range(-(-SLOTS // FREE_AT)):
        run = pair.bulks[HOST].take(SLOT)
        assert run is not None
        run.length = SLOT
        pair.sessions[HOST].send_run(number, run)
    pair.carry()
    release_all(pair.heard[GUEST])
    assert not old.has_output or [type(frame) for frame in said(old)] == [Goodbye]
    assert pair.free() == [SLOTS, SLOTS]


# --- calls and results -----------------------------------------------------------------------------


def test_a_call_and_its_result_by_reference() -> None:
    pair = Pair()
    host, guest_ = pair.sessions
    run = pair.run(GUEST, b"w" * 70_000)
    number = guest_.call(31, [1], run)
    call = pair.last(HOST)
    assert (call.id, call.args, bytes(call.payload)) == (number, [1], b"w" * 70_000)
    host.result(number, 0, [2], pair.run(HOST, b"r" * 5000))
    result = pair.last(GUEST)
    assert (result.id, result.value, bytes(result.payload)) == (number, [2], b"r" * 5000)
    assert pair.bulks[GUEST].free == SLOTS - 1, "the caller keeps its run"
    run.give_back()
    result.loan.release()
    assert pair.free() == [SLOTS, SLOTS]


def test_the_answer_gives_the_calls_payload_back() -> None:
    pair = Pair()
    number = pair.sessions[GUEST].call(31, [], pair.run(GUEST, bytes(SLOT)))
    call = pair.last(HOST)
    pair.sessions[HOST].result(number, errno.EIO, None)
    assert len(call.loan.view) == 0
    assert not pair.bulks[HOST].in_use
    assert [type(frame) for frame in said(pair.sessions[HOST])] == [Result], "no other frame says so"


@pytest.mark.parametrize("size", [0, 1, INLINE_BELOW - 1, INLINE_BELOW])
def test_a_small_result_goes_inline_and_its_run_is_free_at_once(size: int) -> None:
    pair = Pair()
    number = pair.sessions[GUEST].call(30, [])
    pair.carry()
    run = pair.bulks[HOST].take(SLOT)
    assert run is not None
    run.length, run.view[:size] = size, b"r" * size
    pair.sessions[HOST].result(number, 0, [], run)
    assert pair.bulks[HOST].free == (SLOTS if size < INLINE_BELOW else SLOTS - 1)
    assert bytes(pair.last(GUEST).payload) == b"r" * size


@pytest.mark.parametrize("size", [0, 1, INLINE_BELOW])
def test_a_call_may_have_any_payload(size: int) -> None:
    pair = Pair()
    run = pair.bulks[GUEST].take(SLOT)
    assert run is not None
    run.length, run.view[:size] = size, b"w" * size
    number = pair.sessions[GUEST].call(31, [], run)
    assert bytes(pair.last(HOST).payload) == b"w" * size
    pair.sessions[HOST].result(number, 0, None)
    pair.carry()
    run.give_back()
    assert pair.free() == [SLOTS, SLOTS]


def test_a_run_is_kept_and_sent_again_in_another_session() -> None:
    pair = Pair()
    run = pair.run(GUEST, b"w" * 5000)
    pair.sessions[GUEST].call(31, [], run)
    pair.lose()
    pair.start()
    number = pair.sessions[GUEST].call(31, [], run)
    assert bytes(pair.last(HOST).payload) == b"w" * 5000
    pair.sessions[HOST].result(number, 0, None)
    pair.carry()
    run.give_back()
    assert pair.free() == [SLOTS, SLOTS]


def test_a_run_is_sent_again_as_a_copy_where_there_is_no_memory() -> None:
    pair = Pair()
    run = pair.run(GUEST, b"w" * 5000)
    pair.sessions[GUEST].call(31, [], run)
    pair.lose()
    pair.used = False
    pair.start()
    number = pair.sessions[GUEST].call(31, [], run)
    call = pair.last(HOST)
    assert (bytes(call.payload), call.loan) == (b"w" * 5000, None)
    pair.sessions[HOST].result(number, 0, None, pair.bulks[HOST].take(SLOT) or b"inline")
    assert pair.last(GUEST).payload == b"inline"
    pair.lose()
    pair.used = True
    pair.start()
    assert pair.bulks[GUEST].free == SLOTS - 1
    run.give_back()
    assert pair.free() == [SLOTS, SLOTS]


def test_a_result_in_a_session_without_memory_copies_a_run_of_the_one_before() -> None:
    pair = Pair()
    run = pair.run(HOST, b"r" * 5000)
    pair.lose()
    pair.used = False
    pair.start()
    number = pair.sessions[GUEST].call(30, [])
    pair.carry()
    pair.sessions[HOST].result(number, 0, None, run)
    assert bytes(pair.last(GUEST).payload) == b"r" * 5000
    assert not pair.bulks[HOST].in_use


def test_what_cannot_be_encoded_lends_nothing() -> None:
    pair = Pair()
    run = pair.run(GUEST, bytes(SLOT))
    too_long = ["x" * 300_000]
    with pytest.raises(LocalProtocolError):
        pair.sessions[GUEST].call(31, too_long, run)
    run.give_back()
    assert pair.bulks[GUEST].free == SLOTS
    number = pair.sessions[GUEST].call(30, [])
    pair.carry()
    run = pair.run(HOST, bytes(SLOT))
    with pytest.raises(LocalProtocolError):
        pair.sessions[HOST].result(number, 0, too_long, run)
    run.give_back()
    assert pair.bulks[HOST].free == SLOTS


# --- streams ---------------------------------------------------------------------------------------


def test_data_inline_and_by_reference_comes_in_order() -> None:
    pair = Pair()
    number = pair.stream()
    host = pair.sessions[HOST]
    pieces = [bytes([index]) * size for index, size in enumerate([10, 5000, 5000, 20, SLOT, 30])]
    for piece in pieces:
        if len(piece) < INLINE_BELOW:
            host.send_data(number, piece)
            pair.carry()
        else:
            pair.send_run(number, piece)
    host.send_eof(number)
    pair.carry()
    heard = [event for event in pair.heard[GUEST] if isinstance(event, Data | Eof)]
    assert [bytes(event.payload) for event in heard if isinstance(event, Data)] == pieces
    assert isinstance(heard[-1], Eof)


def test_data_by_reference_does_not_overtake_what_is_queued() -> None:
    pair = Pair()
    number = pair.stream()
    host = pair.sessions[HOST]
    host.send_data(number, b"first")
    run = pair.run(HOST, bytes(SLOT))
    with pytest.raises(LocalProtocolError, match="out of its order"):
        host.send_run(number, run)
    run.give_back()
    assert pair.bulks[HOST].free == SLOTS


@pytest.mark.parametrize("ended", ["eof", "reset"])
def test_a_run_that_cannot_be_sent_any_more_is_still_ours(ended: str) -> None:
    pair = Pair()
    number = pair.stream()
    host = pair.sessions[HOST]
    run = pair.run(HOST, bytes(SLOT))
    if ended == "eof":
        host.send_eof(number)
    else:
        host.reset(number, ErrorCode.RESET)
    with pytest.raises(LocalProtocolError):
        host.send_run(number, run)
    run.give_back()
    assert pair.bulks[HOST].free == SLOTS


def test_data_by_reference_needs_no_credit_and_uses_none() -> None:
    pair = Pair()
    number = pair.stream()
    host, guest_ = pair.sessions
    host.send_data(number, bytes(1 << 20))
    pair.carry()
    assert not host.stream(number).drained
    host.drop_unsent(number)
    assert not host.stream(number).writable
    pair.send_run(number, b"x" * 5000)
    assert bytes(pair.last(GUEST).payload) == b"x" * 5000
    release_all(pair.heard[GUEST])
    assert not host.stream(number).writable
    guest_.consume(number, 100_000)
    pair.carry()
    assert host.stream(number).writable


def test_data_for_a_stream_that_was_reset_is_released_at_once() -> None:
    pair = Pair()
    number = pair.stream()
    pair.send_run(number, bytes(5000))
    pair.sessions[GUEST].reset(number, ErrorCode.CANCELLED)
    pair.carry()
    assert not any(isinstance(event, Data) for event in pair.heard[GUEST])
    assert not pair.bulks[GUEST].in_use
    assert pair.free() == [SLOTS, SLOTS]


def test_a_stream_lends_until_it_is_given_back() -> None:
    pair = Pair()
    number = pair.stream()
    pair.send_run(number, bytes(5000))
    assert pair.sessions[HOST].lends(number)
    pair.carry()
    release_all(pair.heard[GUEST])
    assert pair.sessions[HOST].lends(number)
    pair.free()
    assert not pair.sessions[HOST].lends(number)


def test_little_is_given_back_with_the_next_frame() -> None:
    pair = Pair()
    number = pair.stream()
    session = pair.sessions[GUEST]
    pair.send_run(number, bytes(5000))
    pair.carry()
    release_all(pair.heard[GUEST])
    assert not session.has_output
    session.send_data(number, b"something else")
    assert [type(frame) for frame in said(session)] == [Free, Data]


def test_much_is_given_back_at_once_in_one_frame() -> None:
    pair = Pair()
    for _ in range(-(-SLOTS // FREE_AT)):
        pair.send_run(pair.stream(), bytes(SLOT))
    pair.carry()
    release_all(pair.heard[GUEST])
    assert pair.sessions[GUEST].has_output
    assert [type(frame) for frame in said(pair.sessions[GUEST])] == [Free]


def test_slots_given_back_to_a_session_that_is_over_are_free_in_the_next() -> None:
    pair = Pair()
    number = pair.stream()
    pair.send_run(number, bytes(5000))
    pair.carry()
    release_all(pair.heard[GUEST])
    pair.sessions[GUEST].send_data(number, b"x")
    pair.sessions[GUEST].data_to_send()  # with the slots, and lost on its way
    pair.lose()
    pair.start()
    assert pair.free() == [SLOTS, SLOTS]


# --- anything, in any order ------------------------------------------------------------------------

FEW = 6
SIZES = [INLINE_BELOW, SLOT, SLOT + 1, 3 * SLOT]


@dataclass
class Process:
    """What one side's application remembers; it is gone when the process is."""

    readers: list[tuple[Loan, int, int]] = field(default_factory=list)  # with mark and length
    serving: list[tuple[int, Loan | None, int, int]] = field(default_factory=list)  # with id, mark and length
    calls: dict[int, tuple[Run | None, int, int]] = field(default_factory=dict)
    kept: list[tuple[Run, int]] = field(default_factory=list)


def stamp(view: memoryview, length: int, mark: int) -> None:
    """Content that no other payload has, in each slot of it."""
    for start in range(0, length, SLOT):
        view[start : start + 8] = mark.to_bytes(8, "big")
    view[length - 8 : length] = mark.to_bytes(8, "big")


def check(view: memoryview | bytes, length: int, mark: int) -> None:
    assert len(view) == length
    for start in [*range(0, length - 8, SLOT), length - 8]:
        assert bytes(view[start : start + 8]) == mark.to_bytes(8, "big")


class Anything(RuleBasedStateMachine):
    """Two sides of which either may lose the link or die at any time; each payload is read as it was sent."""

    sides = st.sampled_from([HOST, GUEST])
    pick = st.integers(0, 1000)

    @initialize(used=st.sampled_from([True, True, True, False]))
    def begin(self, used: bool) -> None:
        self.pair = Pair(slots=FEW, used=used)
        self.processes = [Process(), Process()]
        self.mark = 0
        self.greet()

    def greet(self) -> None:
        self.pair.heard[HOST].clear()
        self.pair.heard[GUEST].clear()
        self.stream = self.pair.stream()
        for heard in self.pair.heard:
            heard.clear()
        self.cut: set[int] = set()
        # Of this session, in order: what each side has yet to hear on the stream, and as results.
        self.sent: list[deque[tuple[int, int]]] = [deque(), deque()]
        self.asked: list[dict[int, tuple[int, int]]] = [{}, {}]
        self.answered: list[dict[int, tuple[int, int]]] = [{}, {}]

    def new(self) -> int:
        self.mark += 1
        return self.mark

    def take(self, side: int, size: int, run: Run | None) -> tuple[Run | None, int]:
        """``run``, filled with something new."""
        mark = self.new()
        if run is not None:
            run.view[:] = b"\xff" * len(run.view)
            run.length = min(size, len(run.view))
            stamp(run.view, run.length, mark)
        return run, mark

    # --- what a side does ---

    @rule(side=sides, size=st.sampled_from(SIZES), inline=st.booleans())
    def send(self, side: int, size: int, inline: bool) -> None:
        session = self.pair.sessions[side]
        number = self.stream
        if side in self.cut or not session.knows(number) or not session.stream(number).drained:
            return
        run, mark = self.take(side, size, None if inline else session.take_run(number, size))
        if run is not None:
            self.sent[1 - side].append((mark, run.length))
            session.send_run(number, run)
        elif session.stream(number).writable:
            data = bytearray(INLINE_BELOW)
            stamp(memoryview(data), INLINE_BELOW, mark)
            self.sent[1 - side].append((mark, INLINE_BELOW))
            session.send_data(number, bytes(data))

    @rule(side=sides, size=st.sampled_from(SIZES))
    def call(self, side: int, size: int) -> None:
        run, mark = self.take(side, size, self.pair.bulks[side].take(size))
        self.ask(side, run, mark)

    def ask(self, side: int, run: Run | None, mark: int) -> None:
        data = bytearray(INLINE_BELOW)
        stamp(memoryview(data), len(data), mark)
        number = self.pair.sessions[side].call(1, [], bytes(data) if run is None else run)
        length = INLINE_BELOW if run is None else run.length
        self.processes[side].calls[number] = run, mark, length
        self.asked[1 - side][number] = mark, length

    @rule(side=sides, pick=pick, again=st.booleans())
    def use_what_was_kept(self, side: int, pick: int, again: bool) -> None:
        if kept := self.processes[side].kept:
            run, mark = kept.pop(pick % len(kept))
            if again:
                self.ask(side, run, mark)
            else:
                run.give_back()

    @rule(side=sides, pick=pick, size=st.sampled_from([0, 8, *SIZES]))
    def answer(self, side: int, pick: int, size: int) -> None:
        if serving := self.processes[side].serving:
            number, *_ = serving.pop(pick % len(serving))
            run, mark = self.take(side, max(8, size), self.pair.bulks[side].take(size) if size else None)
            self.answered[1 - side][number] = mark, 0 if run is None else run.length
            self.pair.sessions[side].result(number, 0, None, b"" if run is None else run)

    @rule(side=sides, pick=pick)
    def release(self, side: int, pick: int) -> None:
        if readers := self.processes[side].readers:
            loan, mark, length = readers.pop(pick % len(readers))
            check(loan.view, length, mark)
            loan.release()

    @rule(side=sides)
    def reset(self, side: int) -> None:
        if self.pair.sessions[side].knows(self.stream) and side not in self.cut:
            self.pair.sessions[side].reset(self.stream, ErrorCode.CANCELLED)
            self.cut.add(side)

    # --- what happens to it ---

    @rule()
    def deliver_both(self) -> None:
        self.deliver(HOST)
        self.deliver(GUEST)

    @rule(side=sides)
    def deliver(self, side: int) -> None:
        """What ``side`` has to say arrives."""
        batch = self.pair.sessions[side].data_to_send()
        other = 1 - side
        for event in self.pair.sessions[other].receive_data(b"".join(batch.buffers), 0.0):
            self.hear(other, event)

    def hear(self, side: int, event: Event) -> None:
        process = self.processes[side]
        match event:
            case Data():
                mark, length = self.sent[side].popleft()
                check(event.payload, length, mark)
                if event.loan is None:
                    self.pair.sessions[side].consume(event.stream, length)
                else:
                    process.readers.append((event.loan, mark, length))
            case Call():
                mark, length = self.asked[side].pop(event.id)
                check(event.payload, length, mark)
                process.serving.append((event.id, event.loan, mark, length))
            case Result():
                run, _, _ = process.calls.pop(event.id)
                if run is not None:
                    run.give_back()
                mark, length = self.answered[side].pop(event.id)
                if event.loan is not None:
                    process.readers.append((event.loan, mark, length))
                if length:
                    check(event.payload, length, mark)
            case messages.Reset():
                pass
            case _:
                raise AssertionError(event)

    @rule(
        used=st.sampled_from([True, True, True, False]),
        dies=st.sampled_from([(), (HOST,), (GUEST,), (HOST, GUEST)]),
        done=st.sampled_from([(), (HOST,), (GUEST,)]),
    )
    def lose(self, used: bool, dies: tuple[int, ...], done: tuple[int, ...]) -> None:
        """The link is lost, who ``dies`` starts anew, who is ``done`` has read everything before the next session."""
        self.pair.lose()
        for process in self.processes:
            for _, loan, mark, length in process.serving:
                if loan is not None:  # whoever serves it does not know that nobody hears the answer
                    process.readers.append((loan, mark, length))
            process.serving.clear()
            process.kept += [(run, mark) for run, mark, _ in process.calls.values() if run is not None]
            process.calls.clear()
        for side in dies:
            self.processes[side] = Process()
            self.pair.bulks[side] = self.pair.fresh(side)
        for side in done:
            self.let_go(self.processes[side])
        self.pair.used = used
        self.pair.start()
        self.greet()

    def let_go(self, process: Process) -> None:
        for loan, mark, length in process.readers:
            check(loan.view, length, mark)
            loan.release()
        process.readers.clear()

    # --- the laws ---

    @invariant()
    def what_is_read_does_not_change(self) -> None:
        for process in getattr(self, "processes", []):
            for loan, mark, length in process.readers:
                check(loan.view, length, mark)

    def teardown(self) -> None:
        """When all is released and quiet, everything is free again."""
        if not hasattr(self, "pair"):
            return
        self.pair.used = True
        if not self.pair.bulks[HOST].active:
            self.lose(True, (), ())
        for _ in range(3):
            self.quiet()
            for side in (HOST, GUEST):
                while self.processes[side].serving:
                    self.answer(side, 0, 0)
                for run, _ in self.processes[side].kept:
                    run.give_back()
                self.processes[side].kept.clear()
                self.let_go(self.processes[side])
        self.quiet()
        assert [process.calls for process in self.processes] == [{}, {}]
        assert self.pair.free() == [FEW, FEW]
        assert not any(bulk.in_use for bulk in self.pair.bulks)

    def quiet(self) -> None:
        while any(session.has_output for session in self.pair.sessions):
            self.deliver(HOST)
            self.deliver(GUEST)


TestAnything = Anything.TestCase
TestAnything.settings = settings(stateful_step_count=60)
