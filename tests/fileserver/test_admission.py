"""Calls with large answers: how many begin, with memory and without, in which order, and that nobody waits for ever."""

from __future__ import annotations

import mmap
import random

import pytest

from fileserver.admission import MAX_ANSWERS, MAX_OF_A_SHARE, PATIENCE, Admission, Room
from protocol.bulk import SLOT, Bulk, Run

MIB = 1 << 20
SLOTS = 128
OF_A_MIB = MIB // SLOT

Item = tuple[str, int]


class Scene:
    """Shares are letters, items are (share, number). ``backlog`` is the link's."""

    def __init__(self) -> None:
        self.backlog = 0
        self.begun: list[Item] = []
        self.rooms: dict[Item, Room] = {}  # of those that are not over
        self.bulk = Bulk()
        self.bulk.attach(memoryview(mmap.mmap(-1, SLOTS * SLOT)), memoryview(b""))
        self.admission: Admission[Item] = Admission(self._begin, lambda: self.backlog, self.bulk)
        self.bulk.on_room = self.admission.go_on

    def _begin(self, item: Item, room: Room) -> None:
        assert room.slots == (0 if room.run is None else room.run.slots)
        self.begun.append(item)
        self.rooms[item] = room

    def ask(self, share: str, *numbers: int, size: int = MIB, shareable: bool = False) -> None:
        for number in numbers:
            self.admission.ask(share, size, (share, number), shareable=shareable)

    def read(self, share: str, *numbers: int, size: int = MIB) -> None:
        self.ask(share, *numbers, size=size, shareable=True)

    def ended(self, share: str) -> bytes:
        """The first of the share's is over. What the peer may give back now."""
        item = next(item for item in self.rooms if item[0] == share)
        room, mask = self.rooms.pop(item), 0
        if (run := room.run) is not None:
            run.length = room.size
            mask = ((1 << run.slots) - 1) << run.first
            if self.bulk.active:
                self.bulk.lend(run)
            else:
                run.give_back()
        self.admission.ended(room)
        self.admission.go_on()
        return mask.to_bytes(SLOTS // 8, "little")

    def begun_of(self, share: str) -> list[int]:
        return [number for of, number in self.begun if of == share]

    def filled_of(self, share: str) -> int:
        """Slots of the share's calls."""
        return sum(room.slots for item, room in self.rooms.items() if item[0] == share)

    def inline_of(self, share: str) -> list[int]:
        """Those under way without memory."""
        return [item[1] for item, room in self.rooms.items() if item[0] == share and room.run is None]

    def nothing_comes_back(self) -> None:
        """For 50 ms, which the link watches."""
        assert self.bulk.wanted
        self.bulk.stuck = True
        self.admission.go_on()


@pytest.fixture
def scene() -> Scene:
    """Without memory."""
    return Scene()


@pytest.fixture
def shared(scene: Scene) -> Scene:
    scene.bulk.begin(b"")
    return scene


def lent(bulk: Bulk, slots: int) -> bytes:
    """Lend so many slots, in runs; they are the peer's to give back."""
    mask = 0
    while slots:
        run: Run | None = bulk.take(min(slots, OF_A_MIB) * SLOT)
        assert run is not None
        run.length = run.slots * SLOT
        slots -= run.slots
        mask |= ((1 << run.slots) - 1) << run.first
        bulk.lend(run)
    return mask.to_bytes(SLOTS // 8, "little")


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


def test_shares_that_wait_take_turns(scene: Scene) -> None:
    scene.backlog = MAX_ANSWERS + 1
    for share in "abc":
        scene.ask(share, 1, 2)
    scene.backlog = MAX_ANSWERS - 4 * MIB
    scene.admission.go_on()
    assert scene.begun == [("a", 1), ("b", 1), ("c", 1), ("a", 2)]
    for share in "abc":
        scene.ended(share)
    assert scene.begun[4:] == [("b", 2), ("c", 2)]


# --- memory ----------------------------------------------------------------------------------------


def test_who_hangs_ends_up_with_half_of_what_is_free_and_the_last_one_finds_some(shared: Scene) -> None:
    for share in "abcd":
        shared.read(share, *range(1000), size=SLOT)
    assert [shared.filled_of(share) for share in "abcd"] == [64, 32, 16, 8]
    shared.read("z", *range(5), size=4 * SLOT)
    assert shared.begun_of("z") == [0], "the first has twice as much as one may fill that has some already"
    for done in range(5):
        shared.bulk.freed(shared.ended("z"))
        assert shared.begun_of("z") == list(range(min(done + 2, 5)))
        assert not shared.inline_of("z")


def test_a_call_of_one_byte_counts_as_the_slot_that_it_fills(shared: Scene) -> None:
    for share in "ab":
        shared.read(share, *range(1000), size=1)
    assert [shared.filled_of(share) for share in "ab"] == [64, 32]
    assert shared.bulk.free == 32


def test_one_that_fills_nothing_waits_for_the_last_slots_no_more_than_for_others(shared: Scene) -> None:
    lent(shared.bulk, SLOTS - OF_A_MIB)
    shared.read("a", 0, 1)
    assert shared.begun_of("a") == [0]
    assert shared.filled_of("a") == OF_A_MIB
    assert shared.bulk.free == 0


def test_a_read_waits_for_memory_and_begins_when_it_comes_back(shared: Scene) -> None:
    everything = lent(shared.bulk, SLOTS)
    shared.read("a", 0, 1)
    shared.admission.go_on()
    assert shared.begun == []
    shared.bulk.freed(everything)
    assert shared.begun_of("a") == [0, 1]
    assert not shared.inline_of("a")


def test_who_fills_its_part_begins_when_it_is_more(shared: Scene) -> None:
    """Though nothing of its own comes to an end."""
    rest = lent(shared.bulk, SLOTS - 3 * OF_A_MIB)
    shared.read("a", 0, 1, 2)
    assert shared.begun_of("a") == [0, 1], "there is memory for the third, but it is for others"
    assert shared.bulk.free == OF_A_MIB
    shared.bulk.freed(rest)
    assert shared.begun_of("a") == [0, 1, 2]


def test_what_comes_back_from_a_disk_that_gave_less_lets_others_begin(shared: Scene) -> None:
    lent(shared.bulk, SLOTS - OF_A_MIB)
    shared.read("a", 0)
    shared.read("b", 0)
    assert shared.begun_of("b") == []
    run = shared.rooms["a", 0].run
    assert run is not None
    run.give_back()
    assert shared.begun_of("b") == [0]


def test_if_nothing_comes_back_reads_go_on_without(shared: Scene) -> None:
    everything = lent(shared.bulk, SLOTS)
    shared.read("a", *range(4))
    shared.read("b", 0)
    assert shared.begun == []
    shared.nothing_comes_back()
    assert shared.inline_of("a") == [0, 1, 2, 3]
    assert shared.inline_of("b") == [0]
    shared.read("b", 1)
    assert shared.inline_of("b") == [0, 1], "nobody waits again for what has not come"
    shared.bulk.freed(everything)
    shared.read("b", 2)
    assert shared.begun_of("b") == [0, 1, 2]
    assert shared.inline_of("b") == [0, 1]


def test_without_memory_as_many_are_under_way_as_the_link_may_have_to_write(shared: Scene) -> None:
    lent(shared.bulk, SLOTS)
    shared.read("a", *range(100))
    shared.nothing_comes_back()
    assert shared.inline_of("a") == list(range(OF_A_SHARE))
    shared.ended("a")
    assert shared.inline_of("a") == list(range(1, OF_A_SHARE + 1))


def test_if_nothing_comes_back_one_with_its_part_leaves_the_rest_to_others(shared: Scene) -> None:
    shared.read("a", *range(40), size=SLOT)
    lent(shared.bulk, SLOTS - 80)
    shared.read("a", 40, size=SLOT)
    assert len(shared.begun_of("a")) == 40
    shared.nothing_comes_back()
    assert shared.inline_of("a") == [40]
    shared.read("b", 0)
    assert shared.filled_of("b") == OF_A_MIB


def test_one_that_is_never_given_enough_does_not_wait_for_ever(shared: Scene) -> None:
    """Every eighth slot hangs, and others go on reading by single slots: there is no room for a long run."""
    runs = [shared.bulk.take(SLOT) for _ in range(SLOTS)]
    for run in runs:
        assert run is not None
        if run.first % OF_A_MIB:
            run.give_back()
    shared.read("a", 0)
    for _ in range(PATIENCE - 1):
        shared.bulk.freed(lent(shared.bulk, 1))
        assert shared.begun_of("a") == []
    shared.bulk.freed(lent(shared.bulk, 1))
    assert shared.inline_of("a") == [0]


def test_who_waits_for_memory_goes_on_in_order(shared: Scene) -> None:
    most = lent(shared.bulk, SLOTS - 1)
    shared.read("a", 0)
    shared.read("a", 1, size=SLOT)  # there would be memory for it
    shared.ask("a", 2)  # and this one needs none
    assert shared.begun_of("a") == []
    shared.ask("b", 0)
    assert shared.begun_of("b") == [0]
    shared.bulk.freed(most)
    assert shared.begun_of("a") == [0, 1, 2]


def test_memory_is_not_enough_if_the_link_has_too_much_to_write(shared: Scene) -> None:
    shared.backlog = MAX_ANSWERS - MIB
    shared.read("a", 0, 1)
    assert shared.begun_of("a") == [0]
    assert shared.bulk.free == SLOTS - OF_A_MIB, "who waits for the link has taken nothing"
    shared.backlog = 0
    shared.admission.go_on()
    assert shared.begun_of("a") == [0, 1]


def test_where_there_is_no_memory_nobody_waits_for_it(scene: Scene) -> None:
    scene.read("a", 0, 1)
    assert scene.inline_of("a") == [0, 1]
    assert not scene.bulk.wanted


def test_a_session_that_ends_leaves_its_runs_to_those_who_fill_them(shared: Scene) -> None:
    shared.read("a", *range(20))
    filled = shared.filled_of("a")
    shared.bulk.end()
    assert shared.admission.drop()
    shared.bulk.begin(b"")
    assert shared.bulk.free == SLOTS - filled
    shared.read("b", *range(20))
    assert shared.filled_of("b") == filled // 2
    while shared.rooms:
        shared.bulk.freed(shared.ended(next(iter(shared.rooms))[0]))
    assert shared.bulk.free == SLOTS


# --- the end ---------------------------------------------------------------------------------------


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
def test_all_begin_once_in_their_shares_order_and_within_the_limits(scene: Scene, seed: int) -> None:
    chance = random.Random(seed)
    asked = dict.fromkeys("abcdef", 0)
    unread: list[bytes] = []
    if seed % 4:
        scene.bulk.begin(b"")

    def end_one() -> None:
        share, number = chance.choice(list(scene.rooms))
        room = scene.rooms[share, number]
        if room.run is None:
            scene.backlog += room.size
        if any(slots := scene.ended(share)):
            unread.append(slots)

    def give_back() -> None:
        if unread:
            scene.bulk.freed(unread.pop(chance.randrange(len(unread))))

    for _ in range(2000):
        action = chance.random()
        if action < 0.5:
            share = chance.choice("abcdef")
            size = chance.choice([1, 4096, SLOT, MIB])
            scene.ask(share, asked[share], size=size, shareable=chance.random() < 0.8)
            asked[share] += 1
        elif action < 0.8 and scene.rooms:
            end_one()
        elif action < 0.95:
            give_back()
        else:
            scene.backlog = chance.randrange(scene.backlog + 1)
            scene.bulk.stuck = chance.random() < 0.3
            scene.admission.go_on()
        under_way = sum(room.size for room in scene.rooms.values())
        assert under_way + scene.backlog <= MAX_ANSWERS + len(asked) * MIB
        assert sum(map(scene.filled_of, asked)) + scene.bulk.free <= SLOTS
    while scene.rooms or unread:
        if scene.rooms:
            end_one()
        give_back()
        scene.backlog = 0
        scene.admission.go_on()
    assert {share: scene.begun_of(share) for share in asked} == {
        share: list(range(count)) for share, count in asked.items()
    }
    assert scene.bulk.free == (SLOTS if seed % 4 else 0)
    assert not scene.bulk.in_use
