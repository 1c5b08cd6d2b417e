"""Large files ahead of the kernel: what is asked for, what is given, and what never is."""

from __future__ import annotations

import errno

import pytest

from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.readahead import IDLE, LEAST, MAX_HELD, MAX_STREAMS, MOST, SLOW
from protocol.bulk import MAX_RUN, SLOT
from protocol.files import Attributes, Changed, GetAttributes, Read, Write, Written
from tests.guest_agent.fuse.script import ATTRIBUTES, Asked, pack, replied
from tests.guest_agent.fuse.test_data import Shared

SIZE = 1 << 20
NODE = 5


def content(offset: int, size: int = SIZE) -> bytes:
    return (b"%d." % offset * size)[:size]


class Reader(Shared):
    """A guest that reads a file of ``end`` bytes, and a host that answers when it is told to."""

    end = 1 << 40

    def ask(self, offset: int, size: int = SIZE, node: int = NODE) -> int:
        return self.request(Opcode.READ, pack("QQIIQII", 0, offset, size, 0, 0, 0, 0), node=node)

    @property
    def asked(self) -> list[int]:
        """Offsets of the READs that wait for an answer."""
        return [asked.call.offset for asked in self.link.asked if isinstance(asked.call, Read)]

    def answer_one(self, index: int = 0) -> None:
        asked: Asked = self.link.asked.pop(index)
        assert isinstance(asked.call, Read)
        if frees := self.bulk.take_frees():
            self.peer.freed(frees)
        size = max(min(asked.call.size, self.end - asked.call.offset), 0)
        if size:
            self.answer(asked, content(asked.call.offset, size))
        else:
            asked.answer()

    def answer_all(self) -> None:
        while self.asked:
            self.answer_one()

    def read(self, offset: int, size: int = SIZE, node: int = NODE) -> bytes:
        """With all answers that it takes."""
        unique = self.ask(offset, size, node)
        self.answer_all()
        ((kind, answered, data),) = self.answers
        assert (kind, answered) == ("reply", unique)
        assert isinstance(data, bytes)
        return data

    def begin(self, count: int = 2) -> int:
        """Read so many MiB; returns where the next one begins."""
        for index in range(count):
            assert self.read(index * SIZE) == content(index * SIZE)
        return count * SIZE

    @property
    def held(self) -> int:
        """Slots that are not given back."""
        return self.bulk._held.bit_count()


def test_the_third_of_a_row_is_there_before_it_is_asked_for() -> None:
    it = Reader()
    it.read(0)
    unique = it.ask(SIZE)
    assert it.asked == [SIZE, 2 * SIZE]
    it.answer_all()
    assert it.answers == replied(unique, content(SIZE))
    unique = it.ask(2 * SIZE)
    assert it.answers == replied(unique, content(2 * SIZE))
    assert it.asked == [3 * SIZE, 4 * SIZE]


def test_the_more_is_read_the_more_is_ahead_up_to_a_limit() -> None:
    it = Reader()
    offset = it.begin(8)
    assert it.host.read_ahead == MOST * SIZE <= MAX_HELD
    it.ask(offset)
    assert it.asked == [offset + MOST * SIZE]


def test_one_on_its_way_is_waited_for() -> None:
    it = Reader()
    it.read(0)
    first = it.ask(SIZE)
    it.answer_one()
    assert it.answers == replied(first, content(SIZE))
    second = it.ask(2 * SIZE)
    assert it.answers == []
    it.answer_one()
    assert it.answers == replied(second, content(2 * SIZE))


@pytest.mark.parametrize("offsets", [[0, 2, 4, 6, 1], [5, 4, 3, 2], [0, 0, 0]])
def test_who_reads_here_and_there_pays_nothing(offsets: list[int]) -> None:
    it = Reader()
    for number in offsets:
        it.ask(number * SIZE)
        assert it.asked == [number * SIZE]
        it.answer_all()
    assert it.host.read_ahead == it.held == 0


def test_nor_who_reads_little_at_a_time() -> None:
    it = Reader()
    for number in range(10):
        it.ask(number * 4096, 4096)
        it.answer_all()
    assert it.host.read_ahead == 0
    assert LEAST > 4096


def test_who_goes_elsewhere_gives_all_of_it_back() -> None:
    it = Reader()
    offset = it.begin(4)
    assert it.read(offset) == content(offset)
    assert it.held
    it.read(100 * SIZE)
    assert it.host.read_ahead == it.held == 0


def test_several_files_have_their_own() -> None:
    it = Reader()
    for index in range(6):
        for node in (5, 6):
            assert it.read(index * SIZE, node=node) == content(index * SIZE)


def test_all_of_them_have_only_so_much() -> None:
    it = Reader()
    for index in range(6):
        for node in range(5, 15):
            it.read(index * SIZE, node=node)
            assert it.host.read_ahead <= MAX_HELD
    assert it.held * SLOT <= MAX_HELD


def test_the_end_of_a_file() -> None:
    it = Reader()
    it.end = 5 * SIZE + 1000
    offset = it.begin(5)
    assert it.read(offset, 4096) == content(offset, 1000)
    it.timers.fire()
    it.timers.fire()
    assert it.host.read_ahead == it.held == 0


def test_beyond_a_size_that_is_promised_nothing_is_asked_for() -> None:
    it = Reader()
    it.end = 3 * SIZE
    attr = ATTRIBUTES[:8] + it.end.to_bytes(8, "little") + ATTRIBUTES[16:]
    it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=NODE)
    it.take().answer(Attributes(attr, promise=3))
    it.answers  # noqa: B018  (what was said so far)
    offsets = []
    for index in range(3):
        it.ask(index * SIZE)
        offsets += it.asked
        it.answer_all()
    assert sorted(offsets) == [0, SIZE, 2 * SIZE]


# --- what ends it --------------------------------------------------------------------------------------


def change(it: Reader, how: str) -> None:
    """Of the file, with all answers but those to READs that wait."""
    if how == "changed":
        it.volume.take_back(Changed(7, nodes=[NODE], through=[0]))
    elif how == "written":
        it.request(Opcode.WRITE, pack("QQIIQII", 0, 0, 1, 0, 0, 0, 0) + b"x", node=NODE)
        [write] = [asked for asked in it.link.asked if isinstance(asked.call, Write)]
        it.link.asked.remove(write)
        write.answer(Written(1, 0, ATTRIBUTES))
    elif how in ("stale", "unpromised"):
        it.request(Opcode.GETATTR, pack("IIQ", 0, 0, 0), node=NODE)
        [get] = [asked for asked in it.link.asked if isinstance(asked.call, GetAttributes)]
        it.link.asked.remove(get)
        get.answer(Attributes(ATTRIBUTES, stale=how == "stale", promise=3 if how == "stale" else 0))
        while it.notifier.waiting:
            it.notifier.finish()
    else:
        it.volume.void()
    it.answers  # noqa: B018  (what was said so far)


CHANGES = ("changed", "written", "stale", "unpromised", "void")


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_here_when_the_file_changes_is_not_given(how: str) -> None:
    it = Reader()
    offset = it.begin(4)
    assert it.held
    change(it, how)
    assert it.host.read_ahead == it.held == 0
    it.ask(offset)
    assert it.asked == [offset]


@pytest.mark.parametrize("how", CHANGES)
def test_nor_is_what_was_on_its_way(how: str) -> None:
    it = Reader()
    it.read(0)
    it.ask(SIZE)
    it.answer_one()
    assert it.asked == [2 * SIZE]
    change(it, how)
    unique = it.ask(2 * SIZE)
    assert it.asked == [2 * SIZE, 2 * SIZE]
    it.answer_one()
    assert it.host.read_ahead == it.held == 0
    assert it.answers == []
    it.answer_one()
    assert it.answers == replied(unique, content(2 * SIZE))


def test_who_waits_for_one_that_is_dropped_asks_the_host() -> None:
    it = Reader()
    it.read(0)
    it.ask(SIZE)
    it.answer_one()
    it.answers  # noqa: B018  (what was said so far)
    unique = it.ask(2 * SIZE)
    change(it, "changed")
    it.answer_one()
    assert it.answers == []
    assert 2 * SIZE in it.asked
    it.answer_all()
    assert it.answers == replied(unique, content(2 * SIZE))


def test_one_that_fails_is_asked_for_by_who_needs_it() -> None:
    it = Reader()
    it.read(0)
    it.ask(SIZE)
    it.link.asked.pop(1).fail(errno.EIO)
    it.answer_all()
    it.answers  # noqa: B018  (what was said so far)
    unique = it.ask(2 * SIZE)
    while it.asked:
        it.answer_one(it.asked.index(2 * SIZE) if 2 * SIZE in it.asked else 0)
    assert replied(unique, content(2 * SIZE))[0] in it.answers


def test_a_caller_that_dies_is_let_go() -> None:
    it = Reader()
    it.read(0)
    it.ask(SIZE)
    it.answer_one()
    it.answers  # noqa: B018  (what was said so far)
    unique = it.ask(2 * SIZE)
    it.dying.add(42)
    it.request(Opcode.INTERRUPT, pack("Q", unique), unique=unique | 1)
    assert [asked.call.unique for asked in it.link.asked].count(unique) == 1  # type: ignore[attr-defined]
    it.host.let_the_dying_go()
    assert it.answers == [("fail", unique, errno.EINTR)]
    it.answer_all()
    assert it.held * SLOT == it.host.read_ahead == 2 * SIZE


def test_a_session_that_ends_leaves_no_slot() -> None:
    it = Reader()
    offset = it.begin(4)
    it.ask(offset)
    it.volume.void()
    it.end_session()
    it.next_session()
    it.answer_all()
    assert it.held == it.host.read_ahead == 0
    assert not it.bulk.in_use


def test_who_stops_to_read_leaves_nothing() -> None:
    it = Reader()
    it.begin(4)
    assert it.timers.fire() == IDLE
    assert it.held  # it was read meanwhile
    it.timers.fire()
    assert it.held == it.host.read_ahead == 0
    assert it.timers.waiting == []


def test_what_is_on_its_way_is_waited_for_however_long_that_takes() -> None:
    it = Reader()
    offset = it.begin(4)
    unique = it.ask(offset)
    before = len(it.asked)
    for _ in range(3):
        assert it.timers.fire() == IDLE
    assert len(it.asked) == before
    it.answer_all()
    assert it.answers == replied(unique, content(offset))


def test_over_a_slow_way_less_is_asked_for_until_it_is_faster() -> None:
    it = Reader()
    now = 0.0
    it.volume.readahead._clock = lambda: now
    offset = it.begin(MOST)
    counts = []
    for seconds in [SLOW + 1] * 6 + [SLOW / 2] * 6:
        it.ask(offset)
        offset += SIZE
        now += seconds
        it.answer_all()
        counts.append(len(it.volume.readahead._streams[NODE].pieces))
    assert counts[5] == 1
    assert counts[-1] == MOST


def test_without_memory_it_is_the_same() -> None:
    it = Reader()
    it.bulk.end()
    for index in range(6):
        unique = it.ask(index * SIZE)
        while it.link.asked:
            asked = it.take()
            asked.answer(payload=content(asked.call.offset))  # type: ignore[attr-defined]
        assert it.answers == replied(unique, content(index * SIZE))


def test_only_so_many_files_are_followed() -> None:
    it = Reader()
    for node in range(5, 5 + 2 * MAX_STREAMS):
        it.read(0, 4096, node)
    assert len(it.volume.readahead._streams) == MAX_STREAMS
    assert MAX_RUN >= SIZE
