from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError
from protocol.resync import MAGIC, MAX_RECORD, PADDING, RETRY, UNKNOWN, Resync, State, preamble

A, A2, B, B2 = (bytes([number]) * 8 for number in (1, 2, 3, 4))


def begun(nonce: bytes = A) -> Resync:
    resync = Resync()
    resync.begin(nonce, 0.0)
    assert resync.data_to_send() == preamble(nonce, UNKNOWN)
    return resync


def established(nonce: bytes = A, peer: bytes = B) -> Resync:
    resync = begun(nonce)
    resync.receive_data(preamble(peer, nonce))
    assert resync.state is State.ESTABLISHED
    resync.data_to_send()
    return resync


def record(data: bytes, nonce: bytes = B) -> bytes:
    return b"".join(established(nonce, A).records(data))


def test_the_layout() -> None:
    assert preamble(A, B)[:24] == MAGIC + A + B
    assert len(preamble(A, B)) == 28
    assert record(b"abc") == b"\xd7\x00\x00\x03" + b"abc" + B


def test_two_sides_that_start_together() -> None:
    one, other = begun(A), begun(B)
    one.receive_data(preamble(B, UNKNOWN))
    other.receive_data(preamble(A, UNKNOWN))
    to_other, to_one = one.data_to_send(), other.data_to_send()
    assert (to_other, to_one) == (preamble(A, B), preamble(B, A))
    one.receive_data(to_one)
    other.receive_data(to_other)
    assert one.state is other.state is State.ESTABLISHED
    assert one.data_to_send() == other.data_to_send() == b""


def test_one_side_that_comes_later_is_answered_before_the_session_is_used() -> None:
    one, other = begun(A), begun(B)
    other.receive_data(preamble(A, UNKNOWN))
    one.receive_data(other.data_to_send())
    assert one.state is State.ESTABLISHED
    other.receive_data(one.data_to_send() + b"".join(one.records(b"hello")))
    assert other.state is State.ESTABLISHED
    assert other.read() == b"hello"


def test_nothing_but_preambles_before_the_echo() -> None:
    with pytest.raises(LocalProtocolError):
        list(begun().records(b"x"))


@pytest.mark.parametrize("nonce", [b"", b"short", UNKNOWN, b"x" * 9])
def test_a_nonce_is_eight_bytes(nonce: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        Resync().begin(nonce, 0.0)


@pytest.mark.parametrize(
    "past",
    [
        b"",
        bytes(1000),
        b"\xff" * 1000,
        MAGIC,
        MAGIC * 3,
        preamble(B2, A2),  # a dead peer talking to our dead predecessor
        preamble(B2, A2)[:20],
        preamble(B2, A2)[:-1] + b"?",
        preamble(B, UNKNOWN)[:9],
        record(b"old news") * 3,
        record(b"old news")[:-3],
        record(preamble(B2, UNKNOWN)),
    ],
)
def test_the_past_is_skipped(past: bytes) -> None:
    for step in (1, 7, 10_000):
        resync = begun()
        stream = past + preamble(B, A) + record(b"new")
        for position in range(0, len(stream), step):
            resync.receive_data(stream[position : position + step])
        assert resync.state is State.ESTABLISHED
        assert resync.read() == b"new"


def test_searching_keeps_no_garbage() -> None:
    resync = begun()
    for _ in range(100):
        resync.receive_data(b"\xf7garbage" * 1000)
    assert len(resync._raw) - resync._start < 28


def test_many_stale_preambles_get_one_answer() -> None:
    resync = begun()
    resync.receive_data(preamble(B2, A2) * 1000 + preamble(B, UNKNOWN))
    assert resync.data_to_send() == preamble(A, B)
    assert resync.data_to_send() == b""


def test_silence_is_answered_by_padding() -> None:
    resync = begun()
    assert resync.next_timeout() == RETRY
    resync.handle_timeout(RETRY / 2)
    assert resync.data_to_send() == b""
    resync.handle_timeout(RETRY)
    resync.handle_timeout(RETRY + 0.1)
    assert resync.data_to_send() == PADDING + preamble(A, UNKNOWN)
    assert resync.next_timeout() == 2 * RETRY
    assert established().next_timeout() == math.inf


def test_padding_ends_any_record() -> None:
    for cut in (1, 4, 100, MAX_RECORD, MAX_RECORD + 11):
        resync = established()
        resync.receive_data(record(b"x" * MAX_RECORD)[:cut] + preamble(B2, UNKNOWN))
        assert resync.read() == b""
        resync.receive_data(PADDING + preamble(B2, UNKNOWN))
        assert resync.state is State.LOST
        assert resync.read() == b""
        resync.begin(A2, 5.0)
        assert resync.data_to_send() == preamble(A2, B2)


def test_a_write_that_was_cut_is_padded_at_once() -> None:
    resync = Resync()
    resync.begin(A, 0.0, torn=True)
    assert resync.data_to_send() == PADDING + preamble(A, UNKNOWN)


def test_zeros_and_preambles_of_the_same_peer_mean_nothing_between_records() -> None:
    resync = established()
    noise = bytes(13) + preamble(B, A) + bytes(3)
    resync.receive_data(noise + record(b"one") + noise + record(b"two") + noise)
    assert resync.state is State.ESTABLISHED
    assert resync.read() == b"onetwo"


@pytest.mark.parametrize(
    "end",
    [
        preamble(B2, UNKNOWN),
        preamble(B2, A),
        b"\x01",
        b"{",
        b"\xd7\xff\xff\xff",
        record(b"x", B2),
        preamble(B, A)[:-1] + b"?",
    ],
)
def test_what_ends_a_session(end: bytes) -> None:
    resync = established()
    resync.receive_data(record(b"before") + end + record(b"after"))
    assert resync.state is State.LOST
    assert resync.read() == b"before"


def test_the_successors_preamble_is_found_in_what_the_session_left() -> None:
    resync = established()
    resync.receive_data(record(b"x" * 100)[:50] + preamble(B2, UNKNOWN) + bytes(200))
    resync.begin(A2, 0.0)
    assert resync.data_to_send() == preamble(A2, B2)


def test_read_takes_no_more_than_asked() -> None:
    resync = established()
    resync.receive_data(record(b"abcdef"))
    assert (resync.readable, resync.read(2), resync.read(), resync.read()) == (6, b"ab", b"cdef", b"")


def test_long_data_is_several_records() -> None:
    data = random.Random(1).randbytes(2 * MAX_RECORD + 5)
    records = list(established(B, A).records(data))
    assert len(records) == 3
    resync = established()
    for item in records:
        resync.receive_data(item)
    assert resync.read() == data


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=10), st.lists(st.integers(1, 200), min_size=1))
def test_any_split_gives_the_same_bytes(chunks: list[bytes], sizes: list[int]) -> None:
    resync = established()
    stream = b"".join(map(record, chunks))
    position = turn = 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        resync.receive_data(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert resync.read() == b"".join(chunks)
    assert resync.state is State.ESTABLISHED


@given(st.binary(max_size=400), st.booleans())
def test_garbage_never_raises_and_never_arrives(garbage: bytes, searching: bool) -> None:
    resync = begun() if searching else established()
    resync.receive_data(garbage)
    assert resync.read() == b""


# --- two sides, a pipe, and deaths at any moment -----------------------------------------------------


class Process:
    """One side: it may be killed and started again, and it sends words that name their writer."""

    def __init__(self, name: str, pipe: World) -> None:
        self.name, self.world = name, pipe
        self.lives = 0
        self.inbox = bytearray()
        self.start()

    def start(self) -> None:
        self.lives += 1
        self.resync = Resync()
        self.sessions = 0
        self.begin()

    def begin(self) -> None:
        self.sessions += 1
        self.words = 0
        self.heard = b""
        # Short, so that stale bytes look as much like fresh ones as they can.
        self.nonce = f"{self.name}{self.lives:03}{self.sessions:04}".encode()
        self.resync.begin(self.nonce, self.world.now)

    def step(self) -> None:
        """Act on what has happened, as the driver would."""
        if self.resync.state is State.LOST:
            self.begin()
        self.peer.inbox += self.resync.data_to_send()

    def say(self, size: int) -> None:
        if self.resync.state is State.ESTABLISHED and not self.resync._say:
            word = self.nonce + bytes([self.words % 256]) * size
            self.words += 1
            self.peer.inbox += b"".join(self.resync.records(word))
            self.world.said.setdefault((self.nonce, self.resync._peer), bytearray()).extend(word)

    def hear(self, count: int) -> None:
        data = bytes(self.inbox[:count])
        del self.inbox[:count]
        self.resync.receive_data(data)
        self.heard += self.resync.read()
        if self.heard:
            # All of it, in order, from one peer, and meant for this very session.
            said = self.world.said[self.resync._peer, self.nonce]
            assert said.startswith(self.heard)

    def die(self, cut: int) -> None:
        """Killed: the last bytes written are lost, those unread wait for the successor."""
        if cut:
            del self.peer.inbox[-min(cut, len(self.peer.inbox)) :]
        self.start()

    peer: Process


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.said: dict[tuple[bytes, bytes], bytearray] = {}
        self.sides = [Process("A", self), Process("B", self)]
        self.sides[0].peer, self.sides[1].peer = self.sides[1], self.sides[0]

    def operate(self, name: str, side: int, number: int) -> None:
        process = self.sides[side]
        match name:
            case "say":
                process.say(number % 300)
            case "hear":
                process.hear(number)
            case "die":
                process.die(number % 400)
            case "flood":
                process.hear(len(process.inbox))
            case "wait":
                self.now += number / 1000
                for each in self.sides:
                    each.resync.handle_timeout(self.now)
        for each in self.sides:
            each.step()

    def settle(self) -> bool:
        """Nobody dies any more: do both find each other?"""
        for _ in range(12):
            self.operate("wait", 0, 1100)
            for _ in range(4):
                for side in (0, 1):
                    self.operate("flood", side, 0)
            first, second = (side.resync for side in self.sides)
            if (first._peer, second._peer) == (second._nonce, first._nonce) and (
                first.state is second.state is State.ESTABLISHED
            ):
                return True
        return False


steps = st.tuples(
    st.sampled_from(["say", "say", "hear", "hear", "hear", "die", "flood", "wait"]),
    st.integers(0, 1),
    st.integers(0, 2000),
)


@given(st.lists(steps, max_size=60))
def test_deaths_at_any_moment(sequence: list[tuple[str, int, int]]) -> None:
    world = World()
    for name, side, number in sequence:
        world.operate(name, side, number)
    assert world.settle()
    for process in world.sides:
        process.say(100)
    for side in (0, 1):
        world.operate("flood", side, 0)
    for process in world.sides:
        assert process.heard.endswith(process.peer.nonce + bytes([(process.peer.words - 1) % 256]) * 100)
