"""What is listed ahead of a guest that walks, and that nothing is for one that does not."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from guest_agent.fuse import ahead
from guest_agent.fuse.ahead import FEW, MAX_UNDER_WAY, MOST, Ahead, Interest
from guest_agent.fuse.distance import Distance

Tree = dict[int, list[int]]


def tree(width: int, depth: int) -> Tree:
    """1 is the root; each has ``width`` below it, ``depth`` deep."""
    below: Tree = {}
    last = 1
    level = [1]
    for _ in range(depth):
        following = []
        for node in level:
            below[node] = list(range(last + 1, last + width + 1))
            last += width
            following += below[node]
        level = following
    below.update({node: [] for node in level})
    return below


class Walk:
    """A guest, and a host that answers what was asked ahead after ``delay`` visits."""

    def __init__(
        self, below: Tree, delay: int = 0, by_name: Callable[[Sequence[int]], list[int]] = sorted
    ) -> None:
        self.below = below
        self.delay = delay
        self.ahead = Ahead(by_name)
        self.here: set[int] = set()
        self.coming: deque[tuple[int, int]] = deque()
        self.asked: list[int] = []
        self.by_guest = 0
        self.now = 0
        self.most_coming = 0
        self.wasted_most = 0

    def learn(self, node: int) -> None:
        self.here.add(node)
        self.ahead.listed(node, self.below[node], first=True)
        self.go()

    def go(self) -> None:
        while (node := self.ahead.next()) is not None:
            assert node not in self.here
            assert node not in self.asked
            self.asked.append(node)
            self.coming.append((self.now + self.delay, node))
        self.most_coming = max(self.most_coming, len(self.coming))

    def pass_time(self) -> None:
        self.now += 1
        while self.coming and self.coming[0][0] <= self.now:
            self.learn(self.coming.popleft()[1])

    def visit(self, node: int, *, reading: bool = True) -> None:
        self.pass_time()
        if self.ahead.visited(node, reading=reading):
            self.go()
        if node in self.here:
            return
        if any(node == one for _, one in self.coming):
            while node not in self.here:
                self.learn(self.coming.popleft()[1])
        else:
            self.by_guest += 1
            self.learn(node)


def deep(below: Tree, visit: Callable[[int], None], node: int = 1) -> None:
    """As find(1)."""
    visit(node)
    for child in below[node]:
        deep(below, visit, child)


@pytest.mark.parametrize(("width", "depth"), [(1, 50), (2, 8), (5, 4), (40, 2), (1000, 1)])
@pytest.mark.parametrize("delay", [0, 1, 5])
def test_of_a_tree_that_is_walked_nearly_all_is_there_before_the_guest(
    width: int, depth: int, delay: int
) -> None:
    below = tree(width, depth)
    walk = Walk(below, delay)
    deep(below, walk.visit)
    assert walk.here == set(below)
    assert walk.by_guest <= 2 + len(below) // 25
    assert walk.most_coming <= MAX_UNDER_WAY


def test_a_walk_in_another_order_too() -> None:
    """git goes through its index by name, and lists nothing."""
    below = tree(30, 2)
    walk = Walk(below, 2)
    walk.learn(1)
    order = list(below[1])
    random.Random(5).shuffle(order)
    for one in order:
        walk.visit(one, reading=False)
        inner = list(below[one])
        random.Random(one).shuffle(inner)
        for two in inner:
            walk.visit(two, reading=False)
    assert walk.by_guest <= len(below) // 4


def shuffled(width: int, seed: int) -> Tree:
    """Directories whose names are their numbers, as they are listed."""
    children = list(range(2, width + 2))
    random.Random(seed).shuffle(children)
    return {1: children, **{child: [] for child in children}}


@pytest.mark.parametrize("walkers", [1, 10])
def test_who_goes_by_name_is_expected_there(walkers: int) -> None:
    """git(1) has threads that each take a part of its index."""
    walk = Walk(shuffled(200, 1))
    walk.learn(1)
    for step in range(200 // walkers):
        for walker in range(walkers):
            walk.visit(2 + walker * (200 // walkers) + step, reading=False)
    assert walk.by_guest <= 4 * walkers


def test_who_goes_by_name_no_more_is_expected_as_listed() -> None:
    below = shuffled(100, 2)
    walk = Walk(below)
    walk.learn(1)
    for node in range(2, 20):
        walk.visit(node, reading=False)
    below.update({1000: [*range(1099, 1000, -1)], **{node: [] for node in range(1001, 1100)}})
    walk.learn(1000)
    for node in below[1000]:
        walk.visit(node)
    assert walk.by_guest <= 8


def test_of_names_that_come_piece_by_piece_each_is_listed_once() -> None:
    children = shuffled(40, 3)[1]
    one = Ahead(sorted)
    one.listed(1, children[:20], first=True)
    for node in sorted(children[:20])[:3]:
        one.visited(node, reading=False)
    one.listed(1, children[20:], first=False)
    asked = []
    for _ in range(100):
        if (node := one.next() or 0) == 0:
            break
        asked.append(node)
        one.listed(node, [], first=True)
        one.visited(node, reading=False)
    assert sorted(asked) == sorted(set(children) - set(sorted(children[:20])[:3]))


def test_one_that_was_moved_is_ahead_of_the_guest_only_once() -> None:
    one = Ahead(sorted)
    one.listed(1, [2, 3, 4], first=True)
    one.listed(9, [10], first=True)
    one.visited(2, reading=False)
    one.visited(3, reading=False)
    assert one.next() == 4
    one.listed(9, [10, 4], first=True)
    one.listed(4, [], first=True)
    one.visited(4, reading=False)
    assert one._families[1].ahead == one._families[9].ahead == 0


def far(round_trip: float) -> Ahead:
    distance = Distance()
    distance.round_trip = round_trip
    return Ahead(sorted, distance.scaled)


def all_of(one: Ahead) -> list[int]:
    asked = []
    while (node := one.next()) is not None:
        asked.append(node)
    return asked


def test_of_a_host_that_is_far_away_more_is_on_its_way() -> None:
    for round_trip, most in ((0.001, 2), (0.02, 8), (0.1, 40)):
        one = far(round_trip)
        one.listed(1, list(range(2, 100)), first=True)
        one.visited(2, reading=True)
        one.visited(3, reading=True)
        assert len(all_of(one)) == most


def test_what_is_below_may_be_listed_before_the_guest_is_known_to_walk() -> None:
    one = far(0.1)
    one.listed(1, [2, 3], first=True)
    one.listed(2, [4, 5], first=True)
    one.visited(2, reading=True)
    one.look_below(2)
    assert all_of(one) == [4, 5], "and nothing that is beside it"
    one.visited(4, reading=True)
    assert all_of(one) == [3]


def test_what_follows_a_directory_beside_it() -> None:
    one = far(0.02)
    one.listed(1, list(range(2, 100)), first=True)
    one.listed(2, [200], first=True)
    assert one.following(10) == list(range(11, 19))
    assert one.following(98) == [99, *range(2, 9)], "and round"
    assert one.following(1) == []


def test_where_somebody_may_go_next_in_either_order() -> None:
    one = Ahead(sorted)
    one.listed(1, [4, 2, 3, 5], first=True)
    assert list(one.below(1, 2)) == [2, 4, 3, 2]
    assert list(one.beside(4, 9)) == [5, 2, 2, 3, 3, 5]
    assert list(one.beside(5, 1)) == [2, 4]
    assert list(one.below(4, 9)) == list(one.beside(1, 9)) == []
    one.listed(1, [1000], first=False)
    assert list(one.beside(5, 1)) == [1000, 1000]


def test_of_very_many_only_the_order_in_which_they_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_NAMED", 3)
    one = Ahead(sorted)
    one.listed(1, [4, 2, 3, 5], first=True)
    assert list(one.below(1, 2)) == [4, 2]
    assert list(one.beside(2, 2)) == [3, 5]


def test_whoever_walks_wants_all_of_the_next_one() -> None:
    one = Ahead(sorted)
    one.listed(1, [2, 3, 4, 5, 6], first=True)
    walks = []
    for node in (2, 3, 4):
        one.visited(node, reading=False)
        walks.append(one.is_walking(node))
    assert walks == [False, False, True]
    assert one.is_walking(6)
    assert not one.is_walking(1)


def test_a_directory_is_new_once() -> None:
    interest = Interest()
    assert not interest.is_new(5)
    interest.asked(5)
    assert interest.is_new(5)
    interest.asked(5)
    assert not interest.is_new(5)
    interest.listed(5, 10, helps=True)
    interest.asked(5)
    assert interest.is_new(5)
    interest.asked(5)
    interest.begin(5)
    interest.asked(5)
    assert interest.is_new(5)
    interest.begin(6)
    assert not interest.is_new(6)


def test_what_is_listed_once_and_no_more_costs_little() -> None:
    below = tree(20, 2)
    walk = Walk(below)
    walk.visit(1)
    walk.visit(below[1][3])
    assert len(walk.asked) <= 4  # two below, and two beside


def test_names_looked_up_here_and_there_cost_nothing() -> None:
    """A path to one file, again and again."""
    below = tree(20, 3)
    walk = Walk(below)
    for node in (1, below[1][3], below[below[1][3]][7], 1, below[1][3], below[below[1][3]][7]):
        walk.visit(node, reading=False)
    assert walk.asked == []


def test_the_second_of_the_same_directory_begins_it() -> None:
    walk = Walk(tree(20, 1))
    walk.learn(1)
    walk.visit(7, reading=False)
    walk.visit(7, reading=False)
    assert walk.asked == []
    walk.visit(9, reading=False)
    assert walk.asked == [10, 11]  # from where the guest is


def test_the_more_come_true_the_more_are_ahead() -> None:
    walk = Walk(tree(500, 1))
    walk.learn(1)
    ahead_of = []
    for node in range(2, 200):
        walk.visit(node)
        ahead_of.append(len(walk.here) - node)
    assert ahead_of[0] < ahead_of[3] < ahead_of[6]
    assert max(ahead_of) == MOST - 1


def test_the_fewer_come_true_the_fewer() -> None:
    below = tree(400, 2)
    walk = Walk(below)
    walk.learn(1)
    for node in below[1][:60]:
        walk.visit(node)
    foreseen = len(walk.asked)
    assert len(walk.here) > 100
    # Now it goes where nobody expects it.
    for node in below[1][:20]:
        for step in (7, 300, 150, 380, 220):
            walk.visit(below[node][step])
    assert len(walk.asked) - foreseen < 150


def test_one_that_fails_is_no_more_ahead() -> None:
    one = Ahead(sorted)
    one.listed(1, list(range(2, 30)), first=True)
    one.visited(2, reading=False)
    assert one.visited(3, reading=False)
    for _ in range(10):
        node = one.next()
        assert node is not None
        one.failed(node)
    assert one.next() is not None


def test_only_so_many_at_once() -> None:
    walk = Walk(tree(300, 1), delay=1000)
    walk.learn(1)
    for node in (2, 3, 4, 5):
        walk.visit(node)
    assert len(walk.coming) <= MAX_UNDER_WAY


def test_a_directory_that_is_listed_again() -> None:
    one = Ahead(sorted)
    one.listed(1, [2, 3, 4, 5], first=True)
    one.visited(2, reading=False)
    one.listed(1, [2, 4, 6, 7], first=True)
    one.listed(1, [8], first=False)
    assert one.visited(4, reading=False)
    assert one.next() in (6, 7, 8)
    assert not one.visited(3, reading=False)  # is not there any more
    assert one.next() in (6, 7, 8)


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_KNOWN", 100)
    one = Ahead(sorted)
    for node in range(1, 200):
        one.listed(node, list(range(node * 1000, node * 1000 + 30)), first=True)
    assert len(one._places) <= 100
    assert len(one._families) <= 4
    one.visited(1001, reading=False)
    assert not one.visited(1002, reading=False)
    one.visited(199_001, reading=False)
    assert one.visited(199_002, reading=False)


def test_a_few_lookups_make_a_directory_interesting() -> None:
    interest = Interest()
    assert [interest.asked(5) for _ in range(FEW + 1)] == [*[False] * (FEW - 1), True, False]


def test_a_directory_that_was_moved_and_is_gone_is_nobodys() -> None:
    """It is still in the list of the one that it was moved out of."""
    known = Ahead(sorted)
    known.listed(1, [10, 20], first=True)
    known.listed(10, [2, 3], first=True)
    known.listed(20, [3, 4], first=True)
    known.listed(20, [4], first=True)
    known.visited(10, reading=True)
    assert known.visited(2, reading=True)
    asked = []
    while (node := known.next()) is not None:
        asked.append(node)
        known.failed(node)
    assert asked == [20]


def test_whatever_is_moved_nothing_breaks() -> None:
    chosen = random.Random(1)
    known = Ahead(sorted)
    coming: list[int] = []
    for _ in range(20_000):
        node = chosen.randrange(1, 30)
        match chosen.randrange(4):
            case 0:
                children = chosen.sample(range(1, 60), chosen.randrange(6))
                known.listed(node, children, first=chosen.random() < 0.8)
                coming = [one for one in coming if one != node]
            case 1:
                known.visited(node, reading=chosen.random() < 0.5)
            case 2:
                while (following := known.next()) is not None:
                    coming.append(following)
            case _:
                if coming:
                    known.failed(coming.pop(chosen.randrange(len(coming))))
        assert len(coming) <= MAX_UNDER_WAY


def test_a_large_one_takes_more() -> None:
    interest = Interest()
    interest.asked(5)
    interest.listed(5, 1600, helps=True)
    assert [interest.asked(5) for _ in range(100)] == [*[False] * 99, True]


def test_one_that_does_not_help_takes_twice_as_many_each_time() -> None:
    interest = Interest()
    waited, needed = 0, []
    for _ in range(200):
        waited += 1
        if interest.asked(5):
            needed.append(waited)
            interest.listed(5, 10, helps=False)
            waited = 0
    assert needed == [3, 6, 12, 24, 48, 96]
    interest.listed(5, 10, helps=True)
    assert [interest.asked(5) for _ in range(3)] == [False, False, True]


def test_what_is_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_COUNTED", 10)
    interest = Interest()
    for node in range(100):
        interest.asked(node)
    interest.listed(3, 100, helps=True)
    assert len(interest._counts) == 10
