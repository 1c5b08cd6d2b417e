"""Whose pages are dropped for whom, and that nobody's are for who only looks at a file here and there."""

from __future__ import annotations

import pytest

from guest_agent.fuse import bare
from guest_agent.fuse.bare import FEW, FEWEST, MOST, USUAL, BarePages

MANY = list(range(10, 500))


def kept(nodes: list[int] = MANY) -> BarePages:
    """After find(1)."""
    pages = BarePages()
    for node in nodes:
        pages.keep(node, 20)
    return pages


def look_up(pages: BarePages, node: int, count: int = FEW) -> list[bool]:
    return [pages.looked_up(node) for _ in range(count)]


def test_a_few_lookups_in_one_directory_make_a_walk_and_no_more_than_one() -> None:
    pages = kept()
    assert look_up(pages, 10, 20) == [False] * (FEW - 1) + [True] + [False] * (20 - FEW)


def test_lookups_here_and_there_make_none() -> None:
    pages = kept()
    for _ in range(FEW - 1):
        assert not any(pages.looked_up(node) for node in MANY)


def test_what_the_kernel_has_more_of_than_names_is_nobodys_concern() -> None:
    pages = BarePages()
    for node in MANY:
        pages.keep(node, FEW - 1)
    assert not any(look_up(pages, 10))
    assert pages.drop(MANY) == []


def test_who_comes_as_foreseen_has_twice_as_many_dropped() -> None:
    pages = kept()
    rooms = []
    for _ in range(6):
        dropped = pages.drop(MANY)
        rooms.append(len(dropped))
        assert pages.is_foreseen(dropped[0])
        assert pages.came(dropped[0])
        assert not pages.is_foreseen(dropped[0])
    assert rooms == [USUAL, 2 * USUAL, 4 * USUAL, MOST, MOST, MOST]


def test_who_looks_up_names_there_without_reading_it_has_half_as_many() -> None:
    pages = kept()
    for _ in range(8):
        (first, *_) = pages.drop(MANY)
        assert not any(look_up(pages, first))
        assert not pages.is_foreseen(first)
    assert pages.room == FEWEST
    assert len(pages.drop(MANY)) == FEWEST


def test_each_is_dropped_once_until_it_is_read_as_names_again() -> None:
    pages = kept([10])
    assert pages.drop([10, 11]) == [10]
    assert pages.drop([10, 11]) == []
    pages.keep(10, 20)
    assert not pages.is_foreseen(10)
    assert pages.drop([10]) == [10]
    pages.keep(10, 0)
    assert pages.drop([10]) == []


def test_who_says_that_he_comes_is_not_taken_to_go_on() -> None:
    pages = kept()
    pages.expect(10)
    pages.expect(1000)
    assert pages.is_foreseen(10)
    assert not pages.is_foreseen(1000)
    assert not pages.came(10)
    assert not pages.is_foreseen(10)
    assert pages.room == USUAL


def test_of_what_is_forgotten_nothing_is_kept() -> None:
    pages = kept([10, 11, 12])
    pages.expect(12)
    pages.drop([10])
    pages.forget([10, 11, 12])
    assert not pages.is_foreseen(10)
    assert not pages.is_foreseen(12)
    assert pages.drop([10, 11, 12]) == []


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare, "MAX_KEPT", 20)
    monkeypatch.setattr(bare, "MAX_DROPPED", 5)
    pages = kept()
    dropped = pages.drop(MANY)
    assert dropped == MANY[-20:][:USUAL]
    assert [node for node in dropped if pages.is_foreseen(node)] == dropped[-5:]
