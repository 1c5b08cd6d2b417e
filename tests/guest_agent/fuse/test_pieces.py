"""One piece of a directory: where records begin and end, and what is no piece."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.fuse.pieces import Order, Piece
from tests.guest_agent.fuse.entries import DIRECTORY, Name, numbered, piece_of, placed, shown

NAMES = numbered(300)


def piece(names: list[Name], after: int = 0, most: int = 1 << 30) -> Piece:
    return Piece(after, 1, *piece_of(placed(names), after, most))


@given(
    names=st.sets(st.binary(min_size=1, max_size=255), min_size=1, max_size=30), size=st.integers(408, 5000)
)
def test_a_page_has_as_many_whole_records_as_there_is_room_for(names: set[bytes], size: int) -> None:
    one = piece([Name(name, 7) for name in names])
    index = 0
    while index < len(one.given):
        stop = one.stop(index, size)
        assert one.start(stop) - one.start(index) <= size
        if stop < len(one.given):
            assert one.start(stop + 1) - one.start(index) > size
        index = stop
    assert one.stop(index, size) == index


def test_records_in_all_their_parts() -> None:
    names = [Name(b"d", 8, DIRECTORY), Name(b"unknown"), *numbered(20)]
    one = piece(names)
    for index, (off, name) in enumerate(placed(names)):
        assert one.find(off - 1) == index
        assert one.named(index, name.name)
        assert not one.named(index, name.name + b"x")
        assert not one.named(index, name.name[:-1])
        assert one.entry(index) == name.entry
        assert one.attr(index) == name.attr
    assert one.directories == [8]
    assert (one.lowest, one.highest) == (8, 1019)
    files = [name for _, name in placed(numbered(20))]
    assert list(one.files()) == [(name.node, 12) for name in files]
    assert list(one.keyed_files(Order.NAME)) == [(name.name, name.node, 12) for name in files]
    assert list(one.keyed_files(Order.INODE)) == [(name.node + 1000, name.node, 12) for name in files]
    assert list(one.keyed_directories(Order.NAME)) == [(b"d", 8)]
    assert list(one.keyed_directories(Order.INODE)) == [(1008, 8)]


def test_beyond_its_end_only_the_last_one_knows() -> None:
    part, whole = piece(NAMES, most=10), piece(NAMES)
    assert part.find(part.offs[-1]) is None
    assert whole.find(whole.offs[-1]) == len(NAMES)
    assert piece([]).find(0) == 0


def test_nodes_are_left_out_where_they_were_given_or_are_in_doubt() -> None:
    one = piece(NAMES)
    one.given[3] = 1
    nodes = list(one.nodes)
    page = shown(one.without_nodes(2, 8, {nodes[5]}))
    assert [record.node for record in page] == [nodes[2], 0, nodes[4], 0, nodes[6], nodes[7]]
    assert list(one.given[:9]) == [0, 0, 1, 1, 1, 0, 1, 1, 0]
    assert sorted(one.left()) == sorted([nodes[0], nodes[1], nodes[5], *nodes[8:]])
    assert one.left() == []


@pytest.mark.parametrize("cut", [1, 21, 1000])
def test_what_is_no_piece(cut: int) -> None:
    listing, data = piece_of(placed(NAMES), 0)
    with pytest.raises(OSError) as error:
        Piece(0, 1, listing, data[:-cut])
    assert error.value.errno == errno.EIO


def test_a_page_that_is_too_small() -> None:
    with pytest.raises(OSError) as error:
        piece(NAMES).stop(0, 100)
    assert error.value.errno == errno.EIO
