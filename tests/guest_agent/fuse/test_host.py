"""What is asked of a host that comes and goes: order, patience, signals, back-pressure."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.host import MAX_FLYING, PATIENCE, Host
from protocol.errors import LocalProtocolError
from protocol.files import Flushed, Forget, GetAttributes, Lookup, Read, Unlink, Write, Written
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

    def refuse(*_: Any) -> None:
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


async def test_what_need_not_reach_the_host_does_not_pile_up_for_it(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    host = Host()
    nursery.start_soon(host.keep_patience)
    host.tell(Flushed(1, 0, 5), lasting=False)
    await trio.sleep(PATIENCE + 1)
    host.tell(Flushed(1, 0, 6), lasting=False)
    link = ScriptedLink()
    host.attach(link)
    assert link.calls == []


# --- signals -------------------------------------------------------------------------------------------------


def interrupt(script: Script, unique: int) -> None:
    script.request(Opcode.INTERRUPT, pack("Q", unique))


def test_a_signal_changes_nothing_while_the_host_is_there() -> None:
    script = Script()
    unique = script.request(Opcode.READ, pack("QQIIQII", 0, 0, 10, 0, 0, 0, 0))
    interrupt(script, unique)
    assert script.answers == []
    script.take().answer(payload=b"data")
    assert script.answers == replied(unique, b"data")


@pytest.mark.parametrize("salt", [0, 5])
def test_what_was_never_sent_ends_at_once_without_a_host(salt: int) -> None:
    script = Script(salt=salt, connected=False)
    first, second = script.request(Opcode.UNLINK, b"a\0"), script.request(Opcode.UNLINK, b"b\0")
    interrupt(script, second)
    assert script.answers == failed(second, "EINTR")
    script.find_host()
    assert uniques(script.link) == [first ^ script.volume.salt]


def test_what_changes_nothing_ends_at_once_even_if_it_was_sent() -> None:
    script = Script()
    unique = script.request(Opcode.GETATTR, GETATTR)
    script.lose_host()
    interrupt(script, unique)
    assert script.answers == failed(unique, "EINTR")


def test_what_may_have_been_done_waits_for_its_outcome() -> None:
    script = Script()
    unique = script.request(Opcode.UNLINK, b"a\0")
    script.lose_host()
    interrupt(script, unique)
    assert script.answers == []
    script.find_host()
    script.take().answer()
    assert script.answers == replied(unique)


def test_a_signal_is_remembered_until_the_host_goes() -> None:
    script = Script()
    unique = script.request(Opcode.GETATTR, GETATTR)
    interrupt(script, unique)
    assert script.answers == []
    script.lose_host()
    assert script.answers == failed(unique, "EINTR")


def test_a_signal_for_another_share_is_none_of_ours() -> None:
    host = Host()
    caller = Caller(host, Lookup(1, 2, 1, b"a"))
    host.interrupt(2, 2)
    assert caller.outcomes == []
    host.interrupt(1, 2)
    assert caller.outcomes == [errno.EINTR]


# --- back-pressure -------------------------------------------------------------------------------------------


def test_more_calls_than_the_link_takes_wait_for_their_turn() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    for number in range(MAX_CALLS + 3):
        Caller(host, GetAttributes(1, 2 * number, 1))
    assert len(link.calls) == MAX_CALLS
    link.take().fail(errno.EIO)
    link.take().fail(errno.EIO)
    assert len(link.calls) == MAX_CALLS
    assert uniques(link)[-1] == 2 * (MAX_CALLS + 1)
    Caller(host, GetAttributes(1, 99_999, 1))  # not before those that wait
    while link.asked:
        last = link.take()
        last.fail(errno.EIO)
    assert isinstance(last.call, GetAttributes)
    assert last.call.unique == 99_999


def test_so_do_more_bytes_than_the_link_should_hold() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    payload = bytes(MAX_FLYING // 4)
    for number in range(6):
        Caller(host, Write(1, 2 * number, 1, 0), payload)
    assert uniques(link) == [0, 2, 4, 6]
    link.take().fail(errno.ENOSPC)
    assert uniques(link) == [2, 4, 6, 8]


def test_what_waits_for_its_turn_keeps_it_in_the_next_session() -> None:
    host, link = Host(), ScriptedLink()
    host.attach(link)
    for number in range(MAX_CALLS + 2):
        Caller(host, Read(1, 2 * number, 1, 0, 1))
    link.end()
    host.detach(link)
    host.attach(again := ScriptedLink())
    assert uniques(again) == [2 * number for number in range(MAX_CALLS)]
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
