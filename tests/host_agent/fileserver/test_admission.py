"""Calls with large answers: how many begin, in which order, and that nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from host_agent.fileserver.admission import MAX_ANSWERS, MAX_OF_A_SHARE, Admission

MIB = 1 << 20


class Scene:
    """Shares are letters, items are (share, number). ``backlog`` is the link's, ``memory`` what is free of it."""

    def __init__(self) -> None:
        self.backlog = 0
        self.memory = MAX_ANSWERS
        self.begun: list[tuple[str, int]] = []
        self.admission = Admission(self.begun.append, lambda: self.backlog, lambda size: size <= self.memory)

    def ask(self, share: str, *numbers: int, size: int = MIB) -> None:
        for number in numbers:
            self.admission.ask(share, size, (share, number))

    def ended(self, share: str, size: int = MIB) -> None:
        """One of the share's is over."""
        self.admission.ended(share, size)
        self.admission.go_on()

    def begun_of(self, share: str) -> list[int]:
        return [number for of, number in self.begun if of == share]


@pytest.fixture
def scene() -> Scene:
    return Scene()


OF_A_SHARE = MAX_OF_A_SHARE // MIB
OF_ALL = MAX_ANSWERS // MIB


def test_a_share_has_its_part_under_way_and_goes_on_in_order(scene: Scene) -> None:
    scene.ask("a", *range(100))
    assert scene.begun_of("a") == list(range(OF_A_SHARE))
    for done in range(1, 101):
        scene.ended("a")
        assert scene.begun_of("a") == list(range(min(OF_A_SHARE + done, 100)))


def test_small_ones_do_not_pass_a_large_one(scene: Scene) -> None:
    scene.ask("a", *range(OF_A_SHARE - 1))
    scene.ask("a", 100, size=2 * MIB)
    scene.ask("a", 101, size=1)
    assert scene.begun_of("a") == list(range(OF_A_SHARE - 1))
    scene.ended("a")
    assert scene.begun_of("a")[-1] == 100
    scene.ended("a")
    assert scene.begun_of("a")[-1] == 101


def test_nothing_begins_while_the_link_has_enough_to_write(scene: Scene) -> None:
    scene.backlog = MAX_ANSWERS + 1
    scene.ask("a", 1)
    scene.ask("b", 1)
    scene.admission.go_on()
    assert scene.begun == []
    scene.backlog = MAX_ANSWERS
    scene.admission.go_on()
    assert scene.begun == [("a", 1), ("b", 1)]


def test_what_is_under_way_and_what_is_to_be_written_count_together(scene: Scene) -> None:
    scene.backlog = MAX_ANSWERS - 3 * MIB
    scene.ask("a", *range(10))
    assert scene.begun_of("a") == [0, 1, 2]
    scene.backlog += MIB  # the answer is with the link, and stays there
    scene.ended("a")
    assert scene.begun_of("a") == [0, 1, 2]
    scene.backlog -= MIB
    scene.admission.go_on()
    assert scene.begun_of("a") == [0, 1, 2, 3]


def test_shares_that_hang_leave_one_at_a_time_to_each_other(scene: Scene) -> None:
    hung = "abcdefgh"
    assert len(hung) * OF_A_SHARE > OF_ALL
    for share in hung:
        scene.ask(share, *range(1000))
    most = OF_ALL + len(hung)
    assert OF_ALL <= len(scene.begun) <= most
    scene.ask("z", *range(50))
    for done in range(1, 51):
        assert scene.begun_of("z") == list(range(done))
        scene.ended("z")


def test_a_share_with_something_under_way_waits_for_memory(scene: Scene) -> None:
    scene.memory = 0
    scene.ask("a", *range(4))
    assert scene.begun_of("a") == [0], "one goes without"
    scene.admission.go_on()
    assert scene.begun_of("a") == [0]
    scene.memory = MIB
    scene.admission.go_on()
    assert scene.begun_of("a") == [0, 1, 2, 3]


def test_who_waits_for_memory_goes_on_in_order(scene: Scene) -> None:
    scene.memory = MIB // 2
    scene.ask("a", 0)
    scene.ask("a", 1)
    scene.ask("a", 2, size=1)  # there would be memory for it
    assert scene.begun_of("a") == [0]
    scene.memory = MIB
    scene.admission.go_on()
    assert scene.begun_of("a") == [0, 1, 2]


def test_without_any_memory_every_share_goes_on_one_at_a_time(scene: Scene) -> None:
    scene.memory = 0
    for share in "abc":
        scene.ask(share, *range(10))
    for done in range(1, 10):
        for share in "abc":
            assert scene.begun_of(share) == list(range(done))
            scene.ended(share)
    assert {share: len(scene.begun_of(share)) for share in "abc"} == dict.fromkeys("abc", 10)


def test_a_share_that_hangs_with_all_memory_does_not_stop_another(scene: Scene) -> None:
    scene.ask("a", *range(OF_A_SHARE))
    scene.memory = 0
    scene.ask("b", *range(5))
    for done in range(1, 6):
        assert scene.begun_of("b") == list(range(done))
        scene.ended("b")
    assert len(scene.begun_of("a")) == OF_A_SHARE


def test_memory_is_not_enough_if_the_link_has_too_much_to_write(scene: Scene) -> None:
    scene.backlog = MAX_ANSWERS - MIB
    scene.ask("a", 0, 1)
    assert scene.begun_of("a") == [0]
    scene.backlog = 0
    scene.admission.go_on()
    assert scene.begun_of("a") == [0, 1]


def test_what_is_dropped_does_not_begin(scene: Scene) -> None:
    scene.ask("a", *range(OF_A_SHARE + 2))
    assert scene.admission.drop() == [("a", OF_A_SHARE), ("a", OF_A_SHARE + 1)]
    assert scene.admission.drop() == []
    for _ in range(OF_A_SHARE):
        scene.ended("a")
    assert len(scene.begun) == OF_A_SHARE
    scene.ask("a", 1000)
    assert scene.begun[-1] == ("a", 1000)


@pytest.mark.parametrize("seed", range(20))
def test_all_begin_once_in_their_shares_order_and_within_the_limit(scene: Scene, seed: int) -> None:
    chance = random.Random(seed)
    sizes: dict[tuple[str, int], int] = {}
    asked = dict.fromkeys("abcdef", 0)
    over = 0

    def under_way() -> int:
        return sum(sizes[item] for item in scene.begun[over:])

    def end_one() -> None:
        nonlocal over
        item = scene.begun[over]
        over += 1
        scene.backlog += sizes[item]
        scene.ended(item[0], sizes[item])

    for _ in range(2000):
        action = chance.random()
        if action < 0.5:
            share = chance.choice("abcdef")
            item = (share, asked[share])
            asked[share] += 1
            sizes[item] = chance.choice([1, 4096, MIB])
            scene.ask(share, item[1], size=sizes[item])
        elif action < 0.9 and over < len(scene.begun):
            end_one()
        elif action >= 0.9:
            scene.backlog = chance.randrange(scene.backlog + 1)
            scene.memory = chance.choice([0, MIB, MAX_ANSWERS])
            scene.admission.go_on()
        assert under_way() + scene.backlog <= MAX_ANSWERS + len(asked) * MIB
    while over < len(scene.begun):
        end_one()
        scene.backlog = 0
        scene.admission.go_on()
    assert {share: scene.begun_of(share) for share in asked} == {
        share: list(range(count)) for share, count in asked.items()
    }
