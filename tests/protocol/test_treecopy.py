"""A copy as bytes: what was written is read, and nothing else is believed."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import treecopy
from protocol.errors import DecodeError
from protocol.treecopy import Cut, Entry, Hole, Kind, encode, read_entry, read_piece

NAMES = st.binary(min_size=1, max_size=255).filter(lambda n: not set(n) & set(b"/\0") and n != b"..")
NUMBERS = st.integers(0, 2**64 - 1)
ENTRIES = st.builds(
    Entry,
    st.sampled_from(Kind),
    NAMES,
    st.integers(0, 2**32 - 1),
    st.integers(-(2**63), 2**63 - 1),
    NUMBERS,
    st.binary(max_size=4096).filter(lambda target: 0 not in target),
)


@given(st.lists(ENTRIES, max_size=5))
def test_what_was_written_is_read(entries: list[Entry]) -> None:
    stream = io.BytesIO(b"".join(map(encode, entries)))
    assert [read_entry(stream) for _ in entries] == entries
    with pytest.raises(Cut):
        read_entry(stream)


@given(ENTRIES)
def test_a_part_of_a_record_is_none(entry: Entry) -> None:
    data = encode(entry)
    for size in range(0, len(data), max(1, len(data) // 40)):
        with pytest.raises(Cut):
            read_entry(io.BytesIO(data[:size]))


@pytest.mark.parametrize("name", [b"..", b"a/b", b"/", b"a\0b"])
def test_names_lead_nowhere_else(name: bytes) -> None:
    with pytest.raises(DecodeError):
        read_entry(io.BytesIO(encode(Entry(Kind.FILE, name))))


@pytest.mark.parametrize("kind", [Kind.ENTER, Kind.FILE, Kind.SYMLINK, Kind.HARDLINK])
def test_what_needs_a_name_has_one(kind: Kind) -> None:
    with pytest.raises(DecodeError):
        read_entry(io.BytesIO(encode(Entry(kind))))


def test_what_nobody_writes_is_refused() -> None:
    for data in (b"\x63" + encode(Entry(Kind.END))[1:], encode(Entry(Kind.FILE, b"n" * 256))):
        with pytest.raises(DecodeError):
            read_entry(io.BytesIO(data))


def test_pieces_and_their_end() -> None:
    whole = treecopy.piece_head(3) + b"abc" + treecopy.hole(5) + treecopy.WHOLE
    stream = io.BytesIO(whole + treecopy.BROKEN)
    assert [read_piece(stream) for _ in range(4)] == [b"abc", Hole(5), True, False]
    for size in range(len(whole)):
        cut = io.BytesIO(whole[:size])
        with pytest.raises(Cut):
            while read_piece(cut) is not True:
                pass
    with pytest.raises(DecodeError):
        read_piece(io.BytesIO(treecopy.piece_head(treecopy.MAX_PIECE + 1)))
