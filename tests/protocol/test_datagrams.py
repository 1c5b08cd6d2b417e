from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.datagrams import MAX_DATAGRAM, DatagramReader, encode
from protocol.errors import DecodeError

DATAGRAMS = st.lists(st.binary(max_size=300), max_size=8)


@given(DATAGRAMS, st.lists(st.integers(0, 400), max_size=20))
def test_any_split_gives_the_same_datagrams(datagrams: list[bytes], cuts: list[int]) -> None:
    wire, reader, seen = encode(datagrams), DatagramReader(), []
    for cut in cuts:
        seen += reader.receive_data(wire[:cut])
        wire = wire[cut:]
    seen += reader.receive_data(memoryview(wire))
    assert seen == datagrams
    assert reader.complete


def test_an_empty_datagram_is_one() -> None:
    assert DatagramReader().receive_data(encode([b"", b"a"])) == [b"", b"a"]


def test_the_longest_passes_and_what_is_longer_is_an_error() -> None:
    longest = bytes(MAX_DATAGRAM)
    assert DatagramReader().receive_data(encode([longest])) == [longest]
    with pytest.raises(DecodeError, match="65508 bytes"):
        DatagramReader().receive_data((MAX_DATAGRAM + 1).to_bytes(2, "big"))


def test_a_piece_is_not_complete() -> None:
    reader = DatagramReader()
    assert reader.receive_data(encode([b"abc"])[:-1]) == []
    assert not reader.complete
