from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import execio
from protocol.errors import DecodeError, LocalProtocolError

data = st.binary(max_size=300)
packets = st.one_of(
    st.builds(execio.Stdin, data),
    st.just(execio.StdinEof()),
    st.builds(execio.Stdout, data),
    st.builds(execio.Stderr, data),
    st.builds(execio.Resize, st.integers(0, 65535), st.integers(0, 65535)),
    st.builds(execio.Signal, st.integers(0, 255)),
    st.builds(execio.Exit, st.integers(-(2**31), 2**31 - 1)),
)


@pytest.mark.parametrize(
    ("packet", "wire"),
    [
        (execio.Stdin(b"ls\n"), b"\x01\0\0\0\x03ls\n"),
        (execio.StdinEof(), b"\x02\0\0\0\0"),
        (execio.Stdout(b"x"), b"\x03\0\0\0\x01x"),
        (execio.Stderr(b"y"), b"\x04\0\0\0\x01y"),
        (execio.Resize(24, 80), b"\x05\0\0\0\x04\0\x18\0\x50"),
        (execio.Signal(15), b"\x06\0\0\0\x01\x0f"),
        (execio.Exit(137), b"\x07\0\0\0\x04\0\0\0\x89"),
        (execio.Exit(-1), b"\x07\0\0\0\x04\xff\xff\xff\xff"),
    ],
)
def test_the_layout(packet: execio.Packet, wire: bytes) -> None:
    assert execio.encode(packet) == wire
    assert execio.Decoder().receive_data(wire) == [packet]


@given(st.lists(packets, max_size=10), st.lists(st.integers(1, 50), min_size=1))
def test_any_split_gives_the_same_packets(sent: list[execio.Packet], sizes: list[int]) -> None:
    stream = b"".join(map(execio.encode, sent))
    decoder, received, position, turn = execio.Decoder(), [], 0, 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        received += decoder.receive_data(stream[position : position + size])
        position, turn = position + size, turn + 1
    decoder.receive_eof()
    assert received == sent


@pytest.mark.parametrize(
    "wire",
    [
        b"\x00\0\0\0\0",
        b"\x08\0\0\0\0",
        b"\x01\xff\xff\xff\xff",
        b"\x03\0\0\x80\x01",
        b"\x02\0\0\0\x01",
        b"\x05\0\0\0\x03",
        b"\x07\0\0\0\0",
    ],
)
def test_a_lie_is_found_in_the_head(wire: bytes) -> None:
    with pytest.raises(DecodeError):
        execio.Decoder().receive_data(wire)


def test_an_end_within_a_packet_is_an_error() -> None:
    decoder = execio.Decoder()
    decoder.receive_data(execio.encode(execio.Stdout(b"abc"))[:-1])
    with pytest.raises(DecodeError, match="middle of a packet"):
        decoder.receive_eof()


@pytest.mark.parametrize(
    "packet",
    [
        execio.Stdin(b"x" * (execio.MAX_DATA + 1)),
        execio.Resize(65536, 1),
        execio.Resize(-1, 1),
        execio.Signal(256),
        execio.Exit(2**31),
    ],
)
def test_what_does_not_fit_is_our_own_error(packet: execio.Packet) -> None:
    with pytest.raises(LocalProtocolError):
        execio.encode(packet)


@given(st.binary(max_size=100))
def test_garbage_is_packets_or_a_clean_error(wire: bytes) -> None:
    try:
        received = execio.Decoder().receive_data(wire)
    except DecodeError:
        return
    assert wire.startswith(b"".join(map(execio.encode, received)))
