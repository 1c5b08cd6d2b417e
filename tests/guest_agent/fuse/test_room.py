from __future__ import annotations

from collections.abc import Callable

import pytest

from guest_agent.fuse.abi import Opcode
from guest_agent.fuse.room import KEPT, Room
from protocol.files import Changed, FilesystemSize, Removed
from tests.guest_agent.fuse.script import Script

SIZE = FilesystemSize(100, 50, 50, 10, 5, 4096, 255, 4096)
FAR = 0.1


def test_it_is_kept_for_a_moment() -> None:
    now = 10.0
    it = Room(lambda: now)
    assert it.known() is None
    it.keep(b"room", it.changes)
    assert it.known() == b"room"
    now += KEPT
    assert it.known() is None


CHANGES: list[Callable[[Room], None]] = [
    lambda it: it.drop(9),
    lambda it: it.void(),
    lambda it: it.changed(Changed(7)),
]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_over_a_change(change: Callable[[Room], None]) -> None:
    it = Room()
    it.keep(b"room", it.changes)
    change(it)
    assert it.known() is None
    asked = it.changes
    change(it)
    it.keep(b"of before", asked)
    assert it.known() is None


def ask(it: Script) -> bool:
    """Whether the host is asked."""
    it.request(Opcode.STATFS)
    if it.link.asked:
        it.take().answer(SIZE)
        return True
    return False


def test_a_walk_of_a_far_machine_waits_for_it_once() -> None:
    it = Script(round_trip=FAR)
    assert ask(it)
    assert not ask(it)
    it.request(Opcode.UNLINK, b"large\0")
    it.take().answer(Removed())
    assert ask(it), "who removes something asks what is free now"


def test_a_near_host_is_asked_each_time() -> None:
    for it in (Script(), Script(round_trip=0.0001)):
        assert ask(it)
        assert ask(it)
