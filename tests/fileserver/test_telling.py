"""What is remembered of what a guest was told, and what is doubted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, cast

import pytest
import trio
import trio.testing

from fileserver import fanotify
from fileserver.retractions import Name, Retraction, Retractions
from fileserver.telling import MAX_SAID, SAID_AGAIN, Telling
from fileserver.tree import Tree
from fileserver.watches import Changes
from protocol.files import ROOT, Changed
from protocol.link import Link
from tests.fileserver.test_retractions import DIRECTORY, FILE, ROOT_NODE, TABLE


class Told:
    """Link, tree and threads of a share."""

    def __init__(self) -> None:
        self.posted: list[Changed] = []
        self.looked: list[tuple[bool, bool]] = []
        self.seen: list[Any] = []
        self.waiting: deque[Callable[[], object]] = deque()
        self.during: Callable[[], None] = lambda: None
        self._retractions = Retractions(dict(TABLE))
        self.retract, self.retract_again = self._retractions.of, self._retractions.again
        self.telling = Telling(7, self.waiting.append, lambda retraction: None)
        self.telling.tree = cast(Tree, self)

    @property
    def link(self) -> Link:
        return cast(Link, self)

    def post(self, notice: Changed) -> None:
        self.posted.append(notice)

    def see_writers(self, nodes: list[Any]) -> None:
        self.seen += nodes

    def revalidate(self, tell: object, *, absences: bool, trusting: bool) -> None:
        self.looked.append((absences, trusting))
        during, self.during = self.during, lambda: None
        during()

    def work(self) -> None:
        while self.waiting:
            self.waiting.popleft()()


@pytest.fixture
def told() -> Told:
    return Told()


CHANGES = Changes(files={FILE: fanotify.MODIFY})


async def test_what_has_changed_is_told(told: Told) -> None:
    told.telling.changed(told.link, Changes(files={FILE: fanotify.OPEN}))
    assert not told.posted
    told.work()
    assert told.seen == [FILE]
    told.telling.changed(told.link, CHANGES)
    assert [notice.nodes for notice in told.posted] == [[FILE.number]]
    assert not told.waiting


async def test_each_session_begins_with_what_was_told_last(
    told: Told, autojump_clock: trio.testing.MockClock
) -> None:
    told.telling.changed(told.link, Changes(names={ROOT_NODE: {b"d"}}))
    await trio.sleep(SAID_AGAIN - 1)
    told.telling.changed(told.link, CHANGES)
    await trio.sleep(2)
    told.telling.tell(told.link, Retraction([Name(ROOT, b"was", DIRECTORY)]))
    told.posted.clear()
    for expected in ([FILE.number], [b"was"]), ([], []):
        told.telling.begin_session(told.link)
        assert [node for notice in told.posted for node in notice.nodes] == expected[0]
        assert [name for notice in told.posted for name in notice.names] == expected[1]
        told.posted.clear()
    told.work()
    assert told.looked == [(False, True)]


async def test_who_inherits_knows_nothing_for_certain(told: Told) -> None:
    told.telling.inherit()
    for _ in range(2):
        told.telling.begin_session(told.link)
        told.work()
    assert told.looked == [(False, False), (False, True)]


async def test_what_is_too_much_to_remember_is_doubted(told: Told) -> None:
    much = Retraction([Name(ROOT, b"%d" % number, None) for number in range(MAX_SAID // 2)])
    for expected in True, False:
        told.telling.tell(told.link, much)
        told.telling.tell(told.link, Retraction(much.names[: MAX_SAID // 2 - 1] if expected else much.names))
        told.telling.tell(told.link, Retraction(much.names[:1]))
        told.telling.begin_session(told.link)
        told.work()
        assert told.looked.pop() == (False, expected)


async def test_doubts_that_come_meanwhile_are_looked_into_as_well(told: Told) -> None:
    assert not told.telling.revalidating
    told.telling.begin_session(told.link)
    assert told.telling.revalidating
    told.telling.void()
    told.during = told.telling.void
    assert len(told.waiting) == 1
    told.work()
    assert told.looked == [(True, True), (True, True)]
    assert not told.telling.revalidating
    told.telling.void()
    told.work()
    assert len(told.looked) == 3


async def test_a_look_that_fails_is_not_the_last(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    told.during = fail
    told.telling.void()
    told.work()
    assert "not-revalidated" in caplog.text
    assert not told.telling.revalidating
    told.telling.void()
    told.work()
    assert len(told.looked) == 2


async def test_without_a_tree_there_is_nothing_to_tell(told: Told) -> None:
    told.telling.tree = None
    told.telling.changed(told.link, CHANGES)
    told.telling.begin_session(told.link)
    told.work()
    assert not told.posted
    assert not told.looked
