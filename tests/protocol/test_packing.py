from __future__ import annotations

import contextlib
import os
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import resync
from protocol.compression import MAX_BLOCK, codecs
from protocol.errors import RemoteProtocolError
from protocol.packing import ACK, FILL, MAGIC, MOST_GAIN, PACKED, RAW, Packing
from protocol.worth import ACKNOWLEDGED, FIRST_SKIP, LEAST

TEXT = b"".join(b"def function_%d(self, argument: int) -> None: ...\n" % number for number in range(20_000))
NOISE = random.Random(1).randbytes(2 * MAX_BLOCK)
CODECS = sorted(codecs())


def block(kind: int, body: bytes) -> bytes:
    return struct.pack(">I", kind << 24 | len(body)) + body


def blocks(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        (head,) = struct.unpack_from(">I", data)
        end = 4 + (head & 0xFFFFFF)
        found.append((head >> 24, data[4:end]))
        data = data[end:]
    return found


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pair(one: list[str] | None = None, other: list[str] | None = None) -> tuple[Packing, Packing]:
    here, there = Packing(one, Clock()), Packing(other, Clock())
    assert here.receive(there.greeting) == there.receive(here.greeting) == b""
    assert here.ready
    assert there.ready
    return here, there


def test_the_layout() -> None:
    here, there = pair(["zlib"], ["zlib"])
    assert here.greeting == MAGIC + b"\x04zlib"
    assert here.encode(b"abc") == b"\1\0\0\3abc"
    ((kind, body),) = blocks(bytes(here.encode(TEXT[:4096])))
    assert (kind, body[:4]) == (PACKED, struct.pack(">I", 4096))
    assert there.receive(b"\1\0\0\3abc\3\0\0\2\0\0\1\0\0\1x") == b"abcx"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, LEAST - 1, LEAST, 65536, MAX_BLOCK, MAX_BLOCK + 1, len(TEXT)])
def test_what_is_sent_comes(codec: str, size: int) -> None:
    here, there = pair([codec], [codec])
    for data in (TEXT[:size], bytes(size), NOISE[:size], TEXT[-size:]):
        assert there.receive(bytes(here.encode(data))) == data


@pytest.mark.parametrize("codec", CODECS)
def test_text_becomes_less_and_small_pieces_learn_from_those_before(codec: str) -> None:
    here, _ = pair([codec], [codec])
    first = len(here.encode(TEXT[:65536]))
    assert first < 65536 / 4
    here.encode(TEXT[65536:66560])
    assert len(here.encode(TEXT[66560:67584])) < 1024 / 4


def test_what_does_not_shrink_is_left_alone_for_a_while_and_what_does_is_not() -> None:
    here, _ = pair()
    size = FIRST_SKIP // 2
    kinds = [blocks(bytes(here.encode(NOISE[at : at + size])))[0][0] for at in range(0, 8 * size, size)]
    assert kinds == [PACKED, RAW, RAW, PACKED, RAW, RAW, RAW, RAW]
    here, _ = pair()
    assert {blocks(bytes(here.encode(TEXT[:32768])))[-1][0] for _ in range(8)} == {PACKED}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([TEXT, NOISE, bytes(MAX_BLOCK)]), st.integers(1, 40_000), st.integers(0, 9000)
        ),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
    st.sampled_from([["zlib"], ["zstd", "zlib"], ["zstd"], [], ["other"]]),
    st.sampled_from([["zlib"], ["zlib", "zstd"], []]),
)
def test_however_it_is_split_and_whatever_each_side_has(
    said: list[tuple[bytes, int, int]], rng: random.Random, one: list[str], other: list[str]
) -> None:
    here, there = Packing(one, Clock()), Packing(other, Clock())
    here.receive(there.greeting)
    pieces = [source[at : at + size] for source, size, at in said]
    wire = here.greeting + b"".join(bytes(here.encode(piece)) for piece in pieces)
    found, start = b"", 0
    while start < len(wire):
        end = start + rng.choice([1, 3, 100, 5000, 100_000])
        found += there.receive(wire[start:end])
        here.receive(there.acknowledgement())
        start = end
    assert found == b"".join(pieces)


def test_sides_without_a_codec_in_common_send_all_as_it_is() -> None:
    here, there = pair(["zlib"], [])
    for sender, receiver in ((here, there), (there, here)):
        sent = bytes(sender.encode(TEXT[:4096]))
        assert blocks(sent) == [(RAW, TEXT[:4096])]
        assert receiver.receive(sent) == TEXT[:4096]


def test_each_direction_takes_the_receivers_first_that_the_sender_has() -> None:
    if "zstd" not in CODECS:
        pytest.skip("no libzstd")
    here, there = pair(["zstd", "zlib"], ["zlib", "zstd"])
    magic = b"\x28\xb5\x2f\xfd"  # of a frame of zstd (RFC 8878)
    assert bytes(here.encode(TEXT[:4096]))[8:12] != magic
    assert bytes(there.encode(TEXT[:4096]))[8:12] == magic


# --- a peer that does not know of it -----------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", b"Welcome!\r\n", bytes(200_000)])
def test_a_peer_that_begins_with_a_preamble_is_spoken_to_as_it_is(before: bytes) -> None:
    here = Packing()
    words = resync.preamble(b"n" * 8, resync.UNKNOWN)
    found = b"".join(here.receive((before + words)[at : at + 5]) for at in range(0, len(before + words), 5))
    assert found.endswith(words)
    assert here.is_plain
    assert here.ready
    assert here.encode(TEXT) is TEXT
    assert here.receive(MAGIC) == MAGIC
    assert here.acknowledgement() == b""


def test_our_greeting_is_nothing_to_such_a_peer() -> None:
    peer = resync.Resync()
    peer.begin(b"p" * 8, 0.0)
    peer.receive_data(Packing().greeting + resync.preamble(b"n" * 8, b"p" * 8))
    assert peer.state is resync.State.ESTABLISHED


def test_noise_before_a_greeting_is_dropped_and_a_preamble_in_the_first_block_is_no_greeting() -> None:
    here, there = Packing(), Packing()
    there.receive(here.greeting)
    words = resync.preamble(b"n" * 8, resync.UNKNOWN)
    assert here.receive(b"Last login: yesterday\r\n" + there.greeting + there.encode(words)) == words
    assert not here.is_plain


# --- a peer that means harm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("said", [1, 4095, 4097, MAX_BLOCK])
def test_bytes_that_are_not_as_many_as_was_said(codec: str, said: int) -> None:
    here, there = pair([codec], [codec])
    ((_, body),) = blocks(bytes(here.encode(NOISE[:4096])))
    with pytest.raises(RemoteProtocolError):
        there.receive(block(PACKED, struct.pack(">I", said) + body[4:]))


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb(codec: str) -> None:
    here, there = pair([codec], [codec])
    sent = blocks(bytes(here.encode(bytes(MAX_BLOCK))))
    assert [kind for kind, _ in sent] == [FILL, PACKED]
    assert sum(4 + len(body) for _, body in sent) >= MAX_BLOCK / MOST_GAIN
    with pytest.raises(RemoteProtocolError, match="that are to be"):
        there.receive(block(*sent[1]))


def test_what_was_filled_counts_for_one_block() -> None:
    here, there = pair()
    filling, packed = blocks(bytes(here.encode(bytes(MAX_BLOCK))))
    there.receive(block(*filling) + block(*packed))
    with pytest.raises(RemoteProtocolError):
        there.receive(block(*packed))


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_damage_is_an_error_or_the_bytes_of_that_length(codec: str, data: st.DataObject) -> None:
    here, there = pair([codec], [codec])
    wire = bytearray(here.encode(TEXT[:3000]) + here.encode(TEXT[3000:9000]))
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = there.receive(bytes(wire))
    except RemoteProtocolError:
        return
    assert len(found) <= MOST_GAIN * len(wire)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=2000), st.binary(max_size=40))
def test_anything_ends_in_bytes_or_an_error(garbage: bytes, more: bytes) -> None:
    _, there = pair()
    with contextlib.suppress(RemoteProtocolError):
        assert len(there.receive(garbage) + there.receive(more)) <= MOST_GAIN * len(garbage + more)


@pytest.mark.parametrize(
    "wire",
    [
        block(0, b""),
        block(9, b"x"),
        block(PACKED, b"abc"),
        block(PACKED, struct.pack(">I", 0) + b"abc"),
        block(PACKED, struct.pack(">I", 5)),
        block(ACK, b"abc"),
        block(ACK, struct.pack(">I", 1)),
        struct.pack(">I", RAW << 24 | MAX_BLOCK + 1),
        struct.pack(">I", FILL << 24 | 0xFFFFFF),
        struct.pack(">I", ACK << 24 | 5),
    ],
)
def test_what_cannot_be_right(wire: bytes) -> None:
    _, there = pair()
    with pytest.raises(RemoteProtocolError):
        there.receive(wire)


def test_a_packed_block_where_no_codec_was_agreed_on() -> None:
    _, there = pair(["zlib"], [])
    with pytest.raises(RemoteProtocolError, match="no codec"):
        there.receive(block(PACKED, struct.pack(">I", 5) + b"abc"))


def test_memory_is_bounded_by_one_block_however_long_a_block_is_said_to_be() -> None:
    _, there = pair()
    there.receive(struct.pack(">I", RAW << 24 | MAX_BLOCK))
    for _ in range(63):
        assert there.receive(bytes(MAX_BLOCK // 64)) == b""
    assert len(there.receive(bytes(MAX_BLOCK // 64))) == MAX_BLOCK


# --- acknowledgements ----------------------------------------------------------------------------------------


def test_what_has_come_is_acknowledged_and_acknowledgements_are_not() -> None:
    here, there = pair()
    sent = bytes(here.encode(os.urandom(MAX_BLOCK)))
    there.receive(sent[: ACKNOWLEDGED // 2])
    assert there.acknowledgement() == b""
    there.receive(sent[ACKNOWLEDGED // 2 :])
    words = there.acknowledgement()
    assert blocks(words) == [(ACK, struct.pack(">I", len(sent)))]
    assert there.acknowledgement() == b""
    for _ in range(2 * ACKNOWLEDGED // len(words)):
        here.receive(block(ACK, struct.pack(">I", 0)))
    assert here.acknowledgement() == b""
    assert here.receive(words) == b""


def test_how_fast_the_way_is_decides() -> None:
    clock = Clock()
    here, there = Packing(None, clock), Packing(None, clock)
    here.receive(there.greeting)
    there.receive(here.greeting)
    here.worth.packed(1 << 20, 1 << 18, 0.01)  # a codec that takes in 100 MB/s
    here.worth.is_off = True
    for size, seconds, packs in ((MAX_BLOCK, 0.001, False), (MAX_BLOCK, 0.2, True)):
        sent = bytes(here.encode(NOISE[:size]))
        clock.now += seconds
        there.receive(sent)
        here.receive(there.acknowledgement())
        assert (blocks(bytes(here.encode(TEXT[:4096])))[0][0] == PACKED) is packs
