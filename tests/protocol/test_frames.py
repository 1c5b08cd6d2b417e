from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.frames import MAX_HEADER, MAX_ITEMS, MAX_PAYLOAD, Frame, FrameDecoder, encode_frame

headers = st.lists(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text()
    | st.binary()
    | st.lists(st.integers(0)),
    max_size=6,
).filter(lambda header: all(not isinstance(item, list) or all(n < 2**64 for n in item) for item in header))
frames = st.lists(st.tuples(headers, st.binary(max_size=2000)), max_size=8)


def wire(header: list[Any], payload: bytes = b"") -> bytes:
    return b"".join(encode_frame(header, payload))


def raw(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(payload)) + header + payload


def decode_all(decoder: FrameDecoder) -> list[Frame]:
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    return frames


def test_the_layout() -> None:
    assert wire([12, 3], b"abc") == b"\0\0\0\3" + b"\0\0\0\3" + b"\x92\x0c\x03" + b"abc"


def test_a_payload_is_not_copied() -> None:
    payload = b"x" * 1000
    assert encode_frame([1], payload)[1] is payload


@given(frames, st.data())
def test_any_split_gives_the_same_frames(sent: list[tuple[list[Any], bytes]], data: st.DataObject) -> None:
    stream = b"".join(wire(*frame) for frame in sent)
    decoder, received, position = FrameDecoder(), [], 0
    while position < len(stream):
        size = data.draw(st.integers(1, max(1, len(stream) - position)))
        decoder.receive_data(stream[position : position + size])
        received += decode_all(decoder)
        position += size
    assert received == [Frame(header, payload) for header, payload in sent]
    assert decoder.buffered == 0


def test_text_that_is_no_utf8_crosses_unharmed() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    decoder = FrameDecoder()
    decoder.receive_data(wire([name]))
    assert decode_all(decoder) == [Frame([name], b"")]


@pytest.mark.parametrize(
    "prefix",
    [
        (0, 0),
        (0, 100),
        (MAX_HEADER + 1, 0),
        (2**32 - 1, 0),
        (1, MAX_PAYLOAD + 1),
        (1, 2**32 - 1),
    ],
)
def test_a_lie_about_lengths_costs_eight_bytes(prefix: tuple[int, int]) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(wire([1]) + struct.pack(">II", *prefix))
    assert decoder.next_frame() == Frame([1], b"")
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            decoder.next_frame()
    assert decoder.buffered == 8


def test_no_more_than_one_frame_is_kept() -> None:
    decoder = FrameDecoder()
    frame = wire([12, 1], b"x" * 100)
    for _ in range(1000):
        decoder.receive_data(frame)
        decode_all(decoder)
    decoder.receive_data(frame[:50])
    assert decoder.next_frame() is None
    assert decoder.buffered == 50
    assert len(decoder._buffer) == 50


def test_the_payload_limit_is_the_sessions_own() -> None:
    decoder = FrameDecoder(max_payload=10)
    decoder.receive_data(raw(msgpack.packb([1]), b"x" * 11))
    with pytest.raises(RemoteProtocolError, match="payload of 11"):
        decoder.next_frame()


@pytest.mark.parametrize(
    "header",
    [
        b"\xc1",  # never used
        b"\x92\x01",  # too short
        b"\x91\x01\x01",  # too long
        b"\x91" * 2000,  # too deep, and never ends
        b"\x91" * 60_000 + b"\x01",  # too deep
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32-1
        b"\xdf\xff\xff\xff\xff",  # a map of 2**32-1
        b"\xdb\xff\xff\xff\xff",  # text of 4 GiB
        b"\xc6\xff\xff\xff\xff",  # binary of 4 GiB
        b"\xdd" + struct.pack(">I", MAX_ITEMS + 1) + b"\xc0" * (MAX_ITEMS + 1),
        b"\x81\x01\x01",  # a key that is no text
        b"\x81\x90\x01",  # a key that is not hashable
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc7\x05\x01abcde",  # an extension
    ],
)
def test_what_is_no_msgpack_is_a_clean_error(header: bytes) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(raw(header))
    with pytest.raises(RemoteProtocolError, match="not msgpack"):
        decoder.next_frame()


@given(st.binary(max_size=200))
def test_garbage_gives_frames_or_a_clean_error(header: bytes) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(raw(header))
    try:
        decoder.next_frame()
    except RemoteProtocolError:
        assert decoder.buffered == 8 + len(header)  # nothing of the bad frame was taken


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        ([2**64], b""),
        ([object()], b""),
        (["\ud800"], b""),
        (["x" * MAX_HEADER], b""),
        ([1], b"x" * (MAX_PAYLOAD + 1)),
    ],
)
def test_what_cannot_be_sent_is_our_own_error(header: list[Any], payload: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(header, payload)
