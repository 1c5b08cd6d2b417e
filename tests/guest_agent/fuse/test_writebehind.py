"""Writes that are answered before the host has them: when, what comes of them, and what is believed meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from guest_agent.fence import Unfenced, open_reader, open_writer
from guest_agent.fuse import bodies
from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.host import MAX_GATHERED, Host
from guest_agent.fuse.writebehind import BURST, MAX_BYTES, MAX_CALLS, MAX_FILES, WriteBehind
from protocol.files import (
    ATTR,
    ATTRIBUTES,
    Attributes,
    Changed,
    Renewed,
    Sync,
    Write,
    Written,
)
from tests.guest_agent.fuse.script import Asked, Script, ScriptedLink, failed, pack, replied

NODE, OTHER = 9, 10
ROOM = 1 << 40
GETATTR = pack("IIQ", 0, 0, 0)
FSYNC = pack("QII", 0, 0, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def attr(size: int) -> bytes:
    return ATTR.pack(1, size, 8, 0, 7, 9, 0, 8, 0, 0o100644, 1, 0, 0, 0, 4096, 0)


def written(size: int, offset: int, room: int = ROOM) -> Written:
    return Written(size, offset, attr(offset + size), room)


# --- when ------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def it(clock: Clock) -> WriteBehind:
    """A mount with one file that has just been written."""
    it = WriteBehind(clock)
    it.took(NODE, written(10, 0))
    return it


def test_what_follows_in_a_burst_need_not_wait(it: WriteBehind, clock: Clock) -> None:
    assert it.may(NODE, 10, os.O_WRONLY | os.O_APPEND)
    clock.now += 0.9 * BURST
    assert it.may(NODE, 10, 0)


def test_the_first_write_of_a_file_waits(it: WriteBehind) -> None:
    assert not it.may(OTHER, 10, 0)


def test_one_of_a_file_that_was_just_made_need_not(it: WriteBehind) -> None:
    it.made(OTHER)
    assert it.may(OTHER, 10, 0)


def test_a_write_some_time_after_the_last_one_waits(it: WriteBehind, clock: Clock) -> None:
    clock.now += 1.1 * BURST
    assert not it.may(NODE, 10, 0)


def test_a_burst_lasts_while_some_of_it_is_under_way(it: WriteBehind, clock: Clock) -> None:
    it.begin(NODE, 10)
    clock.now += 10 * BURST
    assert it.may(NODE, 10, 0)
    it.end(NODE, 10)
    assert not it.may(NODE, 10, 0)


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC, os.O_DIRECT])
def test_who_has_asked_to_wait_waits(it: WriteBehind, flags: int) -> None:
    assert not it.may(NODE, 10, os.O_WRONLY | flags)


@pytest.mark.parametrize(
    "end",
    [
        lambda it: it.changed(Changed(7, nodes=[OTHER, NODE], through=[1, 1])),
        lambda it: it.forgotten([NODE]),
        lambda it: it.void(),
        lambda it: it.wait_for(NODE),
        lambda it: it.lost(NODE, errno.EIO),
        lambda it: it.took(OTHER, written(1, 0, room=9)),
    ],
    ids=["changed", "forgotten", "void", "wait_for", "lost", "no room"],
)
def test_what_makes_the_next_one_wait(it: WriteBehind, end: Callable[[WriteBehind], None]) -> None:
    end(it)
    assert not it.may(NODE, 10, 0)


def test_a_change_of_another_file_does_not(it: WriteBehind) -> None:
    it.changed(Changed(7, nodes=[OTHER], through=[1]))
    assert it.may(NODE, 10, 0)


def test_no_more_is_answered_for_than_there_is_room_for(it: WriteBehind) -> None:
    it.took(NODE, written(10, 10, room=25))
    assert it.may(NODE, 25, 0)
    it.begin(NODE, 10)
    assert it.may(NODE, 15, 0)
    assert not it.may(NODE, 16, 0)
    it.end(NODE, 10)
    assert it.may(NODE, 16, 0)


def test_a_bounded_part_is_under_way(it: WriteBehind) -> None:
    assert not it.may(NODE, MAX_BYTES + 1, 0)
    for _ in range(MAX_CALLS):
        assert it.may(NODE, 1, 0)
        it.begin(NODE, 1)
    assert not it.may(NODE, 1, 0)


def test_what_is_known_of_files_is_bounded(it: WriteBehind) -> None:
    for node in range(100, 100 + MAX_FILES):
        it.took(node, written(1, 0))
        it.lost(node + MAX_FILES, errno.EIO)
    assert not it.may(NODE, 10, 0)
    it.lost(5, errno.EIO)
    assert [node for node in range(100, 101 + MAX_FILES) if not it.take_error(node + MAX_FILES)] == [
        100,
        100 + MAX_FILES,
    ]


# --- on the way ------------------------------------------------------------------------------------


class Fence(Unfenced):
    shared = True

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self, call: bytes = b"", payload: bytes | memoryview = b"") -> int:
        self.log.append("begin")
        return len(self.log)

    def end(self, ticket: int) -> None:
        self.log.append(f"end {ticket}")


class Writing(Script):
    """A guest whose file was written a moment ago: 10 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.host.fence = self.fence = Fence()
        self.volume.behind._clock = self.clock = Clock()
        first, asked = self.write(b"x" * 10, 0)
        assert asked.call == Write(7, first, NODE, 0)
        assert self.answers == []
        asked.answer(written(10, 0))
        assert self.answers == replied(first, pack("II", 10, 0))

    def write(self, data: bytes, offset: int, flags: int = 0, node: int = NODE) -> tuple[int, Asked]:
        unique = self.request(
            Opcode.WRITE, pack("QQIIQII", 0, offset, len(data), 0, 0, flags, 0) + data, node
        )
        return unique, self.link.asked[-1]

    def ahead(self, data: bytes = b"y" * 5, offset: int = 10, flags: int = 0) -> Asked:
        """One that is answered before the host has it."""
        unique, asked = self.write(data, offset, flags)
        assert self.answers == replied(unique, pack("II", len(data), 0))
        append = bool(flags & os.O_APPEND)
        assert asked.call == Write(7, unique, NODE, offset, append, False, True)
        assert asked.payload == data
        return asked

    def dropped(self) -> list[int]:
        return [node for node, _ in self.notifier.waiting]


def test_it_is_answered_once_and_the_host_has_the_last_word() -> None:
    script = Writing()
    asked = script.ahead()
    assert script.fence.log == ["begin"]
    asked.answer(written(5, 10))
    assert script.answers == []
    assert script.fence.log == ["begin", "end 1"]
    assert script.dropped() == []
    assert not script.volume.behind.among([NODE])


def test_where_the_guest_agent_would_not_know_it_is_waited_for() -> None:
    script = Writing()
    script.fence.shared = False
    script.write(b"y" * 5, 10)
    assert script.answers == []


def test_what_has_not_left_whole_is_waited_for() -> None:
    script = Writing()
    script.link.stuck = 1
    unique, asked = script.write(b"y" * 5, 10)
    assert script.answers == []
    assert script.fence.log == []
    asked.answer(written(5, 10))
    assert script.answers == replied(unique, pack("II", 5, 0))


def test_at_the_end_of_the_agent_it_is_waited_for() -> None:
    script = Writing()
    script.host.answers_ahead = False
    script.write(b"y" * 5, 10)
    assert script.answers == []
    assert not script.host.is_ahead


def test_what_is_ahead_is_so_while_the_host_is_there() -> None:
    script = Writing()
    script.ahead()
    assert script.host.is_ahead
    script.lose_host()
    assert not script.host.is_ahead, "nobody will answer"
    script.find_host()
    assert script.host.is_ahead
    script.link.take().answer(written(5, 10))
    assert not script.host.is_ahead


def test_a_page_of_a_mapping_is_waited_for() -> None:
    script = Writing()
    script.request(Opcode.WRITE, pack("QQIIQII", 0, 10, 5, bodies.WRITE_CACHE, 0, 0, 0) + b"y" * 5, NODE)
    assert script.answers == []
    call = script.take().call
    assert isinstance(call, Write)
    assert not call.ahead


def test_several_mounts_of_a_share_wait() -> None:
    script = Writing()
    script.volumes.add(script.volume.__class__(7, script.host, script.notifier, script.timers, salt=1))  # type: ignore[arg-type]
    script.write(b"y" * 5, 10)
    assert script.answers == []


@pytest.mark.parametrize("how", ["write", "fsync"])
def test_what_is_lost_is_said_once_to_who_writes_or_syncs_next(how: str) -> None:
    script = Writing()
    script.ahead().fail(errno.EDQUOT)
    assert script.answers == []
    assert script.fence.log == ["begin", "end 1"]
    assert script.dropped() == [NODE], "what the kernel has is not in the file"
    if how == "write":
        unique = script.request(Opcode.WRITE, pack("QQIIQII", 0, 15, 1, 0, 0, 0, 0) + b"z", NODE)
        assert script.answers == failed(unique, "EDQUOT")
    else:
        unique = script.request(Opcode.FSYNC, FSYNC, NODE)
        asked = script.link.asked[-1]
        assert asked.call == Sync(7, unique, NODE, False)
        asked.answer()
        assert script.answers == failed(unique, "EDQUOT")
    unique, asked = script.write(b"z", 15)
    assert script.answers == [], "and nothing is answered for until the host has taken one"
    asked.answer(written(1, 15))
    assert script.answers == replied(unique, pack("II", 1, 0))


def test_an_fsync_that_fails_itself_says_so_and_nothing_is_left_to_say() -> None:
    script = Writing()
    script.ahead().fail(errno.EDQUOT)
    unique = script.request(Opcode.FSYNC, FSYNC, NODE)
    script.link.asked[-1].fail(errno.EIO)
    assert script.answers == failed(unique, "EIO")
    script.write(b"z", 15)
    assert script.answers == []


def test_half_of_it_is_lost_too() -> None:
    script = Writing()
    script.ahead().answer(written(3, 10))
    assert script.dropped() == [NODE]
    unique = script.request(Opcode.WRITE, pack("QQIIQII", 0, 15, 1, 0, 0, 0, 0) + b"z", NODE)
    assert script.answers == failed(unique, "ENOSPC")


def test_an_append_that_went_elsewhere_is_forgotten_by_the_kernel_and_the_next_one_waits() -> None:
    script = Writing()
    script.ahead(flags=os.O_APPEND).answer(written(5, 50))
    assert script.dropped() == [NODE]
    unique, asked = script.write(b"z", 15, os.O_APPEND)
    assert script.answers == []
    script.notifier.finish()
    asked.answer(written(1, 55))
    script.notifier.finish()
    assert ("reply", unique, pack("II", 1, 0)) in script.answers


def test_an_answer_that_makes_no_sense_is_a_loss() -> None:
    script = Writing()
    script.ahead().answer(Sync(7, 1, 1))
    unique = script.request(Opcode.FSYNC, FSYNC, NODE)
    script.link.asked[-1].answer()
    assert script.answers == failed(unique, "EIO")


# --- sessions --------------------------------------------------------------------------------------


def test_it_is_asked_again_until_it_is_answered_however_long_that_takes() -> None:
    script = Writing()
    call = script.ahead().call
    script.lose_host()
    script.host.give_up()
    assert script.answers == []
    assert script.dropped() == [], "nothing is lost"
    script.find_host()
    asked = script.take()
    assert (asked.call, asked.payload) == (call, b"y" * 5)
    asked.answer(written(5, 10))
    assert script.fence.log == ["begin", "end 1"]
    script.request(Opcode.FSYNC, FSYNC, NODE)
    script.link.asked[-1].answer()
    assert [answer[0] for answer in script.answers] == ["reply"]


def test_the_order_is_kept_across_sessions() -> None:
    script = Writing()
    first, second = script.ahead(b"a", 10).call, script.ahead(b"b", 11).call
    script.lose_host()
    script.find_host()
    assert script.link.calls == [first, second]


def test_the_next_session_begins_with_waiting() -> None:
    script = Writing()
    script.lose_host()
    script.volume.void()
    script.find_host()
    script.write(b"y" * 5, 10)
    assert script.answers == []


def test_what_finds_no_room_to_outlive_us_is_waited_for() -> None:
    script = Writing()
    script.fence.begin = lambda call=b"", payload=b"": 0  # type: ignore[method-assign]
    unique, asked = script.write(b"y" * 5, 10)
    assert script.answers == []
    asked.answer(written(5, 10))
    assert script.answers == replied(unique, pack("II", 5, 0))


def test_a_successor_asks_for_it_as_it_was_and_before_all_else(tmp_path: Path) -> None:
    """Both were killed before the host had it."""
    script = Writing()
    script.host.fence = open_writer(tmp_path / "fence")
    calls = [script.ahead(b"one", 10).call, script.ahead(b"two", 13).call]
    successor = Host(fence=open_writer(tmp_path / "fence"))
    reader = open_reader(tmp_path / "fence")
    assert reader is not None
    successor.ask_again_for(successor.fence.left, {7})
    link = ScriptedLink()
    successor.attach(link)
    assert link.calls == calls
    assert [asked.payload for asked in link.asked] == [b"one", b"two"]
    link.take().answer(written(3, 10))
    assert reader.mark() != 0
    link.take().fail(errno.EIO)
    assert reader.mark() == 0


def test_what_no_mount_is_left_of_is_not_asked_for(tmp_path: Path) -> None:
    script = Writing()
    script.host.fence = open_writer(tmp_path / "fence")
    script.ahead()
    successor = Host(fence=open_writer(tmp_path / "fence"))
    successor.ask_again_for(successor.fence.left, {8})
    link = ScriptedLink()
    successor.attach(link)
    assert link.calls == []


def test_small_ones_leave_with_the_hosts_next_answer(tmp_path: Path) -> None:
    script = Writing()
    script.host.fence = open_writer(tmp_path / "fence")
    first = script.ahead(b"one", 10)
    assert script.link.gathered == 0, "nothing is on its way that could be waited for"
    script.ahead(b"two", 13)
    assert script.link.gathered == 3
    script.ahead(b"l" * 4096, 16)
    assert script.link.gathered == 0, "a large one leaves at once, and takes along what waits"
    first.answer(written(3, 10))
    script.ahead(b"three", 16 + 4096)
    assert script.link.gathered == 5
    for asked in script.link.asked[2:]:
        call = asked.call
        assert isinstance(call, Write)
        asked.answer(written(len(asked.payload), call.offset))
    script.ahead(b"four", 5000)
    assert script.link.gathered == 0


def test_so_much_is_gathered(tmp_path: Path) -> None:
    script = Writing()
    script.host.fence = open_writer(tmp_path / "fence")
    script.ahead()
    sizes = []
    for number in range(10):
        script.ahead(b"g" * 2000, 10 + number)
        sizes.append(script.link.gathered)
    assert max(sizes) == MAX_GATHERED - MAX_GATHERED % 2000
    assert sizes.count(0) == 2, "all leaves with what finds no room"


def test_what_would_not_outlive_us_is_not_gathered(tmp_path: Path) -> None:
    script = Writing()
    script.host.fence = open_writer(tmp_path / "fence", spooled=False)
    script.ahead()
    script.ahead()
    assert script.link.gathered == 0


def test_what_was_gathered_when_the_session_ended_is_sent_in_the_next(tmp_path: Path) -> None:
    script = Writing()
    script.host.fence = open_writer(tmp_path / "fence")
    calls = [script.ahead(b"one", 10).call, script.ahead(b"two", 13).call]
    script.lose_host()
    script.find_host()
    assert script.link.calls == calls
    assert script.link.gathered == 0


# --- what is believed meanwhile --------------------------------------------------------------------


def promise(script: Script, size: int) -> None:
    """The host tells what the file is like, without being asked."""
    script.volume.renew(Renewed(7, [NODE], [attr(size)], files=[NODE], contents=[b"o" * size]))


def asks(script: Script, opcode: Opcode, body: bytes) -> bool:
    """Whether a request about the file takes a call to the host."""
    before = len(script.link.asked)
    script.request(opcode, body, NODE)
    return len(script.link.asked) > before


READ = pack("QQIIQII", 0, 0, 4096, 0, 0, 0, 0)


def test_what_the_host_said_before_it_had_the_write_is_not_believed() -> None:
    script = Writing()
    promise(script, 10)
    asked = script.ahead()
    promise(script, 10)
    assert asks(script, Opcode.GETATTR, GETATTR)
    assert asks(script, Opcode.READ, READ)
    asked.answer(written(5, 10))
    promise(script, 15)
    assert not asks(script, Opcode.GETATTR, GETATTR)
    assert not asks(script, Opcode.READ, READ)


def test_a_name_that_came_with_what_is_not_believed_is_given_back() -> None:
    script = Writing()
    script.ahead()
    script.volume.renew(Renewed(7, [NODE], [attr(10)], [1], [b"name"], [NODE]))
    assert script.volume.renewed(1, b"name") is None
    _seconds, give_back = script.timers.waiting[-1]
    give_back()
    assert script.link.calls[-1].nodes == [NODE]  # type: ignore[attr-defined]


def test_an_answer_of_before_the_write_is_not_learned() -> None:
    script = Writing()
    script.request(Opcode.GETATTR, GETATTR, NODE)
    before = script.link.asked[-1]
    script.ahead()
    before.answer(Attributes(attr(10), False, ATTRIBUTES))
    assert asks(script, Opcode.GETATTR, GETATTR)


def test_one_of_behind_it_is() -> None:
    script = Writing()
    script.ahead()
    script.request(Opcode.GETATTR, GETATTR, NODE)
    script.link.asked[-1].answer(Attributes(attr(15), False, ATTRIBUTES))
    assert not asks(script, Opcode.GETATTR, GETATTR)


def test_a_listing_promises_nothing_of_a_file_that_is_being_written() -> None:
    script = Writing()
    asked = script.ahead()
    assert NODE in script.volume.doubtful([NODE, OTHER])
    asked.answer(written(5, 10))
    assert NODE not in script.volume.doubtful([NODE, OTHER])


def test_the_end_of_what_was_written_is_read_from_here() -> None:
    script = Writing()
    asked = script.ahead()
    asked.answer(written(5, 10))
    script.volume.renew(Renewed(7, [NODE], [attr(15)]))
    unique = script.request(Opcode.READ, READ, NODE)
    assert script.answers == replied(unique, b"x" * 10 + b"y" * 5)
