"""What is looked up for a guest that was told of a change, and that nothing of it is told once it may be wrong."""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from fileserver import fanotify
from fileserver.nodes import Node, Shared, move
from fileserver.renewal import (
    A_SECOND,
    MAX_CONTENT,
    MOST,
    Allowance,
    Wanted,
    counted,
    find,
    give_back,
    settle,
    wanted,
)
from fileserver.retractions import Retractions
from fileserver.telling import Telling
from fileserver.watches import Changes
from protocol.files import ROOT, SET_MODE, Changed, Read, Renewed, SetAttributes, SetXattr, Write
from protocol.link import Link
from tests.fileserver.served import Served, attr, serving
from tests.fileserver.test_retractions import DIRECTORY, ROOT_NODE, TABLE, made
from tests.fileserver.watched import Watched

SHARE = 7
CLOSED = fanotify.OPEN | fanotify.MODIFY | fanotify.CLOSE_WRITE


def has(number: int, *, data: bool = False, given: int = 0) -> Node:
    """A file of which the guest has something."""
    node = made(number, stat.S_IFREG, (2, b"f"))
    node.base, node.given = ((1, 2, 3) if data else None), given
    return node


def looked_up(changes: Changes, **table: Node) -> Wanted | None:
    names = TABLE | {(2, name.encode()): node for name, node in table.items()}
    return wanted(changes, Retractions(names).of(changes))


# --- what is looked up ---------------------------------------------------------------------------------


def test_what_the_guest_had_of_a_file() -> None:
    assert looked_up(Changes(files={has(3, data=True): CLOSED})) == Wanted(files=[(3, True)])
    assert looked_up(Changes(files={has(3, given=1): fanotify.ATTRIB})) == Wanted(files=[(3, False)])
    assert looked_up(Changes(files={has(3): CLOSED})) is None


@pytest.mark.parametrize("mask", [fanotify.MODIFY, fanotify.OPEN | fanotify.MODIFY, fanotify.OPEN])
def test_nothing_of_a_file_that_is_being_written(mask: int) -> None:
    assert looked_up(Changes(files={has(3, data=True): mask})) is None


def test_names_that_the_guest_had_and_their_directory() -> None:
    replaced = has(3, data=True)
    changes = Changes(names={DIRECTORY: {b"f", b"draft"}}, files={replaced: fanotify.ATTRIB})
    assert looked_up(changes, f=replaced) == Wanted([2], [(2, b"f", True)], [(3, True)])
    assert looked_up(Changes(names={DIRECTORY: {b"f"}}), f=has(3)) == Wanted([2], [(2, b"f", False)], [])
    assert looked_up(Changes(names={ROOT_NODE: {b"new"}})) == Wanted([ROOT])
    assert looked_up(Changes(selves={DIRECTORY})) == Wanted([2])


def test_of_many_changes_nothing() -> None:
    few = {has(number, data=True): CLOSED for number in range(10, 10 + MOST)}
    assert looked_up(Changes(files=few)) is not None
    assert looked_up(Changes(files={**few, has(3, data=True): CLOSED})) is None
    names = {b"%d" % number for number in range(3 * MOST)}
    assert looked_up(Changes(names={DIRECTORY: names})) is None, "though none of them is known"


def test_not_too_often() -> None:
    now = 0.0
    allowance = Allowance(lambda: now)
    assert [allowance.take() for _ in range(A_SECOND + 1)] == [True] * A_SECOND + [False]
    now = 2.5 / A_SECOND
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    now = 60.0
    assert [allowance.take() for _ in range(A_SECOND + 1)] == [True] * A_SECOND + [False]


# --- what is told --------------------------------------------------------------------------------------


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "f").write_text("content")
    (tmp_path / "d").mkdir()
    with serving(tmp_path, watches=Watched()) as served:
        yield served


def told(
    share: Served, want: Wanted, meanwhile: Callable[[], object] = lambda: None
) -> tuple[Renewed, list[int]]:
    """What is told if ``meanwhile`` happens between looking and telling."""
    found = find(share.tree, SHARE, want)
    meanwhile()
    return settle(found, SHARE, share.tree.promised)


def test_a_name_with_its_file_and_directory(share: Served) -> None:
    renewed, in_vain = told(share, Wanted([ROOT], [(ROOT, b"f", True), (ROOT, b"d", False)]))
    file, directory = share.node("f"), share.node("d")
    assert renewed.nodes == [ROOT, file, directory]
    assert [stat.S_IFMT(attr(one).mode) for one in _each(renewed)] == [
        stat.S_IFDIR,
        stat.S_IFREG,
        stat.S_IFDIR,
    ]
    assert (renewed.parents, renewed.names, renewed.entries) == ([ROOT] * 2, [b"f", b"d"], [file, directory])
    assert (renewed.files, renewed.contents) == ([file], [b"content"])
    assert in_vain == []
    assert share.journal.records[file].lookups == 2, "that one, and this test's"


def _each(renewed: Renewed) -> list[Any]:
    class Result:
        def __init__(self, attr: bytes) -> None:
            self.attr = attr

    return [Result(attributes) for attributes in renewed.attributes]


def test_a_file_that_was_replaced_is_still_read(share: Served, tmp_path: Path) -> None:
    old = share.node("f")
    share.ask(Read, old, 0, 100)
    (tmp_path / "draft").write_text("other")
    (tmp_path / "draft").rename(tmp_path / "f")
    share.tree.alarm_told(old)
    renewed, _ = told(share, Wanted([], [(ROOT, b"f", True)], [(old, True)]))
    new = share.node("f")
    assert renewed.nodes == [old, new]
    assert (renewed.files, renewed.contents) == ([old, new], [b"content", b"other"])
    assert (renewed.names, renewed.entries) == ([b"f"], [new])


def test_what_is_not_there_or_large_is_left_out(share: Served, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(MAX_CONTENT + 1))
    large = share.node("large")
    renewed, in_vain = told(share, Wanted([4711], [(ROOT, b"missing", True)], [(4712, True), (large, True)]))
    assert (renewed.nodes, renewed.files, in_vain) == ([large], [], [])


def test_what_has_changed_again_is_not_told(share: Served) -> None:
    node = share.node("f")
    table = share.tree._core.reach
    renewed, in_vain = told(share, Wanted([ROOT], [(ROOT, b"f", True)]), lambda: move(table.peek(node)))  # type: ignore[arg-type]
    assert (renewed.nodes, renewed.files, in_vain) == ([ROOT], [], [node])
    renewed, in_vain = told(share, Wanted([], [(ROOT, b"f", True)]), lambda: move(table.peek(ROOT)))  # type: ignore[arg-type]
    assert (renewed.entries, in_vain) == ([], [node])


OWN: dict[str, Callable[[Served, int], object]] = {
    "write": lambda share, node: share.ask(Write, node, 0, False, False, payload=b"other"),
    "chmod": lambda share, node: share.ask(SetAttributes, node, SET_MODE, 0o600, 0, 0, 0, 0, 0),
    "setxattr": lambda share, node: share.ask(SetXattr, node, b"user.x", b"y", 0),
}


@pytest.mark.parametrize("change", OWN.values(), ids=OWN)
@pytest.mark.parametrize("has_data", [False, True])
def test_what_the_guest_itself_changes_meanwhile_is_not_told(
    share: Served, change: Callable[[Served, int], object], has_data: bool
) -> None:
    node = share.node("f")
    if has_data:
        share.ask(Read, node, 0, 100)
        share.tree.alarm_told(node)  # as whoever tells of a change does
    renewed, _ = told(share, Wanted(files=[(node, True)]))
    assert (renewed.nodes, renewed.contents) == ([node], [b"content"])
    share.tree.alarm_told(node)
    renewed, _ = told(share, Wanted(files=[(node, True)]), lambda: change(share, node))
    assert (renewed.nodes, renewed.files) == ([], [])


def test_lookups_are_given_back(share: Served) -> None:
    node = share.node("f")
    found = find(share.tree, SHARE, Wanted(names=[(ROOT, b"f", True)]))
    assert counted(found) == [node]
    assert share.journal.records[node].lookups == 2
    give_back(share.tree, SHARE, counted(found))
    assert share.journal.records[node].lookups == 1


# --- to whom -------------------------------------------------------------------------------------------


class Session:
    def __init__(self) -> None:
        self.posted: list[Changed | Renewed] = []

    def post(self, notice: Changed | Renewed) -> None:
        self.posted.append(notice)


async def test_only_the_session_that_was_told_of_the_change_is_told_how_it_is(share: Served) -> None:
    waiting: deque[Callable[[], object]] = deque()
    found: list[Any] = []
    telling = Telling(SHARE, waiting.append, lambda retraction: None, lambda *both: found.append(both))
    telling.tree = share.tree
    share.ask(Read, node := share.node("f"), 0, 100)
    session, other = Session(), Session()
    file = share.tree._core.reach.peek(node)
    root = share.tree._core.reach.peek(ROOT)
    assert file is not None
    assert root is not None
    for link in (session, other):
        share.ask(Read, node, 0, 100)
        telling.changed(cast(Link, session), Changes(names={root: {b"f"}}))
        waiting.popleft()()
        [(asked, what)] = found
        found.clear()
        telling.renew(cast(Link, link), asked, what)
    assert [type(notice) for notice in session.posted] == [Changed, Renewed, Changed]
    assert not other.posted
    assert share.journal.records[node].lookups == 3
    waiting.popleft()()
    assert not waiting
    assert share.journal.records[node].lookups == 2


async def test_where_it_can_be_done_at_once_no_thread_has_to(share: Served) -> None:
    waiting: deque[Callable[[], object]] = deque()
    answers = deque([True, False])

    def do_at_once(function: Callable[[], object]) -> bool:
        if answers[0]:
            function()
        return answers.popleft()

    telling = Telling(SHARE, waiting.append, lambda retraction: None, lambda *both: None, do_at_once)
    telling.tree = share.tree
    node = share.node("f")
    file = share.tree._core.reach.peek(node)
    assert file is not None
    session = Session()
    for threads in (1, 2):
        share.ask(Read, node, 0, 100)
        telling.changed(cast(Link, session), Changes(files={file: CLOSED}))
        assert len(waiting) == threads, "it was opened, and who writes it is looked at by a thread"
        waiting.clear()
    assert [type(notice) for notice in session.posted] == [Changed, Renewed, Changed]
    renewed = cast(Renewed, session.posted[1])
    assert renewed == Renewed(SHARE, [node], renewed.attributes, files=[node], contents=[b"content"])


def test_a_shared_file_is_not_told(share: Served) -> None:
    node = share.tree._core.reach.peek(share.node("f"))
    assert node is not None
    renewed, _ = told(
        share, Wanted(files=[(node.number, True)]), lambda: setattr(node, "shared", Shared.WITH_WRITERS)
    )
    assert (renewed.nodes, renewed.files) == ([], [])
