"""The accounting of one plane's slots: who fills them, who reads them, and what becomes of that when sessions end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.bulk import MAX_RUN, SHARE, SLOT, Account, Bulk, Loan, Run
from protocol.errors import LocalProtocolError, RemoteProtocolError

SLOTS = 16
HALF = SLOTS * SLOT
ALL = b"\xff\xff"


class Plane:
    """Two sides of one memory. ``own`` is the side whose runs are looked at, ``peer`` reads them."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(2 * HALF))
        self.own, self.peer = Bulk(), Bulk()
        self.own.attach(self.memory[:HALF], self.memory[HALF:])
        self.peer.attach(self.memory[HALF:], self.memory[:HALF])
        self.begin()

    def begin(self) -> None:
        """A session, as the hellos make it."""
        own, peer = self.own.busy(), self.peer.busy()
        self.own.begin(peer)
        self.peer.begin(own)

    def end(self) -> None:
        self.own.end()
        self.peer.end()

    def again(self) -> None:
        self.end()
        self.begin()

    def restart_own(self) -> None:
        """The process that owned the runs is gone, and another one is there."""
        self.peer.end()
        self.own = Bulk()
        self.own.attach(self.memory[:HALF], self.memory[HALF:])
        self.begin()

    def restart_peer(self) -> None:
        self.own.end()
        self.peer = Bulk()
        self.peer.attach(self.memory[HALF:], self.memory[:HALF])
        self.begin()

    def run(self, size: int = SLOT, account: Account | None = None, *, least: int = 0) -> Run:
        run = self.own.take(size, account, least=least)
        assert run is not None
        run.length = min(size, len(run.view))
        return run

    def lend(self, size: int = SLOT, account: Account | None = None) -> Loan:
        """What the peer has of a run that was sent as data."""
        return self.send(self.run(size, account), account)

    def send(self, run: Run, account: Account | None = None) -> Loan:
        reference = [run.first, run.length]
        self.own.lend(run, account)
        return self.peer.receive(reference)

    def show(self, run: Run) -> Loan:
        """What the peer has of a run that was sent with a call."""
        self.own.show(run)
        return self.peer.receive([run.first, run.length], answered=True)

    def give_back(self) -> None:
        """What was released comes home."""
        self.own.freed(self.peer.take_frees())


def slots_of(run: Run) -> set[int]:
    return set(range(run.first, run.first + run.slots))


# --- runs ------------------------------------------------------------------------------------------


def test_without_memory_there_is_nothing() -> None:
    bulk = Bulk()
    bulk.begin(b"")
    assert (bulk.free, bulk.take(1), bulk.take_frees(), bulk.urgent) == (0, None, b"", False)


def test_nothing_is_given_out_before_both_have_agreed() -> None:
    plane = Plane()
    plane.end()
    assert (plane.own.free, plane.own.take(SLOT)) == (0, None)


def test_a_run_that_nothing_was_put_into_is_a_run_all_the_same() -> None:
    run = Plane().own.take(SLOT)
    assert run is not None
    assert len(run) == 0
    assert bool(run), "who asks `if run` asks whether there is one"


@pytest.mark.parametrize(
    ("size", "slots"),
    [(1, 1), (SLOT, 1), (SLOT + 1, 2), (3 * SLOT, 3), (MAX_RUN, 8), (MAX_RUN + 1, 8), (1 << 40, 8)],
)
def test_a_run_is_as_long_as_it_must_be(size: int, slots: int) -> None:
    plane = Plane()
    run = plane.run(size)
    assert (run.slots, len(run.view), plane.own.free) == (slots, slots * SLOT, SLOTS - slots)
    run.give_back()
    assert plane.own.free == SLOTS


@pytest.mark.parametrize("size", [0, -1])
def test_room_for_nothing_is_none(size: int) -> None:
    assert Plane().own.take(size) is None


def test_runs_are_disjoint_and_each_is_its_own_bytes() -> None:
    plane = Plane()
    runs = [plane.run(size) for size in (SLOT, 3 * SLOT, 1, 2 * SLOT, SLOT, MAX_RUN)]
    assert sum(run.slots for run in runs) == len(set().union(*map(slots_of, runs))) == SLOTS
    assert plane.own.take(1) is None
    for run in runs:
        run.view[:] = bytes([run.first + 1]) * len(run.view)
    for run in runs:
        start = run.first * SLOT
        assert plane.memory[start : start + len(run.view)] == bytes([run.first + 1]) * len(run.view)


def test_long_runs_remain_possible_among_short_ones() -> None:
    plane = Plane()
    for _ in range(8):
        plane.run(SLOT)
    assert plane.run(MAX_RUN).slots == 8


def test_all_or_nothing_or_less() -> None:
    plane = Plane()
    singles = [plane.run(SLOT) for _ in range(SLOTS)]
    for run in singles[::2]:
        run.give_back()
    assert plane.own.take(2 * SLOT) is None
    assert plane.own.take(2 * SLOT, least=SLOT + 1) is None
    assert plane.run(2 * SLOT, least=1).slots == 1


@given(
    taken=st.sets(st.integers(0, SLOTS - 1)),
    wanted=st.integers(1, 8),
    data=st.data(),
)
def test_a_run_is_found_if_there_is_one(taken: set[int], wanted: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, wanted))
    plane = Plane()
    singles = {run.first: run for run in [plane.run(SLOT) for _ in range(SLOTS)]}
    for slot in set(range(SLOTS)) - taken:
        singles[slot].give_back()
    free = "".join("x" if slot in taken else "." for slot in range(SLOTS))
    longest = max(map(len, free.split("x")))
    run = plane.own.take(wanted * SLOT, least=least * SLOT)
    if longest < least:
        assert run is None
    else:
        assert run is not None
        assert least <= run.slots <= wanted
        assert not slots_of(run) & taken
        if longest >= wanted:
            assert run.slots == wanted


def test_giving_back_twice_is_once() -> None:
    plane = Plane()
    run = plane.run(2 * SLOT)
    run.give_back()
    other = plane.run(2 * SLOT)
    run.give_back()
    assert plane.own.free == SLOTS - other.slots
    assert len(run.view) == 0


# --- lending ---------------------------------------------------------------------------------------


def test_what_is_lent_is_read_and_comes_back() -> None:
    plane = Plane()
    run = plane.run(SLOT + 100)
    run.view[: run.length] = b"x" * SLOT + b"y" * 100
    loan = plane.send(run)
    assert bytes(loan.view) == b"x" * SLOT + b"y" * 100
    assert len(loan) == SLOT + 100
    assert loan.view.readonly
    assert plane.own.free == SLOTS - 2
    loan.release()
    assert plane.own.free == SLOTS - 2, "it is not known yet"
    plane.give_back()
    assert plane.own.free == SLOTS
    assert not plane.own.in_use
    assert not plane.peer.in_use


def test_lending_frees_what_was_not_needed() -> None:
    plane = Plane()
    run = plane.run(4 * SLOT)
    run.length = SLOT + 1
    loan = plane.send(run)
    assert plane.own.free == SLOTS - 2
    loan.release()
    plane.give_back()
    assert plane.own.free == SLOTS


def test_a_loan_is_released_once() -> None:
    plane = Plane()
    loan = plane.lend()
    loan.release()
    plane.give_back()
    other = plane.lend()
    loan.release()
    assert plane.peer.take_frees() == b""
    assert len(other.view) == SLOT
    assert len(loan.view) == 0


def test_what_is_shown_is_the_peers_to_read_and_ours_to_keep() -> None:
    plane = Plane()
    run = plane.run()
    loan = plane.show(run)
    assert plane.own.free == SLOTS - 1
    loan.release()
    assert plane.peer.take_frees() == b"", "the result says it"
    plane.own.shown(run)
    assert plane.own.free == SLOTS - 1
    run.give_back()
    assert plane.own.free == SLOTS


def test_what_is_shown_is_not_free_before_its_result_even_if_given_back() -> None:
    plane = Plane()
    run = plane.run()
    loan = plane.show(run)
    run.give_back()
    assert plane.own.free == SLOTS - 1
    loan.release()
    plane.own.shown(run)
    assert plane.own.free == SLOTS


# --- shares ----------------------------------------------------------------------------------------


def fill_share(plane: Plane, account: Account) -> list[Loan]:
    """Lend all that the account may."""
    loans = []
    while (run := plane.own.take(SLOT, account, least=1)) is not None:
        run.length = SLOT
        loans.append(plane.send(run, account))
    return loans


def test_an_account_gets_a_share_of_what_is_free() -> None:
    plane = Plane()
    greedy, late = Account(), Account()
    loans = fill_share(plane, greedy)
    assert greedy.lent == len(loans) >= 2
    assert plane.own.free // SHARE - greedy.lent < 1, "no more for it"
    assert plane.own.take(SLOT, late) is not None, "but for another"
    for loan in loans:
        loan.release()
    plane.give_back()
    assert greedy.lent == 0


def test_a_long_run_is_cut_down_to_the_share() -> None:
    plane = Plane()
    account = Account()
    assert plane.own.take(MAX_RUN, account) is None
    assert plane.run(MAX_RUN, account, least=1).slots == SLOTS // SHARE


def test_who_does_not_give_back_does_not_starve_the_others() -> None:
    plane = Plane()
    for _ in range(3):
        fill_share(plane, Account())  # never released
    assert plane.own.free > 0
    assert plane.own.take(SLOT, Account()) is not None


def test_the_last_slots_go_to_who_has_none() -> None:
    plane = Plane()
    accounts = [Account() for _ in range(SLOTS)]
    for account in accounts:
        fill_share(plane, account)
    assert plane.own.free == 0
    assert plane.own.take(SLOT, Account()) is None
    assert plane.own.wanted


@pytest.mark.parametrize("stuck", [0, 1, 2, 3])
def test_who_has_lent_its_share_hears_of_it_when_all_is_read(stuck: int) -> None:
    """Else a stream whose receiver says nothing would wait for the next heartbeat."""
    plane = Plane()
    for _ in range(stuck):
        fill_share(plane, Account())
    account = Account()
    loans = fill_share(plane, account)
    if not loans:
        return  # it goes inline
    for loan in loans:
        loan.release()
    assert plane.peer.urgent
    plane.give_back()
    assert plane.own.take(SLOT, account) is not None


def test_little_that_is_free_waits_for_the_next_frame() -> None:
    plane = Plane()
    plane.lend(SLOT).release()
    assert not plane.peer.urgent
    assert plane.peer.take_frees() != b""
    assert plane.peer.take_frees() == b""


def test_much_that_is_free_is_urgent_and_said_once() -> None:
    plane = Plane()
    called: list[bool] = []
    plane.peer.on_urgent = lambda: called.append(plane.peer.urgent)
    loans = [plane.lend(SLOT) for _ in range(SLOTS)]
    for loan in loans:
        loan.release()
    assert called
    assert all(called)
    plane.give_back()
    assert not plane.peer.urgent
    assert plane.own.free == SLOTS


def test_who_waits_for_room_is_told() -> None:
    plane = Plane()
    told: list[int] = []
    plane.own.on_room = lambda: told.append(plane.own.free)
    loans = [plane.lend(SLOT) for _ in range(SLOTS)]
    assert plane.own.take(SLOT) is None
    assert told == []
    loans[3].release()
    plane.give_back()
    assert told == [1]


def test_an_account_that_outlives_a_session_starts_anew() -> None:
    plane = Plane()
    account = Account()
    fill_share(plane, account)
    plane.restart_peer()
    assert plane.own.free == SLOTS
    assert len(fill_share(plane, account)) >= 2


# --- the peer's faults -----------------------------------------------------------------------------

REFERENCES = [
    [],
    [0],
    [0, 1, 2],
    [-1, 1],
    [0, 0],
    [0, -1],
    [0, -SLOT],
    [0, MAX_RUN + 1],
    [SLOTS, 1],
    [SLOTS - 1, SLOT + 1],
    [SLOTS - 7, MAX_RUN],
    [2**63, 1],
    [2**64 - 1, 2**64 - 1],
    [0, 2**64 - 1],
    [10**40, -(10**40)],
]


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_to_what_is_no_run_is_the_peers_fault(reference: list[int]) -> None:
    plane = Plane()
    with pytest.raises(RemoteProtocolError, match="no run of slots"):
        plane.peer.receive(reference)
    assert not plane.peer.in_use
    assert len(plane.peer.receive([SLOTS - 8, MAX_RUN])) == MAX_RUN


@pytest.mark.parametrize(
    "reference", [[3, 1], [3, 3 * SLOT], [2, SLOT + 1], [5, 1], [0, 8 * SLOT], [4, SLOT]]
)
def test_what_is_lent_already_cannot_be_lent(reference: list[int]) -> None:
    plane = Plane()
    loan = plane.peer.receive([3, 3 * SLOT])
    with pytest.raises(RemoteProtocolError, match="lent already"):
        plane.peer.receive(reference)
    loan.release()
    assert not plane.peer.in_use


def test_a_reference_without_a_session_that_uses_memory() -> None:
    plane = Plane()
    plane.end()
    with pytest.raises(RemoteProtocolError, match="no run of slots"):
        plane.peer.receive([0, 1])
    with pytest.raises(RemoteProtocolError, match="no run of slots"):
        Bulk().receive([0, 1])


@pytest.mark.parametrize(
    "bitmap", [b"\x01", b"\x04", b"\x03", ALL, b"\x00\x00\x01", b"\xff" * 1000, b"\x00" * 3]
)
def test_what_was_not_lent_cannot_be_given_back(bitmap: bytes) -> None:
    plane = Plane()
    account = Account()
    kept = plane.run(2 * SLOT)
    kept.length = SLOT
    kept.trim()
    lent = plane.run(2 * SLOT, account)
    lent.length = SLOT
    assert (kept.first, lent.first) == (0, 1)
    plane.own.lend(lent, account)
    with pytest.raises(RemoteProtocolError):
        plane.own.freed(bitmap)
    assert (plane.own.free, account.lent) == (SLOTS - 2, 1)
    plane.own.freed(b"\x02")
    with pytest.raises(RemoteProtocolError, match="not been lent"):
        plane.own.freed(b"\x02")


def test_nothing_is_given_back_without_a_session_that_uses_memory() -> None:
    for bitmap in (b"", b"\x01"):
        with pytest.raises(RemoteProtocolError):
            Bulk().freed(bitmap)
    plane = Plane()
    plane.lend()
    plane.end()
    with pytest.raises(RemoteProtocolError):
        plane.own.freed(b"\x01")


@pytest.mark.parametrize("busy", [b"\x00\x00\x01", b"\x00\x00\x00", b"\xff" * 5000])
def test_busy_slots_that_do_not_exist(busy: bytes) -> None:
    plane = Plane()
    plane.end()
    with pytest.raises(RemoteProtocolError, match="bitmap"):
        plane.own.begin(busy)
    assert not plane.own.active


def test_a_bitmap_ends_within_a_byte() -> None:
    bulk = Bulk()
    memory = memoryview(bytearray(6 * SLOT))
    bulk.attach(memory[: 3 * SLOT], memory[3 * SLOT :])
    bulk.begin(b"\x05")
    assert bulk.free == 1
    bulk.end()
    with pytest.raises(RemoteProtocolError, match="do not exist"):
        bulk.begin(b"\x08")


# --- sessions --------------------------------------------------------------------------------------


def test_what_was_lent_comes_home_with_the_next_session() -> None:
    plane = Plane()
    plane.lend().release()  # not yet given back
    plane.own.lend(plane.run())  # not yet received
    plane.again()
    assert plane.own.free == SLOTS
    assert plane.peer.take_frees() == b""


def test_what_is_still_read_does_not() -> None:
    plane = Plane()
    loan = plane.lend(2 * SLOT)
    for _ in range(3):
        plane.again()
        assert plane.own.free == SLOTS - 2
    loan.release()
    plane.give_back()
    assert plane.own.free == SLOTS
    plane.again()
    assert plane.own.free == SLOTS


def test_a_loan_released_between_sessions_is_not_busy() -> None:
    plane = Plane()
    loan = plane.lend()
    plane.end()
    loan.release()
    plane.begin()
    assert plane.own.free == SLOTS
    assert plane.peer.take_frees() == b""


def test_a_loan_released_while_the_hellos_are_exchanged_is_given_back() -> None:
    plane = Plane()
    loan = plane.lend()
    plane.end()
    busy = plane.peer.busy()
    loan.release()
    assert plane.peer.take_frees() == b"", "there is nobody to tell yet"
    plane.own.begin(busy)
    plane.peer.begin(plane.own.busy())
    assert plane.own.free == SLOTS - 1
    plane.give_back()
    assert plane.own.free == SLOTS


def test_an_answer_to_a_call_of_an_earlier_session_gives_back_what_was_busy() -> None:
    plane = Plane()
    run = plane.run()
    loan = plane.show(run)
    plane.again()
    run.give_back()
    assert plane.own.free == SLOTS - 1
    loan.release()  # there is no result to say so
    plane.give_back()
    assert plane.own.free == SLOTS


def test_a_session_that_never_agreed_changes_nothing() -> None:
    plane = Plane()
    loan = plane.lend()
    plane.end()
    plane.peer.busy()
    plane.end()  # the hello was said, and no answer came
    plane.begin()
    assert plane.own.free == SLOTS - 1
    loan.release()
    plane.give_back()
    assert plane.own.free == SLOTS


def test_the_owner_starts_anew_and_learns_what_is_still_read() -> None:
    plane = Plane()
    loan = plane.lend(3 * SLOT)
    content = bytes(loan.view)
    plane.restart_own()
    assert plane.own.free == SLOTS - 3
    for run in [plane.run(SLOT) for _ in range(SLOTS - 3)]:
        run.view[:] = b"!" * SLOT
    assert bytes(loan.view) == content
    loan.release()
    plane.give_back()
    assert plane.own.free == 3


def test_the_reader_starts_anew_and_reads_nothing_any_more() -> None:
    plane = Plane()
    plane.lend(3 * SLOT)
    plane.restart_peer()
    assert plane.own.free == SLOTS


def test_what_is_being_filled_stays_ours_over_sessions() -> None:
    plane = Plane()
    run = plane.run(2 * SLOT)
    plane.again()
    assert plane.own.free == SLOTS - 2
    loan = plane.send(run)
    assert plane.own.free == SLOTS - 2
    loan.release()
    plane.give_back()
    assert plane.own.free == SLOTS


def test_a_run_that_is_kept_is_shown_again() -> None:
    plane = Plane()
    run = plane.run()
    plane.own.show(run)  # and never arrived
    plane.again()
    loan = plane.show(run)
    loan.release()
    plane.own.shown(run)
    run.give_back()
    assert plane.own.free == SLOTS


def test_a_run_shown_again_is_not_free_while_the_first_reader_reads() -> None:
    """A write that was sent again: the thread that began it in the session before may still be at it."""
    plane = Plane()
    run = plane.run()
    first = plane.show(run)
    plane.again()
    second = plane.show(run)
    second.release()
    plane.own.shown(run)
    run.give_back()
    assert plane.own.free == SLOTS - 1
    first.release()
    plane.give_back()
    assert plane.own.free == SLOTS


def test_the_first_reader_may_also_be_done_first() -> None:
    plane = Plane()
    run = plane.run()
    first = plane.show(run)
    plane.again()
    second = plane.show(run)
    first.release()
    plane.give_back()
    run.give_back()
    assert plane.own.free == SLOTS - 1, "the second one reads"
    second.release()
    plane.own.shown(run)
    assert plane.own.free == SLOTS
    assert plane.peer.take_frees() == b""


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_old_readers_of_one_slot_are_two(order: tuple[int, int]) -> None:
    plane = Plane()
    run = plane.run()
    loans = []
    for _ in range(2):
        loans.append(plane.show(run))
        plane.again()
    run.give_back()
    assert plane.own.free == SLOTS - 1
    loans[order[0]].release()
    plane.give_back()
    assert plane.own.free == SLOTS - 1
    plane.again()
    assert plane.own.free == SLOTS - 1
    loans[order[1]].release()
    plane.give_back()
    assert plane.own.free == SLOTS


def test_memory_in_use_is_not_exchanged() -> None:
    other = memoryview(bytearray(2 * SLOT))
    plane = Plane()
    run, loan = plane.run(), plane.lend()
    for bulk in (plane.own, plane.peer):
        with pytest.raises(LocalProtocolError, match="in use"):
            bulk.attach(other[:SLOT], other[SLOT:])
    plane.end()
    run.give_back()
    plane.own.attach(other[:SLOT], other[SLOT:])
    with pytest.raises(LocalProtocolError, match="in use"):
        plane.peer.attach(other[SLOT:], other[:SLOT])
    loan.release()
    plane.peer.attach(other[SLOT:], other[:SLOT])
    plane.begin()
    assert plane.own.free == 1
