from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fileserver import snapshots
from fileserver.linux import DirectoryEntry
from fileserver.snapshots import Snapshots, position, take
from protocol.files import DIRENT
from tests.fileserver.served import records

NAMES = st.sets(
    st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name)
)


def entries(names: set[bytes]) -> list[DirectoryEntry]:
    return [DirectoryEntry(index, 8, name) for index, name in enumerate(sorted(names), 1)]


@given(NAMES, st.integers(min_value=DIRENT.size + 256, max_value=4096))
def test_pieces_of_any_size_make_the_whole(names: set[bytes], limit: int) -> None:
    snapshot = take(entries(names), lambda ino: ino)
    found: list[bytes] = []
    after, end = 0, False
    while not end:
        block, piece, end = snapshot.piece(after, limit)
        assert len(block) <= limit
        assert [name for _, _, _, name in records(block)] == piece
        found += piece
        after = records(block)[-1][1] if block else after
    assert sorted(found) == sorted(names)


def test_a_position_depends_on_the_name_only() -> None:
    assert position(b"hosts") == 0xDE9ADAC175A2FB0  # whatever process computes it
    one = take(entries({b"a", b"b", b"c"}), int)
    two = take(entries({b"b", b"x", b"y"}), int)
    assert one.positions[one.names.index(b"b")] == two.positions[two.names.index(b"b")]


def test_names_of_one_hash_have_different_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "position", lambda name: 7)
    snapshot = take(entries({b"a", b"b", b"c"}), int)
    assert (snapshot.positions, snapshot.names) == ([7, 8, 9], [b"a", b"b", b"c"])
    assert snapshot.piece(7, 1000)[1] == [b"b", b"c"]


def test_what_weighs_too_much_is_dropped_first_used_first(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = take(entries({b"a"}), int)
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOT_BYTES", snapshot.weight * 2)
    kept = Snapshots()
    kept.keep((1, 1), snapshot)
    kept.keep((1, 2), snapshot)
    assert kept.get((1, 1)) is snapshot
    kept.keep((1, 3), snapshot)
    assert kept.get((1, 2)) is None
    kept.drop((1, 1))
    kept.keep((1, 4), snapshot)
    assert all(kept.get((1, handle)) for handle in (3, 4))


def test_so_many_streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOTS", 3)
    kept, snapshot = Snapshots(), take((), int)
    for handle in range(10):
        kept.keep((1, handle), snapshot)
    assert [handle for handle in range(10) if kept.get((1, handle))] == [7, 8, 9]
    kept.clear()
    assert kept.get((1, 9)) is None
