"""Directories in memory: what is given, once, and what is given back; what is believed, and until when."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable, Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from guest_agent.fuse import directories
from guest_agent.fuse.directories import Directories, NameChange
from guest_agent.fuse.pieces import Order, Piece
from protocol.files import ATTR, Changed, position
from tests.guest_agent.fuse.entries import DIRECTORY, Name, numbered, piece_of, placed, shown

D = 5
FILE = ATTR.pack(9, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0)
FOLDER = ATTR.pack(9, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)


class Memory:
    """Of a mount, with the host's counts of lookups."""

    def __init__(self) -> None:
        self.returned: list[int] = []
        self.doubted: set[int] = set()
        self.directories = Directories(self.returned.extend, self._doubtful)

    def _doubtful(self, nodes: Sequence[int]) -> Collection[int]:
        return self.doubted & set(nodes)

    def learn(
        self,
        names: Sequence[Name],
        node: int = D,
        after: int = 0,
        most: int = 1 << 30,
        promise: int = 1,
        *,
        bare: bool = False,
    ) -> Piece:
        """Ask for a piece, and have it at once."""
        asked = self.directories.begin()
        piece = Piece(after, asked, *piece_of(placed(names), after, most, promise), bare=bare)
        self.directories.keep(node, piece)
        self.directories.end()
        return piece

    def learn_all(self, names: Sequence[Name], most: int, node: int = D) -> None:
        after = 0
        while not (piece := self.learn(names, node, after, most)).end:
            after = piece.offs[-1]

    def read(self, node: int = D, off: int = 0, size: int = 4096) -> list[tuple[bytes, int]]:
        """Names and nodes of a whole stream."""
        found: list[tuple[bytes, int]] = []
        while (at := self.directories.find(node, off)) is not None:
            records = shown(self.directories.page(*at, size))
            if not records:
                return found
            found += [(record.name, record.node) for record in records]
            off = records[-1].off
        raise AssertionError("not all of it is here")


def pairs(names: Sequence[Name]) -> list[tuple[bytes, int]]:
    return [(name.name, name.node) for _, name in placed(names)]


NAMES = numbered(300)


@pytest.mark.parametrize("most", [1, 7, 100, 1000])
@pytest.mark.parametrize("size", [200, 4096, 1 << 20])
def test_a_stream_is_given_each_node_once(most: int, size: int) -> None:
    memory = Memory()
    memory.learn_all(NAMES, most)
    assert memory.read(size=size) == pairs(NAMES)
    assert memory.read(size=size) == [(name, 0) for name, _ in pairs(NAMES)]
    memory.directories.drop(D)
    assert memory.returned == []
    assert memory.directories.held == 0


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_each_name_is_found_and_given_once(most: int) -> None:
    memory = Memory()
    memory.learn_all(NAMES, most)
    for name in NAMES:
        assert memory.directories.lookup(D, name.name) == name.entry
        assert memory.directories.lookup(D, name.name) is None
    assert {node for _, node in memory.read()} == {0}


def test_what_was_looked_up_is_not_given_by_a_page() -> None:
    memory = Memory()
    memory.learn(NAMES)
    memory.directories.lookup(D, b"name-7")
    memory.directories.lookup(D, b"name-200")
    expected = [(name, node if node not in (1007, 1200) else 0) for name, node in pairs(NAMES)]
    assert memory.read() == expected
    assert memory.directories.lookup(D, b"name-8") is None


def test_what_was_not_given_is_given_back() -> None:
    memory = Memory()
    memory.learn(NAMES)
    memory.directories.lookup(D, b"name-7")
    memory.directories.drop(D)
    assert sorted(memory.returned) == [name.node for name in NAMES if name.node != 1007]


@pytest.mark.parametrize(
    "absent", [b"name", b"name-", b"name-3000", b"x", b"name-7\0", b"NAME-7", b"\xff" * 255]
)
@pytest.mark.parametrize("most", [1, 13, 1000])
def test_a_name_that_is_not_there(absent: bytes, most: int) -> None:
    memory = Memory()
    memory.learn_all(NAMES, most)
    assert memory.directories.lookup(D, absent) == b""


def test_a_name_that_is_too_long_is_the_hosts_to_refuse() -> None:
    memory = Memory()
    memory.learn(NAMES)
    assert memory.directories.lookup(D, b"n" * 255) == b""
    assert memory.directories.lookup(D, b"n" * 256) is None


def test_nothing_is_known_of_names_beyond_what_is_here() -> None:
    memory = Memory()
    first = memory.learn(NAMES, most=100)
    for at, name in placed(NAMES):
        assert memory.directories.lookup(D, name.name) == (name.entry if at <= first.offs[-1] else None)
    absent = [b"absent-%d" % number for number in range(100)]
    for name_ in absent:
        expected = b"" if position(name_) < first.offs[-1] else None
        assert memory.directories.lookup(D, name_) == expected


def test_a_part_from_the_middle_says_what_it_says() -> None:
    memory = Memory()
    all_ = placed(NAMES)
    piece = memory.learn(NAMES, after=all_[99][0], most=100)
    for index, (_, name) in enumerate(all_):
        assert memory.directories.lookup(D, name.name) == (name.entry if 100 <= index < 200 else None)
    assert memory.directories.gap(D, all_[0][1].name) == 0
    assert memory.directories.gap(D, all_[150][1].name) == piece.after
    assert memory.directories.gap(D, all_[250][1].name) == piece.offs[-1]


def test_a_directory_that_is_not_here() -> None:
    memory = Memory()
    assert memory.directories.lookup(D, b"x") is None
    assert memory.directories.find(D, 0) is None
    assert memory.directories.gap(D, b"x") == 0
    assert not memory.directories.is_listable(D)
    assert D not in memory.directories


def test_an_empty_directory() -> None:
    memory = Memory()
    memory.learn([])
    assert memory.read() == []
    assert memory.directories.lookup(D, b"x") == b""
    assert memory.directories.is_listable(D)


def test_names_of_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """They follow each other, and may be in different pieces."""
    for module in ("guest_agent.fuse.directories", "tests.guest_agent.fuse.entries"):
        monkeypatch.setattr(f"{module}.position", lambda name: 10 + name[0] % 4)
    names = [Name(bytes([65 + number]), 100 + number) for number in range(12)]
    for most in (1, 2, 3, 4, 5, 12):
        memory = Memory()
        memory.learn_all(names, most)
        for name in names:
            assert memory.directories.lookup(D, name.name) in (name.entry, None)
        memory = Memory()
        memory.learn_all(names, 12)
        for name in names:
            assert memory.directories.lookup(D, name.name) == name.entry
        assert memory.directories.lookup(D, b"z") == b""


@given(
    names=st.sets(st.binary(min_size=1, max_size=255), max_size=40),
    others=st.sets(st.binary(min_size=1, max_size=255), max_size=40),
    most=st.integers(1, 20),
    data=st.data(),
)
def test_any_names(names: set[bytes], others: set[bytes], most: int, data: st.DataObject) -> None:
    memory = Memory()
    all_ = [Name(name, 100 + number, data.draw(st.sampled_from([4, 8]))) for number, name in enumerate(names)]
    memory.learn_all(all_, most)
    for name in all_:
        assert memory.directories.lookup(D, name.name) == name.entry
    for other in others - names:
        assert memory.directories.lookup(D, other) == b""
    assert memory.read(size=500) == [(name, 0) for name, _ in pairs(all_)]


# --- what is believed --------------------------------------------------------------------------------


def test_without_a_promise_nothing_is_known() -> None:
    memory = Memory()
    memory.learn([Name(b"a"), Name(b"b")], promise=0)
    assert memory.directories.lookup(D, b"a") is None
    assert memory.directories.lookup(D, b"x") is None
    assert not memory.directories.is_listable(D)
    assert memory.read() == pairs([Name(b"a"), Name(b"b")])


def test_a_name_of_which_nothing_is_promised_is_asked_for() -> None:
    memory = Memory()
    memory.learn([Name(b"a", 7), Name(b"b")])
    assert memory.directories.lookup(D, b"b") is None
    memory.directories.drop(D)
    assert memory.returned == [7]


def test_own_changes_of_names() -> None:
    memory = Memory()
    memory.learn(NAMES)
    memory.directories.name_changed(D, b"name-7", NameChange.UNLINKED)
    memory.directories.name_changed(D, b"new", NameChange.MADE)
    assert memory.directories.lookup(D, b"name-7") is None
    assert memory.directories.lookup(D, b"new") is None
    assert memory.directories.lookup(D, b"name-8") == NAMES[8].entry
    assert not memory.directories.is_listable(D)
    # Whoever is in the middle may go on.
    assert memory.directories.find(D, placed(NAMES)[50][0]) is not None
    memory.learn([*NAMES, Name(b"new", 99)])
    assert memory.directories.is_listable(D)
    assert memory.directories.lookup(D, b"new") == Name(b"new", 99).entry


def test_nodes_that_have_changed_are_asked_for() -> None:
    memory = Memory()
    memory.learn(NAMES)
    memory.directories.touch(1007, 1008)
    assert memory.directories.lookup(D, b"name-7") is None
    assert (b"name-8", 0) in memory.read()
    assert memory.directories.lookup(D, b"name-7") is None
    memory.directories.drop(D)
    assert sorted(memory.returned) == [1007, 1008]
    # What is asked for afterwards knows of it.
    memory.learn(NAMES)
    assert memory.directories.lookup(D, b"name-7") == NAMES[7].entry


def test_what_was_asked_for_before_a_change_does_not_know_of_it() -> None:
    memory = Memory()
    asked = memory.directories.begin()
    memory.directories.touch(1007)
    memory.directories.keep(D, Piece(0, asked, *piece_of(placed(NAMES), 0)))
    memory.directories.end()
    memory.learn(NAMES, node=6)
    assert memory.directories.lookup(D, b"name-7") is None
    assert memory.directories.lookup(6, b"name-7") == NAMES[7].entry


def test_nodes_in_doubt_are_asked_for_until_they_are_not() -> None:
    memory = Memory()
    memory.learn(NAMES)
    memory.doubted.add(1007)
    assert memory.directories.lookup(D, b"name-7") is None
    assert (b"name-7", 0) in memory.read()
    memory.doubted.clear()
    assert memory.directories.lookup(D, b"name-7") == NAMES[7].entry


def test_what_the_host_says_has_changed() -> None:
    memory = Memory()
    for node in (5, 6, 7, 8):
        memory.learn(numbered(20, node * 1000), node)
    changed = Changed(
        1, [5], [b"x"], nodes=[7003], through=[7], directories=[6], above=[0], attributes_only=[7004]
    )
    memory.directories.changed(changed)
    assert [node in memory.directories for node in (5, 6, 7, 8)] == [False, False, True, True]
    assert sorted(memory.returned) == [*range(5000, 5020), *range(6000, 6020)]
    assert memory.directories.lookup(7, b"name-3") is None
    assert memory.directories.lookup(7, b"name-4") is None
    assert memory.directories.lookup(7, b"name-5") is not None


def test_a_directory_that_has_changed_is_asked_for_by_its_name() -> None:
    memory = Memory()
    memory.learn([Name(b"d", 6, DIRECTORY), Name(b"e", 7, DIRECTORY)])
    memory.directories.changed(Changed(1, directories=[6], above=[D]))
    memory.directories.name_changed(7, b"x", NameChange.MADE)
    assert memory.directories.lookup(D, b"d") is None
    assert memory.directories.lookup(D, b"e") is None


def test_nothing_is_believed_of_a_session_that_is_over() -> None:
    memory = Memory()
    memory.learn(NAMES, node=6)
    asked = memory.directories.begin()
    memory.directories.drop_all()
    assert len(memory.returned) == len(NAMES)
    memory.directories.keep(D, Piece(0, asked, *piece_of(placed(NAMES), 0)))
    memory.directories.end()
    assert len(memory.returned) == 2 * len(NAMES)
    assert not memory.directories.is_listable(D)
    assert memory.directories.lookup(D, b"name-1") is None
    assert {node for _, node in memory.read()} == {0}


def test_a_piece_from_the_start_is_the_whole_truth() -> None:
    memory = Memory()
    memory.learn_all(NAMES, 50)
    fewer = numbered(30)
    memory.learn(fewer)
    assert memory.read() == pairs(fewer)
    assert len(memory.returned) == len(NAMES)
    assert memory.directories.lookup(D, b"name-200") == b""


def test_a_piece_in_the_place_of_another() -> None:
    memory = Memory()
    memory.learn_all(NAMES, 100)
    second = placed(NAMES)[99][0]
    asked = memory.directories.begin()
    assert not memory.directories.keep(D, Piece(second, asked, *piece_of(placed(NAMES), second, 100)))
    memory.directories.end()
    assert len(memory.returned) == 100
    assert memory.read() == pairs(NAMES)


# --- what goes with what -----------------------------------------------------------------------------


def test_a_directory_that_the_kernel_forgets_goes() -> None:
    memory = Memory()
    memory.learn(NAMES)
    memory.directories.forgotten([4, D, 6])
    assert D not in memory.directories
    assert len(memory.returned) == len(NAMES)


def test_with_the_lookup_of_a_directory_goes_what_is_below() -> None:
    memory = Memory()
    depth = 2000
    for node in range(1, depth):
        memory.learn([Name(b"below", node + 1, DIRECTORY)], node)
    memory.directories.drop(1)
    assert sorted(memory.returned) == list(range(2, depth + 1))
    assert memory.directories.held == 0


def test_a_directory_that_the_kernel_knows_stays() -> None:
    memory = Memory()
    memory.learn([Name(b"below", 6, DIRECTORY)])
    memory.learn(NAMES, 6)
    memory.directories.lookup(D, b"below")
    memory.directories.drop(D)
    assert memory.returned == []
    assert 6 in memory.directories


def test_memory_is_bounded_and_the_least_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_HELD", 50_000)
    memory = Memory()
    for node in range(100, 120):
        memory.learn(numbered(20, node * 1000), node)
        if node > 100:
            memory.directories.lookup(100, b"name-%d" % (node - 101))
    assert 40_000 < memory.directories.held <= 50_000
    assert 100 in memory.directories
    assert 119 in memory.directories
    assert 101 not in memory.directories
    gone = [node for node in range(100, 120) if node not in memory.directories]
    assert len(memory.returned) == 20 * len(gone)


def test_a_directory_larger_than_memory_keeps_what_came_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_HELD", 20_000)
    memory = Memory()
    memory.learn_all(NAMES, 40)
    assert 0 < memory.directories.held <= 20_000
    last = placed(NAMES)[-1][1]
    assert memory.directories.lookup(D, last.name) == last.entry
    assert memory.directories.find(D, 0) is None


def test_changes_are_remembered_only_while_they_matter() -> None:
    memory = Memory()
    memory.directories.touch(1)
    memory.learn(NAMES)
    for node in range(100):
        memory.directories.touch(node)
    memory.directories.drop(D)
    assert not memory.directories._touched


def test_too_many_changes_are_forgotten_together_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_MARKED", 10)
    memory = Memory()
    memory.learn(NAMES)
    asked = memory.directories.begin()
    for node in range(1000, 1011):
        memory.directories.touch(node)
    assert memory.directories.held == 0
    memory.directories.keep(D, Piece(0, asked, *piece_of(placed(NAMES), 0)))
    memory.directories.end()
    assert memory.directories.lookup(D, b"name-1") is None
    for number in range(12):
        memory.directories.name_changed(D, b"own-%d" % number, NameChange.MADE)
    assert D not in memory.directories


# --- what comes next ---------------------------------------------------------------------------------


def test_the_files_that_follow_one() -> None:
    memory = Memory()
    kinds = [DIRECTORY if number % 3 == 0 else 8 for number in range(60)]
    names = [
        Name(b"n%d" % number, 100 + number if number % 7 else 0, kind, number)
        for number, kind in enumerate(kinds)
    ]
    memory.learn(names)
    order = [name for _, name in placed(names) if name.kind == 8 and name.node]
    known, expected = memory.directories, [(name.node, name.size) for name in order]
    assert known.directory_of(order[0].node) == D
    assert list(known.following(order[0].node, Order.LISTED)) == expected[1:]
    assert list(known.following(order[-2].node, Order.LISTED)) == expected[-1:]
    assert list(known.following(order[-1].node, Order.LISTED)) == []
    by_inode = sorted(expected)
    assert list(known.following(by_inode[3][0], Order.INODE)) == by_inode[4:]
    by_name = [(name.node, name.size) for name in sorted(order, key=lambda name: name.name)]
    assert list(known.following(by_name[3][0], Order.NAME)) == by_name[4:]
    assert known.directory_of(99_999) == 0
    for each in Order:
        assert list(known.following(99_999, each)) == []


def test_the_files_that_follow_one_in_another_piece() -> None:
    memory = Memory()
    memory.learn(NAMES, most=20)
    memory.learn(NAMES, after=placed(NAMES)[19][0], most=30)
    order = [(name.node, name.size) for _, name in placed(NAMES)[:50]]
    known = memory.directories
    assert list(known.following(order[5][0], Order.LISTED)) == order[6:]
    assert list(known.files_of(D, Order.LISTED) or ()) == order
    assert list(known.files_of(D, Order.INODE) or ()) == sorted(order)
    assert list(known.following(sorted(order)[5][0], Order.INODE)) == sorted(order)[6:]
    assert known.files_of(99_999, Order.LISTED) is None


def test_of_names_alone_no_files_are_known() -> None:
    memory = Memory()
    bare = [Name(name.name) for name in NAMES]
    assert memory.learn(bare, most=20, bare=True)
    assert memory.directories.files_of(D, Order.LISTED) is None
    assert memory.directories.is_bare(D, placed(NAMES)[5][1].name)
    assert not memory.directories.is_bare(D + 1, NAMES[0].name)
    memory.learn(NAMES, most=20)
    assert not memory.directories.is_bare(D, placed(NAMES)[5][1].name)
    assert memory.directories.files_of(D, Order.LISTED) is not None


def test_a_piece_with_nodes_is_news_where_there_were_names() -> None:
    memory = Memory()
    bare = [Name(name.name) for name in NAMES]
    news = []
    for names, is_bare in ((bare, True), (bare, True), (NAMES, False), (NAMES, False), (bare, True)):
        asked = memory.directories.begin()
        piece = Piece(0, asked, *piece_of(placed(names), 0), bare=is_bare)
        news.append(memory.directories.keep(D, piece))
        memory.directories.end()
    assert news == [True, False, True, False, False]


def test_the_directories_that_follow_one() -> None:
    memory = Memory()
    names = numbered(30, 100, DIRECTORY) + numbered(0)
    memory.learn([*names, *(Name(b"file-%d" % number, 200 + number) for number in range(9))])
    listed = [name.node for _, name in placed(names)]
    by_name = [name.node for name in sorted(names, key=lambda name: name.name)]
    known = memory.directories
    assert list(known.directories_after(listed[3], Order.LISTED)) == listed[4:]
    assert list(known.directories_after(by_name[3], Order.NAME)) == by_name[4:]
    assert list(known.directories_after(103, Order.INODE)) == list(range(104, 130))
    assert list(known.directories_after(99_999, Order.NAME)) == []
    assert known.sorted_by_name([5, *listed[:9], 4]) == [
        *(node for node in by_name if node in listed[:9]),
        5,
        4,
    ]


# --- attributes --------------------------------------------------------------------------------------


def test_attributes_are_known_of_what_was_given_too() -> None:
    memory = Memory()
    memory.learn_all(NAMES, 100)
    for name in NAMES:
        assert memory.directories.attributes(name.node) == name.attr
    memory.read()
    for name in NAMES:
        assert memory.directories.attributes(name.node) == name.attr
    assert memory.directories.attributes(999) is None
    assert memory.directories.attributes(1300) is None
    assert memory.directories.attributes(0) is None


def test_attributes_of_many_directories() -> None:
    memory = Memory()
    order = list(range(100, 400))
    random.Random(1).shuffle(order)
    for node in order:
        memory.learn(numbered(5, node * 10), node)
    for node in order[::2]:
        memory.directories.drop(node)
    for place, node in enumerate(order):
        known = memory.directories.attributes(node * 10 + 3)
        assert known == (None if place % 2 == 0 else numbered(5, node * 10)[3].attr)
    memory.directories.drop_all()
    assert not memory.directories._by_lowest


def test_attributes_that_are_not_promised_are_not_known() -> None:
    memory = Memory()
    memory.learn(NAMES, promise=0)
    assert memory.directories.attributes(1001) is None


Change = Callable[[Directories], None]
CHANGES: dict[str, Change] = {
    "written": lambda memory: memory.touch(1001),
    "told": lambda memory: memory.changed(Changed(1, nodes=[1001], through=[0])),
    "told of its attributes": lambda memory: memory.changed(Changed(1, attributes_only=[1001])),
    "told as a directory": lambda memory: memory.changed(Changed(1, directories=[1001], above=[0])),
    "told of a name in it": lambda memory: memory.changed(Changed(1, parents=[1001], names=[b"x"])),
    "a name made in it": lambda memory: memory.name_changed(1001, b"x", NameChange.MADE),
    "its name removed": lambda memory: memory.name_changed(D, b"name-1", NameChange.UNLINKED),
    "its name removed, the host says": lambda memory: memory.name_changed(
        D, b"name-1", NameChange.UNLINKED, 1001
    ),
    "its name moved": lambda memory: memory.name_changed(D, b"name-1", NameChange.MOVED),
    "forgotten by the kernel": lambda memory: memory.forgotten([1001]),
    "the session over": lambda memory: memory.drop_all(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_attributes_are_known_until_they_change(change: Change) -> None:
    memory = Memory()
    memory.learn(NAMES)
    change(memory.directories)
    assert memory.directories.attributes(1001) is None


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_and_so_are_those_that_were_learned_singly(change: Change) -> None:
    memory = Memory()
    asked = memory.directories.begin()
    memory.directories.learn(1001, FILE, asked)
    memory.directories.end()
    assert memory.directories.attributes(1001) == FILE
    change(memory.directories)
    assert memory.directories.attributes(1001) is None


IN_FLIGHT = {key: change for key, change in CHANGES.items() if key != "forgotten by the kernel"}
"""What it is asking about the kernel does not forget."""


@pytest.mark.parametrize("change", IN_FLIGHT.values(), ids=IN_FLIGHT)
def test_an_answer_that_was_on_its_way_during_a_change_is_not_learned(change: Change) -> None:
    memory = Memory()
    asked = memory.directories.begin()
    change(memory.directories)
    memory.directories.learn(1001, FILE, asked)
    memory.directories.end()
    assert memory.directories.attributes(1001) is None


def test_too_many_forgotten_nodes_spoil_only_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_MARKED", 10)
    memory = Memory()
    memory.learn(NAMES)
    memory.directories.forgotten(range(5000, 5011))
    assert memory.directories.attributes(1001) is None
    assert memory.directories.lookup(D, b"name-1") == NAMES[1].entry
    memory.learn(NAMES)
    assert memory.directories.attributes(1001) == NAMES[1].attr


def test_what_comes_with_an_answer_is_known_after_the_change_that_it_answers() -> None:
    memory = Memory()
    memory.learn([Name(b"d", 6, DIRECTORY)])
    memory.directories.name_changed(6, b"x", NameChange.MADE)
    memory.directories.know(6, FILE)
    assert memory.directories.attributes(6) == FILE
    memory.directories.name_changed(6, b"y", NameChange.MADE)
    assert memory.directories.attributes(6) is None


@pytest.mark.parametrize("change", NameChange)
@pytest.mark.parametrize("attr", [FILE, FOLDER], ids=["file", "folder"])
def test_a_change_elsewhere_ends_what_it_may_be_about(attr: bytes, change: NameChange) -> None:
    """Who loses a name is not known here, and has another number of links then."""
    memory = Memory()
    asked = memory.directories.begin()
    memory.directories.learn(8, attr, asked)
    memory.directories.name_changed(6, b"x", change)
    stays = change is NameChange.MADE or (change is NameChange.UNLINKED and attr is FOLDER)
    assert memory.directories.attributes(8) == (attr if stays else None)
    memory.directories.learn(9, attr, asked)
    assert memory.directories.attributes(9) == (attr if stays else None)
    memory.directories.learn(9, attr, memory.directories.begin())
    assert memory.directories.attributes(9) == attr


def test_what_is_learned_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_KNOWN", 10)
    memory = Memory()
    for node in range(1, 30):
        memory.directories.learn(node, FILE, memory.directories.begin())
    assert [node for node in range(1, 30) if memory.directories.attributes(node)] == list(range(20, 30))


class Counting(RuleBasedStateMachine):
    """The host counts what it gives; the kernel and we together never give back more, nor in the end less."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.given: list[int] = []
        self.counted: list[int] = []
        self.asked: list[tuple[int, int]] = []

    nodes = st.integers(1, 4)
    numbers = st.integers(0, 9)

    def names(self, node: int) -> list[Name]:
        # Each directory has the others in it, and files.
        below = [Name(b"d%d" % one, one, DIRECTORY) for one in range(1, 5) if one != node]
        return [*below, *numbered(10, node * 100)]

    @rule(node=nodes)
    def ask(self, node: int) -> None:
        self.asked.append((node, self.memory.directories.begin()))

    @rule(most=st.sampled_from([3, 100]), skip=st.sampled_from([0, 5]))
    def come(self, most: int, skip: int) -> None:
        if not self.asked:
            return
        node, asked = self.asked.pop(0)
        names = placed(self.names(node))
        after = names[skip][0] if skip else 0
        piece = Piece(after, asked, *piece_of(names, after, most))
        self.counted += piece.nodes
        self.memory.directories.keep(node, piece)
        self.memory.directories.end()

    @rule(node=nodes, number=numbers)
    def look_up(self, node: int, number: int) -> None:
        entry = self.memory.directories.lookup(node, b"name-%d" % number)
        assert entry != b""
        if entry:
            assert entry == numbered(10, node * 100)[number].entry
            self.given.append(int.from_bytes(entry[:8], "little"))

    @rule(node=nodes, skip=st.sampled_from([0, 4, 7]), size=st.sampled_from([400, 4000]))
    def read(self, node: int, skip: int, size: int) -> None:
        off = placed(self.names(node))[skip][0] if skip else 0
        if (found := self.memory.directories.find(node, off)) is not None:
            page = shown(self.memory.directories.page(*found, size))
            self.given += [record.node for record in page if record.node]

    @rule(node=nodes, number=numbers)
    def write(self, node: int, number: int) -> None:
        self.memory.directories.touch(node * 100 + number)

    @rule(node=nodes)
    def make(self, node: int) -> None:
        self.memory.directories.name_changed(node, b"new", NameChange.MADE)

    @rule(node=nodes)
    def change(self, node: int) -> None:
        self.memory.directories.changed(Changed(1, directories=[node]))

    @rule(node=nodes)
    def forget(self, node: int) -> None:
        self.memory.directories.forgotten([node])

    @rule()
    def void(self) -> None:
        self.memory.directories.drop_all()

    @invariant()
    def no_lookup_is_given_twice(self) -> None:
        left = list(self.counted)
        for node in (*self.given, *self.memory.returned):
            left.remove(node)

    def teardown(self) -> None:
        self.memory.directories.drop_all()
        assert sorted((*self.given, *self.memory.returned)) == sorted(self.counted)
        assert self.memory.directories.held == 0


TestCounting = Counting.TestCase
TestCounting.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_of_what_has_come_again_nothing_below_is_dropped() -> None:
    """Before a lookup is given back another has come: the host had one of it all the time."""
    memory, lost = Memory(), set[int]()
    memory.directories._lost = lost.update
    above = [Name(b"kept", 50, DIRECTORY), Name(b"gone", 51, DIRECTORY)]
    memory.learn(above)
    for node in (50, 51):
        memory.learn(numbered(3), node)
    memory.learn(above[:1])
    assert sorted(memory.returned) == [50, 51, *sorted(name.node for name in numbered(3))]
    assert (50 in memory.directories, 51 in memory.directories) == (True, False)
    assert 50 not in lost
    assert 51 in lost
    memory.learn(above[:1], promise=0)
    assert 50 not in memory.directories
    assert 50 in lost


def test_who_has_lost_a_name_may_be_known() -> None:
    memory = Memory()
    for change, whose, left in (
        (NameChange.UNLINKED, 9, {10}),
        (NameChange.UNLINKED, 0, set()),
        (NameChange.MOVED, 9, set()),
    ):
        for node in (9, 10):
            memory.directories.learn(node, FILE, memory.directories.begin())
            memory.directories.end()
        memory.directories.name_changed(D, b"name", change, whose)
        assert {node for node in (9, 10) if memory.directories.attributes(node)} == left
