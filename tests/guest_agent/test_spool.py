"""What is kept beyond the end of its process: whole, in order, and only what may be outstanding."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from guest_agent import spool
from guest_agent.spool import KEPT, MOST, START, Left, Spool


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(START))
    return path


def opened(path: Path) -> Spool:
    return Spool(os.open(path, os.O_RDWR))


def records(path: Path, landed: int, answered: int) -> list[int]:
    return [record.ticket for record in opened(path).left(landed, answered)]


def test_a_successor_finds_what_may_be_outstanding(path: Path) -> None:
    it = opened(path)
    for ticket in range(1, 6):
        assert it.keep(ticket, b"call %d" % ticket, memoryview(b"payload"))
    assert opened(path).left(0, 5)[3] == Left(4, b"call 4", b"payload")
    assert records(path, 0, 5) == [1, 2, 3, 4, 5]
    assert records(path, 2, 4) == [3, 4]
    assert records(path, 5, 5) == []


def test_what_was_never_answered_for_is_not_there(path: Path) -> None:
    it = opened(path)
    it.keep(1, b"call", b"")
    it.keep(2, b"killed before it was published", b"")
    assert records(path, 0, 1) == [1]


def test_the_next_begins_at_the_beginning_once_all_has_landed(path: Path) -> None:
    it = opened(path)
    for ticket in range(1, 6):
        it.keep(ticket, b"an old call", b"payload")
    it.clear()
    it.keep(6, b"new", b"")
    assert records(path, 5, 6) == [6], "what is behind it is of before"
    assert records(path, 4, 6) == [6]


@pytest.mark.parametrize("seed", range(10))
def test_old_records_are_never_taken_for_new_ones(path: Path, seed: int) -> None:
    chance, it, ticket = random.Random(seed), opened(path), 0
    for _ in range(30):
        it.clear()
        landed = ticket
        for _ in range(chance.randrange(1, 8)):
            ticket += 1
            assert it.keep(ticket, b"c" * chance.randrange(20), bytes(chance.randrange(30)))
        assert records(path, landed, ticket) == list(range(landed + 1, ticket + 1))


def test_a_successor_keeps_behind_what_it_found(path: Path) -> None:
    opened(path).keep(1, b"first", b"")
    it = opened(path)
    it.left(0, 1)
    it.keep(2, b"second", b"")
    assert records(path, 0, 2) == [1, 2]


def test_a_record_that_was_cut_short_is_none(path: Path) -> None:
    it = opened(path)
    it.keep(1, b"call", b"payload")
    it.keep(2, b"call", b"payload")
    os.truncate(path, path.stat().st_size - 1)
    assert records(path, 0, 2) == [1]


def test_there_is_room_for_so_much(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MOST", 100)
    it = opened(path)
    assert it.keep(1, b"", bytes(60))
    assert not it.keep(2, b"", bytes(60))
    assert it.keep(2, b"", bytes(8))
    it.clear()
    assert it.keep(3, b"", bytes(60))
    assert MOST > 2 * KEPT


def test_memory_is_given_back(path: Path) -> None:
    it = opened(path)
    it.keep(1, b"", bytes(KEPT + 100))
    it.clear()
    assert path.stat().st_size == START + KEPT


def test_a_full_filesystem_leaves_no_record(path: Path) -> None:
    it = Spool(os.open("/dev/full", os.O_RDWR))
    assert not it.keep(1, b"call", b"payload")
