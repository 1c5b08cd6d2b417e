"""Contents of files that come before they are asked for: which are, and what is answered from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import pytest

from guest_agent.fuse import contents
from guest_agent.fuse.contents import (
    FIRST,
    FIRST_BYTES,
    IDLE,
    MAX_CALLS,
    MOST_AT_FIRST,
    MOST_FIRST_BYTES,
    Contents,
)
from guest_agent.fuse.host import Host
from guest_agent.fuse.operation import spawn
from guest_agent.fuse.pieces import Order
from protocol.files import MAX_CONTENT, MAX_DATA
from protocol.files import Contents as Given
from tests.guest_agent.fuse.script import Asked, Away, ScriptedLink, ScriptedTimers

DIRECTORY = 5


class Reader:
    """Directories with files, of which somebody reads some. Nodes from 100 on, in the order of the listing; by inode number
    it is the other way round, and by name those that end in 0 come first, then those in 1."""

    def __init__(
        self, files: int = 1000, size: int = 10, directories: int = 1, round_trip: float = 0.0
    ) -> None:
        self.sizes = dict.fromkeys(range(100, 100 + files), size)
        self.each = files // directories
        self.unlisted: set[int] = set()
        self.uniques = count(2, 2)
        self.link = ScriptedLink()
        host = Host(lambda thread: False, Away(round_trip))
        host.attach(self.link)
        self.timers = ScriptedTimers()
        self.contents = Contents(host, 7, self, self.timers, count(1))  # type: ignore[arg-type]
        self.known = DIRECTORY

    def directory_of(self, node: int) -> int:
        return self.known + (node - 100) // self.each if node in self.sizes and self.known else 0

    def ordered(self, nodes: Iterable[int], order: Order) -> list[int]:
        keys: dict[Order, Callable[[int], Any]] = {
            Order.LISTED: lambda node: node,
            Order.INODE: lambda node: -node,
            Order.NAME: lambda node: str(node)[::-1],
        }
        return sorted(nodes, key=keys[order])

    def files_of(self, node: int, order: Order) -> Iterator[tuple[int, int]] | None:
        if node in self.unlisted:
            return None
        files = self.ordered((one for one in self.sizes if self.directory_of(one) == node), order)
        return iter([(one, self.sizes[one]) for one in files])

    def following(self, node: int, order: Order) -> Iterator[tuple[int, int]]:
        files = list(self.files_of(self.directory_of(node), order) or ())
        return iter(files[files.index((node, self.sizes[node])) + 1 :])

    def directories_after(self, node: int, order: Order) -> Iterator[int]:
        directories = self.ordered({self.directory_of(one) for one in self.sizes}, order)
        return iter(directories[directories.index(node) + 1 :])

    def content(self, node: int) -> bytes:
        size = self.sizes[node]
        return (b"%d." % node * size)[:size]

    def read(self, node: int, offset: int = 0, size: int = 1 << 17) -> list[bytes | None]:
        """What is answered, as soon as it is; None is what the host must be asked for."""
        answers: list[bytes | None] = []

        async def read() -> None:
            found = (
                await self.contents.read(next(self.uniques), node, offset, size)
                if node in self.contents
                else None
            )
            answers.append(found)
            if found is None and not offset:
                self.contents.missed(node)

        spawn(read())
        return answers

    def asked(self) -> list[list[int]]:
        """The nodes of all calls that are not answered."""
        return [asked.call.nodes for asked in self.link.asked]  # type: ignore[attr-defined]

    def answer(self, *missing: int) -> None:
        asked: Asked = self.link.take()
        call: Any = asked.call
        assert (call.share, call.most) == (7, MAX_DATA)
        assert call.node in map(self.directory_of, call.nodes)
        sizes = [~0 if node in missing else self.sizes[node] for node in call.nodes]
        payload = b"".join(self.content(node) for node in call.nodes if node not in missing)
        asked.answer(Given(sizes), payload)

    def read_all(self, nodes: list[int]) -> int:
        """One after the other; returns how many the host was asked for."""
        asked = 0
        for node in nodes:
            (answer,) = self.read(node) or [b"later"]
            asked += answer is None
            while self.link.asked:
                self.answer()
        return asked


def test_who_reads_one_file_is_given_the_next_ones_at_once() -> None:
    it = Reader()
    assert it.read(100) == [None]
    assert it.asked() == [[101, 102, 103, 104]]
    it.answer()
    assert it.read(101) == [it.content(101)]
    assert it.contents.held == 3 * len(it.content(101))


def test_what_was_read_to_its_end_is_the_kernels_and_not_here() -> None:
    it = Reader()
    it.read(100)
    it.answer()
    assert it.read(102, 0, 4) == [it.content(102)[:4]]
    assert it.read(102, 4, 100) == [it.content(102)[4:]]
    assert it.read(102, 4, 100) == [None]


def test_the_more_is_read_the_more_is_asked_for() -> None:
    it = Reader(size=4)
    assert it.read_all(list(range(100, 1100))) == 1
    assert it.contents.held == 0


def test_a_file_on_its_way_is_waited_for() -> None:
    it = Reader()
    it.read(100)
    answers = it.read(101)
    assert answers == []
    it.answer()
    assert answers == [it.content(101)]


def test_who_waits_for_what_does_not_come_asks_the_host() -> None:
    it = Reader()
    it.read(100)
    first, second = it.read(101), it.read(102)
    it.answer(101)
    assert (first, second) == ([None], [it.content(102)])
    it = Reader()
    it.read(100)
    first = it.read(101)
    it.link.take().fail(5)
    assert first == [None]


def test_a_file_that_is_not_given_may_take_room_all_the_same() -> None:
    it = Reader()
    it.read(100)
    payload = b"".join(it.content(node) for node in range(101, 105))
    size = len(it.content(101))
    it.link.take().answer(Given([size, ~size, size, ~0]), payload[: 3 * size])
    assert it.read(103) == [it.content(103)]
    assert it.read(102) == [None]


@pytest.mark.parametrize("sizes", [[10, 10, 10], [10, 10, 10, 11], [10, 10, 10, 9], [10] * 5])
def test_what_does_not_fit_together_is_nothing(sizes: list[int]) -> None:
    it = Reader()
    it.read(100)
    it.link.take().answer(Given(sizes), bytes(40))
    assert it.contents.held == 0
    assert 101 not in it.contents


def test_large_and_empty_files_are_left_out() -> None:
    it = Reader()
    it.sizes[101], it.sizes[102], it.sizes[104] = 0, MAX_CONTENT + 1, MAX_CONTENT - 20
    it.read(100)
    assert it.asked() == [[103, 104, 105]]  # the next one has no room


def test_the_first_ones_have_little_room_and_others_more() -> None:
    it = Reader(size=FIRST_BYTES // 2)
    it.read(100)
    assert it.asked() == [[101, 102]]
    it.answer()
    most = 0
    for node in range(101, 150):
        it.read(node)
        most = max(most, *map(len, it.asked()), 0)
        while it.link.asked:
            it.answer()
    assert most == MAX_DATA // (FIRST_BYTES // 2)


@pytest.mark.parametrize(("round_trip", "files"), [(0.004, FIRST), (0.02, 4 * FIRST), (0.5, MOST_AT_FIRST)])
def test_of_a_host_that_is_far_away_more_is_asked_for_at_first(round_trip: float, files: int) -> None:
    it = Reader(round_trip=round_trip)
    it.read(100)
    assert it.asked() == [list(range(101, 101 + files))]
    first = next(iter(it.sizes))
    it = Reader(round_trip=round_trip)
    last = list(it.sizes)[-1]
    it.read(last)
    is_far = round_trip > 0.005
    assert it.asked() == ([list(range(first, first + files))] if is_far else []), "from the beginning"
    it = Reader(size=MOST_FIRST_BYTES // 5, round_trip=0.5)
    it.read(100)
    assert it.asked() == [[101, 102, 103, 104, 105]], "but not of large ones"


def test_who_reads_here_and_there_costs_no_more_than_the_first() -> None:
    it = Reader()
    nodes = [100, 700, 300, 900, 500, 200, 800]
    assert it.read_all(nodes) == len(nodes)
    assert it.contents.held == FIRST * len(it.content(101))


@pytest.mark.parametrize("order", [Order.INODE, Order.NAME])
def test_files_may_be_read_in_another_order(order: Order) -> None:
    it = Reader(size=4)
    assert it.read_all(it.ordered(it.sizes, order)) <= 3
    assert it.contents.held == 0


@pytest.mark.parametrize("order", list(Order))
def test_who_reads_one_directory_after_the_other_asks_for_next_to_nothing(order: Order) -> None:
    it = Reader(size=4, directories=40)
    calls = 0
    missed = 0
    for directory in it.ordered(range(DIRECTORY, DIRECTORY + 40), order):
        for node, _ in it.files_of(directory, order) or ():
            (answer,) = it.read(node) or [b"later"]
            missed += answer is None
            calls += len(it.link.asked)
            while it.link.asked:
                it.answer()
    assert missed <= 3
    assert calls <= 12
    assert it.contents.held == 0


def test_the_order_lasts_from_one_directory_to_the_next() -> None:
    it = Reader(size=4, directories=10)
    it.unlisted.update(range(DIRECTORY, DIRECTORY + 10))
    first, second = (it.ordered(range(100 + 100 * one, 200 + 100 * one), Order.NAME) for one in (0, 7))
    it.unlisted.discard(DIRECTORY)
    assert it.read_all(first) <= 3
    it.unlisted.discard(DIRECTORY + 7)
    assert it.read_all(second) == 1


def test_beyond_a_directory_that_is_not_listed_nothing_is_asked_for_until_it_is() -> None:
    it = Reader(size=4, directories=10)
    it.unlisted.add(DIRECTORY + 1)
    assert it.read_all(list(range(100, 190))) == 1
    assert it.contents.held == 10 * 4
    it.unlisted.clear()
    it.read(190)
    assert it.asked()[0][0] == 200


def test_who_reads_one_file_is_given_no_other_directory() -> None:
    it = Reader(directories=10)
    it.read_all([198])
    assert it.contents.held == len(it.content(199))


def test_a_directory_that_somebody_else_reads_is_left_to_them() -> None:
    it = Reader(size=4, directories=10)
    it.read(200)
    it.answer()
    assert it.read_all(list(range(100, 200))) == 1
    assert all(node in it.contents for node in range(201, 205))
    assert it.contents.held == 4 * 4


def test_after_a_directory_that_was_read_the_next_one_comes_at_once() -> None:
    it = Reader(size=4, directories=10)
    it.unlisted.update((DIRECTORY + 1, DIRECTORY + 4))
    it.read_all(list(range(100, 200)))
    it.unlisted.clear()
    it.read(400)
    assert it.asked() == [list(range(401, 401 + 64))]
    it.read(900)  # what came before was not read
    assert it.asked()[1:] == [[901, 902, 903, 904]]


def test_a_directory_that_is_read_once_more_is_given_ahead_once_more() -> None:
    it = Reader(size=4)
    it.read_all(list(range(100, 1100)))
    assert it.read_all(list(range(100, 1100))) == 1


def test_of_an_unknown_directory_nothing_is_asked_for() -> None:
    it = Reader()
    it.known = 0
    assert it.read(100) == [None]
    assert it.asked() == []


# --- what ends it --------------------------------------------------------------------------------------


def test_what_has_changed_is_asked_for() -> None:
    it = Reader()
    it.read(100)
    it.answer()
    it.contents.drop(101, 777)
    assert it.read(101) == [None]
    assert it.read(102) == [it.content(102)]


def test_what_changes_on_its_way_is_asked_for() -> None:
    it = Reader()
    it.read(100)
    waiting = it.read(101)
    it.contents.drop(101)
    it.answer()
    assert waiting == [None]
    assert it.read(102) == [it.content(102)]


def test_with_the_session_all_of_it_ends() -> None:
    it = Reader()
    it.read(100)
    it.answer()
    it.read(101)
    it.read(102)
    it.read(103)
    waiting = it.read(it.asked()[0][0])
    it.contents.void()
    assert it.contents.held == 0
    it.answer()  # the next session brings what the last one was asked for
    assert waiting == [None]
    assert it.contents.held == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_HELD", 25)
    it = Reader()
    it.read(100)
    it.answer()
    assert it.contents.held <= 25
    assert it.read(104) == [it.content(104)]
    assert it.read(101) == [None]


def test_calls_on_their_way_are_bounded() -> None:
    it = Reader(files=10_000)
    for directory in range(MAX_CALLS + 2):
        it.known = DIRECTORY + directory
        it.read(100 + 1000 * directory)
    assert len(it.link.asked) == MAX_CALLS


def test_who_stops_to_read_leaves_nothing() -> None:
    it = Reader()
    it.read(100)
    it.answer()
    it.read(101)
    assert it.timers.fire() == IDLE
    assert it.contents.held > 0  # it was read meanwhile
    it.timers.fire()
    assert it.contents.held == 0
    assert it.timers.waiting == []


def test_only_so_many_directories_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_RUNS", 3)
    it = Reader(files=10_000)
    for directory in range(10):
        it.known = DIRECTORY + directory
        it.read(100 + 100 * directory)
    assert len(it.contents._runs) == 3
