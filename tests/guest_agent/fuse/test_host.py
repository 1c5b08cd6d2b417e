"""What is asked of a host that comes and goes: order, patience, signals, back-pressure."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.host import LOOK_AGAIN, MAX_FLYING, PATIENCE, Host
from protocol.errors import LocalProtocolError
from protocol.files import (
    Attributes,
    Entry,
    Forget,
    GetAttributes,
    Lookup,
    Read,
    Unlink,
    Write,
    Written,
)
from protocol.session import MAX_CALLS
from tests.guest_agent.fuse.script import ATTRIBUTES, Script, ScriptedLink, failed, pack, replied

GETATTR = pack("IIQ", 0, 0, 0)


class Caller:
    """Waits for an answer as an operation does."""

    def __init__(self, host: Host, call: Any, payload: bytes = b"", *, lasting: bool = False) -> None:
        self.outcomes: list[Any] = []
        host.ask(call, payload, lasting=lasting).begin(self.outcomes.append)


def uniques(link: ScriptedLink) -> list[int]:
    calls: list[Any] = link.calls
    return [call.unique for call in calls]


# --- sessions that come and go -------------------------------------------------------------------------------


def test_without_a_host_calls_wait_in_order() -> None:
    host, link = Host(), ScriptedLink()
    for unique in (2, 4, 6):
        Caller(host, Lookup(1, unique, 1, b"a"))
    host.attach(link)
    assert uniques(link) == [2, 4, 6]


def test_what_was_not_answered_is_asked_again_as_it_was() -> None:
    script = Script()
    first = script.request(Opcode.UNLINK, b"a\0")
    second = script.request(Opcode.WRITE, pack("QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"data")
    third = script.request(Opcode.GETATTR, GETATTR)
    before = script.link.calls
    script.link.asked.pop(0).answer()
    script.lose_host()
    fourth = script.request(Opcode.GETATTR, GETATTR)
    assert script.answers == replied(first)
    script.find_host()
    assert script.link.calls[:2] == before[1:]
    assert uniques(script.link) == [second, third, fourth]
    asked = script.take()
    assert asked.payload == b"data"
    asked.answer(Written(4, 0, ATTRIBUTES))
    assert script.answers == replied(second, pack("II", 4, 0))


def test_of_which_shares_something_waits() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    Caller(host, Lookup(1, 2, 1, b"a"))
    host.detach(link)
    Caller(host, Forget(2, 4, 0, [3], [1]), lasting=True)
    assert host.shares == {1, 2}
    host.attach(link)
    for asked in link.asked:
        asked.answer()
    assert host.shares == set()


def test_a_link_that_is_over_before_anybody_said_so_loses_nothing() -> None:
    script = Script()
    first = script.request(Opcode.UNLINK, b"a\0")
    script.link.end()
    second = script.request(Opcode.UNLINK, b"b\0")
    script.host.detach(script.link)
    script.find_host()
    assert uniques(script.link) == [first, second]


def test_the_next_session_may_begin_before_the_last_was_given_up() -> None:
    script = Script()
    unique = script.request(Opcode.UNLINK, b"a\0")
    old = script.link
    script.find_host()
    assert uniques(script.link) == [unique]
    script.host.detach(old)  # late, and of no consequence
    script.take().answer()
    assert script.answers == replied(unique)


def test_attaching_the_same_link_again_sends_nothing_twice() -> None:
    script = Script()
    script.request(Opcode.UNLINK, b"a\0")
    script.host.attach(script.link)
    assert len(script.link.calls) == 1


def test_a_call_that_no_frame_can_say_is_its_callers_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script()

    def refuse(*_: Any, **__: Any) -> None:
        raise LocalProtocolError("too long")

    with monkeypatch.context() as patched:
        patched.setattr(script.link, "call", refuse)
        unique = script.request(Opcode.UNLINK, b"a\0")
    assert script.answers == failed(unique, "EIO")
    assert "too long" in caplog.text
    assert script.request(Opcode.UNLINK, b"b\0") in uniques(script.link)


# --- patience ------------------------------------------------------------------------------------------------


async def test_an_absent_host_is_waited_for_and_then_given_up(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    script = Script()
    nursery.start_soon(script.host.keep_patience)
    await trio.sleep(1000)  # present, however long it takes
    first = script.request(Opcode.GETATTR, GETATTR)
    await trio.sleep(1000)
    assert script.answers == []
    script.lose_host()
    await trio.sleep(PATIENCE - 1)
    second = script.request(Opcode.GETATTR, GETATTR)
    assert script.answers == []
    await trio.sleep(2)
    assert script.answers == [*failed(first, "EIO"), *failed(second, "EIO")]
    third = script.request(Opcode.GETATTR, GETATTR)
    assert script.answers == failed(third, "EIO")
    script.find_host()
    assert script.link.calls == []
    fourth = script.request(Opcode.GETATTR, GETATTR)
    assert uniques(script.link) == [fourth]


async def test_a_host_that_is_back_in_time_is_waited_for_anew_the_next_time(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    script = Script()
    nursery.start_soon(script.host.keep_patience)
    unique = script.request(Opcode.GETATTR, GETATTR)
    for _ in range(5):
        script.lose_host()
        await trio.sleep(PATIENCE - 1)
        script.find_host()
        assert uniques(script.link) == [unique]
    assert script.answers == []


async def test_a_host_that_never_comes_is_given_up_as_well(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    script = Script(connected=False)
    nursery.start_soon(script.host.keep_patience)
    unique = script.request(Opcode.GETATTR, GETATTR)
    await trio.sleep(PATIENCE + 1)
    assert script.answers == failed(unique, "EIO")


async def test_what_must_reach_the_host_does_so_though_nobody_waits_any_more(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    host = Host()
    nursery.start_soon(host.keep_patience)
    forget = Forget(1, 1 << 62, 0, [5], [1])
    host.tell(forget)
    waiting = Caller(host, Unlink(1, 2, 1, b"a"), lasting=True)
    await trio.sleep(PATIENCE + 1)
    assert waiting.outcomes == [errno.EIO]
    late = Caller(host, Unlink(1, 4, 1, b"b"), lasting=True)
    assert late.outcomes == [errno.EIO]
    link = ScriptedLink()
    host.attach(link)
    assert link.calls == [forget, Unlink(1, 2, 1, b"a"), Unlink(1, 4, 1, b"b")]
    link.take().answer()
    link.take().answer()
    assert waiting.outcomes == [errno.EIO]


# --- signals -------------------------------------------------------------------------------------------------

READ = pack("QQIIQII", 0, 0, 10, 0, 0, 0, 0)


def interrupt(script: Script, unique: int) -> None:
    script.request(Opcode.INTERRUPT, pack("Q", unique), pid=0)


def test_a_signal_that_kills_nobody_changes_nothing() -> None:
    script = Script()
    unique = script.request(Opcode.READ, READ)
    interrupt(script, unique)
    script.lose_host()
    interrupt(script, unique)
    script.host.let_the_dying_go()
    assert script.answers == []
    script.find_host()
    script.take().answer(payload=b"data")
    assert script.answers == replied(unique, b"data")


def test_of_the_dying_only_those_who_have_had_a_signal_are_let_go() -> None:
    script = Script(connected=False)
    script.dying = {42, 43}
    first, second = script.request(Opcode.READ, READ, pid=42), script.request(Opcode.READ, READ, pid=43)
    interrupt(script, second)
    assert script.answers == failed(second, "EINTR")
    interrupt(script, first)
    assert script.answers == failed(first, "EINTR")


@pytest.mark.parametrize("salt", [0, 5])
def test_what_was_never_sent_ends_at_once_without_a_host(salt: int) -> None:
    script = Script(salt=salt, connected=False)
    script.dying = {42}
    first, second = script.request(Opcode.UNLINK, b"a\0"), script.request(Opcode.UNLINK, b"b\0")
    interrupt(script, second)
    assert script.answers == failed(second, "EINTR")
    script.find_host()
    assert uniques(script.link) == [first ^ script.volume.salt]


def test_what_changes_nothing_ends_at_once_even_if_it_was_sent() -> None:
    script = Script()
    unique = script.request(Opcode.GETATTR, GETATTR)
    script.dying = {42}
    script.lose_host()
    interrupt(script, unique)
    assert script.answers == failed(unique, "EINTR")


def test_what_may_have_been_done_waits_for_its_outcome() -> None:
    script = Script()
    script.dying = {42}
    unique = script.request(Opcode.UNLINK, b"a\0")
    script.lose_host()
    interrupt(script, unique)
    script.host.let_the_dying_go()
    assert script.answers == []
    script.find_host()
    script.take().answer()
    assert script.answers == replied(unique)


async def test_a_kill_that_follows_a_harmless_signal_is_noticed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """The kernel tells of the first one only."""
    script = Script()
    nursery.start_soon(script.host.watch_the_signalled)
    unique = script.request(Opcode.GETATTR, GETATTR)
    interrupt(script, unique)
    script.lose_host()
    await trio.sleep(10 * LOOK_AGAIN)
    assert script.answers == []
    script.dying = {42}
    await trio.sleep(1.1 * LOOK_AGAIN)
    assert script.answers == failed(unique, "EINTR")


async def test_a_host_that_hangs_holds_nobody_who_is_killed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    script = Script()
    nursery.start_soon(script.host.watch_the_signalled)
    read, write = script.request(Opcode.READ, READ), script.request(Opcode.UNLINK, b"a\0")
    script.dying = {42}
    interrupt(script, read)
    interrupt(script, write)
    assert script.answers == []  # an answer takes milliseconds
    await trio.sleep(1.1 * LOOK_AGAIN)
    assert script.answers == failed(read, "EINTR")


async def test_nobody_is_looked_at_once_the_answer_is_there(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    looked: list[int] = []

    def look(thread: int) -> bool:
        looked.append(thread)
        return False

    host, link = Host(look), ScriptedLink()
    nursery.start_soon(host.watch_the_signalled)
    host.attach(link)
    host.caller = 7
    caller = Caller(host, Read(1, 2, 1, 0, 1))
    host.interrupt(1, 2, lambda: None)
    await trio.sleep(2.5 * LOOK_AGAIN)
    assert looked == [7, 7]
    link.take().answer()
    await trio.sleep(10 * LOOK_AGAIN)
    assert looked == [7, 7]
    assert len(caller.outcomes) == 1


def test_a_lookup_that_was_counted_for_a_dead_caller_is_given_back() -> None:
    script = Script()
    unique = script.request(Opcode.LOOKUP, b"a\0")
    script.dying = {42}
    interrupt(script, unique)
    script.host.let_the_dying_go()
    assert script.answers == failed(unique, "EINTR")
    script.lose_host()
    script.find_host()
    asked = script.take()  # the same question: the host gives back what its first answer had counted
    assert asked.call == Lookup(7, unique, 5, b"a")
    asked.answer(Entry(9, ATTRIBUTES))
    script.timers.fire()
    (forget,) = script.link.calls
    assert isinstance(forget, Forget)
    assert (forget.nodes, forget.counts) == ([9], [1])


def test_what_a_dead_caller_was_told_to_be_stale_is_dropped_all_the_same() -> None:
    script = Script()
    unique = script.request(Opcode.GETATTR, GETATTR)
    script.dying = {42}
    interrupt(script, unique)
    script.host.let_the_dying_go()
    script.take().answer(Attributes(ATTRIBUTES, stale=True))
    assert [node for node, _ in script.notifier.waiting] == [5]


def test_a_lookup_that_is_heard_of_is_not_given_back() -> None:
    script = Script()
    unique = script.request(Opcode.LOOKUP, b"a\0")
    interrupt(script, unique)
    script.host.let_the_dying_go()
    script.take().answer(Entry(9, ATTRIBUTES))
    assert [answer[:2] for answer in script.answers] == [("reply", unique)]
    assert script.timers.waiting == []


def test_a_signal_for_another_share_is_none_of_ours() -> None:
    host = Host(lambda thread: True)
    caller = Caller(host, Lookup(1, 2, 1, b"a"))
    host.interrupt(2, 2, lambda: None)
    assert caller.outcomes == []
    host.interrupt(1, 2, lambda: None)
    assert caller.outcomes == [errno.EINTR]


# --- back-pressure -------------------------------------------------------------------------------------------


def test_more_calls_than_the_link_takes_wait_for_their_turn() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    most = MAX_CALLS // 2
    for number in range(most + 3):
        Caller(host, GetAttributes(1, 2 * number, 1))
    assert len(link.calls) == most
    link.take().fail(errno.EIO)
    link.take().fail(errno.EIO)
    assert len(link.calls) == most
    assert uniques(link)[-1] == 2 * (most + 1)
    Caller(host, GetAttributes(1, 99_999, 1))  # not before those that wait
    while link.asked:
        last = link.take()
        last.fail(errno.EIO)
    assert isinstance(last.call, GetAttributes)
    assert last.call.unique == 99_999


def test_so_do_more_bytes_than_the_link_should_hold() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    payload = bytes(MAX_FLYING // 8)
    for number in range(6):
        Caller(host, Write(1, 2 * number, 1, 0), payload)
    assert uniques(link) == [0, 2, 4, 6]
    link.take().fail(errno.ENOSPC)
    assert uniques(link) == [2, 4, 6, 8]


def test_a_share_that_hangs_leaves_room_for_the_others() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    for share in (1, 2):
        for number in range(2 * MAX_CALLS):
            Caller(host, GetAttributes(share, 2 * number, 1))
    Caller(host, Lookup(3, 2, 1, b"a"))
    assert link.calls[-1] == Lookup(3, 2, 1, b"a")
    assert len(link.calls) < MAX_CALLS


def test_what_waits_for_its_turn_keeps_it_in_the_next_session() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    most = MAX_CALLS // 2
    for number in range(most + 2):
        Caller(host, Read(1, 2 * number, 1, 0, 1))
    link.end()
    host.detach(link)
    host.attach(again := ScriptedLink())
    assert uniques(again) == [2 * number for number in range(most)]
    while again.asked:
        again.take().fail(errno.EIO)
    assert host.ask(Read(1, 1, 1, 0, 1)).sent is False


def test_an_answer_may_ask_again_at_once() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    outcomes: list[Any] = []

    def ask_again(outcome: Any) -> None:
        outcomes.append(outcome)
        host.ask(Lookup(1, 4, 1, b"b")).begin(outcomes.append)

    host.ask(Lookup(1, 2, 1, b"a")).begin(ask_again)
    link.take().fail(errno.ENOENT)
    assert len(outcomes) == 1
    assert uniques(link) == [4]
