from __future__ import annotations

from host_agent.view.lookups import NAME_TIME, Key, Lookups


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


A, B = Key(1, 1, b"a"), Key(1, 1, b"b")


def test_a_name_is_good_for_a_while() -> None:
    clock = Clock()
    known = Lookups(clock)
    known.enter(A, 7, b"attr")
    assert (known.find(A), known.recall(A)) == (7, b"attr")
    clock.now += NAME_TIME + 0.01
    assert (known.find(A), known.recall(A)) == (None, None)


def test_lookups_are_given_back_when_no_name_and_no_file_needs_the_node() -> None:
    known = Lookups(Clock())
    known.enter(A, 7, b"")
    known.enter(A, 7, b"")  # asked again: the guest has counted two
    known.hold(1, 7)
    known.gone(A)
    assert known.take_released() == {}
    known.release(1, 7)
    assert known.released == 1
    assert known.take_released() == {1: {7: 2}}
    assert known.take_released() == {}


def test_a_name_that_means_another_file_lets_go_of_the_one_before() -> None:
    known = Lookups(Clock())
    known.enter(A, 7, b"")
    known.enter(A, 8, b"")
    assert known.find(A) == 8
    assert known.take_released() == {1: {7: 1}}


def test_a_file_with_two_names_is_held_by_either() -> None:
    known = Lookups(Clock())
    known.enter(A, 7, b"")
    known.enter(B, 7, b"")
    known.gone(A)
    assert known.released == 0
    known.gone(B)
    assert known.take_released() == {1: {7: 2}}


def test_no_more_names_are_kept_than_there_is_room_for() -> None:
    known = Lookups(Clock(), max_names=10)
    for number in range(100):
        known.enter(Key(1, 1, b"%d" % number), 100 + number, b"")
    assert known.released == 90
    assert known.find(Key(1, 1, b"99")) == 199
    assert known.find(Key(1, 1, b"0")) is None


def test_what_was_changed_is_asked_for_again_and_its_name_is_not() -> None:
    known = Lookups(Clock())
    known.enter(A, 7, b"attr")
    known.changed(1, 7)
    assert known.recall(A) is None
    assert known.find(A) == 7


def test_with_a_place_go_its_names_and_nobody_is_told_of_them() -> None:
    known = Lookups(Clock())
    known.enter(A, 7, b"")
    known.enter(Key(2, 1, b"a"), 8, b"")
    known.forget_place(1)
    assert known.find(A) is None
    assert known.find(Key(2, 1, b"a")) == 8
    assert known.released == 0


def test_another_process_of_the_guest_knows_nothing_of_this() -> None:
    known = Lookups(Clock())
    known.enter(A, 7, b"")
    known.hold(1, 7)
    known.forget_all()
    known.release(1, 7)  # of a file that was open
    assert (known.find(A), known.released) == (None, 0)
