"""Whose call goes next, and when no more is taken."""

from __future__ import annotations

from dataclasses import dataclass

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from guest_agent.fuse.turns import FEW_WAITING, MAX_WAITING, Gate, Turns


@dataclass(frozen=True, slots=True)
class Call:
    share: int
    number: int
    size: int = 0


def offer(turns: Turns[Call], *calls: Call) -> list[Call]:
    """Those that may go at once; the others wait."""
    begun = []
    for call in calls:
        if turns.begin(call):
            begun.append(call)
        else:
            turns.wait(call)
    return begun


def drain(turns: Turns[Call]) -> list[Call]:
    going = []
    while (call := turns.next()) is not None:
        going.append(call)
    return going


def numbers(calls: list[Call]) -> list[tuple[int, int]]:
    return [(call.share, call.number) for call in calls]


def open_gates(turns: Turns[Call]) -> list[int]:
    return [share for share in (1, 2) if turns.gate(share).is_open]


def test_one_share_alone_gets_half() -> None:
    turns: Turns[Call] = Turns(8, 100)
    assert len(offer(turns, *(Call(1, number) for number in range(9)))) == 4
    assert (drain(turns), turns.waiting) == ([], 5)


def test_each_of_several_that_hang_leaves_as_much_as_it_has() -> None:
    turns: Turns[Call] = Turns(60, 100)
    for share, most in ((1, 30), (2, 15), (3, 8), (4, 4)):
        assert len(offer(turns, *(Call(share, number) for number in range(60)))) == most
    assert offer(turns, Call(5, 0)) == [Call(5, 0)]


def test_bytes_are_shared_as_calls_are() -> None:
    turns: Turns[Call] = Turns(100, 80)
    assert len(offer(turns, *(Call(1, number, 10) for number in range(9)))) == 4
    assert len(offer(turns, *(Call(2, number, 10) for number in range(9)))) == 2


def test_those_who_wait_take_turns_each_in_its_order() -> None:
    turns: Turns[Call] = Turns(1, 100)
    begun = offer(turns, Call(0, 0))
    assert offer(turns, *(Call(share, number) for share in (1, 2, 3) for number in range(3))) == []
    order = []
    while begun:
        turns.end(begun.pop())
        begun = drain(turns)
        order += begun
    assert numbers(order) == [(share, number) for number in range(3) for share in (1, 2, 3)]


def test_nothing_overtakes_what_waits_of_its_share() -> None:
    turns: Turns[Call] = Turns(2, 100)
    (first,) = offer(turns, Call(1, 0), Call(1, 1))
    turns.end(first)
    assert offer(turns, Call(1, 2)) == []
    assert drain(turns) == [Call(1, 1)]


def test_what_was_under_way_waits_again_before_the_rest() -> None:
    turns: Turns[Call] = Turns(8, 100)
    begun = offer(turns, *(Call(share, number) for number in range(4) for share in (1, 2)))
    turns.end_all(begun)
    assert [number for share, number in numbers(list(turns)) if share == 1] == [0, 1, 2, 3]
    assert [number for share, number in numbers(list(turns)) if share == 2] == [0, 1, 2, 3]
    assert len(drain(turns)) == len(begun)


def test_what_is_removed_or_cleared_waits_no_more() -> None:
    turns: Turns[Call] = Turns(0, 0)
    offer(turns, *(Call(1, number, MAX_WAITING) for number in range(4)))
    turns.remove(Call(1, 1, MAX_WAITING))
    assert [call.number for call in turns] == [0, 2, 3]
    assert [call.number for call in turns.clear(keep=lambda call: call.number == 2)] == [0, 2, 3]
    assert (list(turns), turns.waiting) == ([Call(1, 2, MAX_WAITING)], 1)
    assert len(turns.clear(keep=lambda call: False)) == 1
    assert turns.gate(1).is_open


def test_a_gate_is_closed_while_too_much_waits_of_its_share() -> None:
    turns: Turns[Call] = Turns(0, 0)
    turns.wait(Call(1, 0, FEW_WAITING))
    turns.wait(Call(1, 1, MAX_WAITING - FEW_WAITING))
    assert open_gates(turns) == [1, 2]
    turns.wait(Call(1, 2, 1))
    assert open_gates(turns) == [2]
    turns.remove(Call(1, 2, 1))
    assert open_gates(turns) == [2]  # not to and fro with each call
    turns.remove(Call(1, 1, MAX_WAITING - FEW_WAITING))
    assert open_gates(turns) == [1, 2]


async def test_a_gate_that_closes_turns_out_who_is_inside() -> None:
    gate = Gate()
    said: list[str] = []

    async def take() -> None:
        for _ in range(2):
            await gate.wait()
            with gate.inside():
                said.append("in")
                await trio.sleep_forever()
            said.append("out")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        gate.close()
        await wait_all_tasks_blocked()
        assert said == ["in", "out"]
        gate.open()
        await wait_all_tasks_blocked()
        assert said == ["in", "out", "in"]
        nursery.cancel_scope.cancel()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(1, 3), st.integers(0, 30)),
            st.tuples(st.sampled_from(["answer", "lose", "clear"]), st.integers(0, 9), st.just(0)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_the_books_are_right(steps: list[tuple[str, int, int]]) -> None:
    turns: Turns[Call] = Turns(6, 60)
    under_way: list[Call] = []
    last: dict[int, int] = {}
    for number, (what, value, size) in enumerate(steps):
        if what == "ask":
            under_way += offer(turns, Call(value, number, size))
        elif what == "answer" and under_way:
            turns.end(under_way.pop(value % len(under_way)))
        elif what == "lose":
            turns.end_all(under_way)
            under_way, last = [], {}
        elif what == "clear":
            turns.clear(keep=lambda call: call.number % 2 == 0)
        begun = drain(turns)
        under_way += begun
        for call in begun:
            assert last.get(call.share, -1) < call.number
            last[call.share] = call.number
        waiting = list(turns)
        assert turns.waiting == len(waiting)
        assert len(under_way) <= 6
        assert len(under_way) < 6 or {call.share for call in waiting} <= {call.share for call in under_way}
        if not under_way:
            assert not waiting
