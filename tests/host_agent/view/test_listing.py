from __future__ import annotations

import contextlib
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.view.listing import records
from protocol.files import ATTR, DIRENT, Listing

ATTRIBUTES = bytes(range(ATTR.size))


def dirent(name: bytes, position: int, length: int | None = None) -> bytes:
    raw = DIRENT.pack(1, position, len(name) if length is None else length, 8) + name
    return raw + bytes(-len(raw) % 8)


def test_names_with_their_attributes_and_positions() -> None:
    raw = dirent(b"one", 5) + dirent(b"eleven-char", 9)
    found = records(Listing(len(raw), True), raw + ATTRIBUTES + bytes(ATTR.size), 0)
    assert [tuple(record) for record in found] == [(b"one", ATTRIBUTES, 5), (b"eleven-char", b"", 9)]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"x" * 256])
def test_a_name_that_is_none_is_left_out(name: bytes) -> None:
    raw = dirent(name, 1) + dirent(b"fine", 2)
    assert [record.name for record in records(Listing(len(raw), True), raw, 0)] == [b"fine"]


@pytest.mark.parametrize(
    ("raw", "dirents", "after"),
    [
        (dirent(b"a", 3) + dirent(b"b", 3), None, 0),  # positions do not grow
        (dirent(b"a", 3), None, 3),
        (dirent(b"a", 1 << 63), None, 0),
        (dirent(b"a", 1, length=4000), None, 0),
        (dirent(b"a", 1)[:-1], None, 0),
        (dirent(b"a", 1), 1000, 0),
        (dirent(b"a", 1), -1, 0),
        (dirent(b"a", 1) + b"x" * 7, None, 0),
    ],
)
def test_what_is_no_listing_is_an_error(raw: bytes, dirents: int | None, after: int) -> None:
    with pytest.raises(OSError) as failed:
        records(Listing(len(raw) if dirents is None else dirents, True), raw, after)
    assert failed.value.errno == errno.EIO


@given(st.binary(max_size=400), st.integers(-10, 500), st.integers(0, 1 << 62))
def test_bytes_are_a_listing_or_an_error_and_never_anything_else(
    raw: bytes, dirents: int, after: int
) -> None:
    with contextlib.suppress(OSError):
        positions = [record.position for record in records(Listing(dirents, False), raw, after)]
        assert positions == sorted(set(positions))
