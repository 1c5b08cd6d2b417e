"""Locks on real files, against other descriptions of the same files: what a host process would see."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fileserver import locks as module
from fileserver.budget import FEWEST, Budget
from fileserver.journal import Journal, read
from fileserver.keepsakes import Keepsakes
from fileserver.locks import READ, UNLOCK, WHOLE_FILE_END, WRITE, HostLocks, Range, with_lock
from host_agent.descriptor_store import DescriptorStore
from protocol import files
from protocol.files import LockState, Opened, OpenForLocks, Release, ReleaseOwner, SetLock

SHARE, NODE = 7, 2


# --- ranges ----------------------------------------------------------------------------------------


def test_ranges_split_and_join() -> None:
    held = with_lock([], 0, 99, WRITE)
    held = with_lock(held, 10, 19, UNLOCK)
    assert held == [(0, 9, WRITE), (20, 99, WRITE)]
    held = with_lock(held, 5, 24, READ)
    assert held == [(0, 4, WRITE), (5, 24, READ), (25, 99, WRITE)]
    held = with_lock(held, 5, 24, WRITE)
    assert held == [(0, 99, WRITE)]
    held = with_lock(held, 100, WHOLE_FILE_END, WRITE)
    assert held == [(0, WHOLE_FILE_END, WRITE)]
    assert with_lock(held, 0, WHOLE_FILE_END, UNLOCK) == []


pieces = st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from([READ, WRITE, UNLOCK]))


@given(st.lists(pieces, max_size=20))
def test_ranges_are_what_byte_by_byte_would_be(steps: list[tuple[int, int, int]]) -> None:
    held: list[Range] = []
    model = [UNLOCK] * 21
    for one, other, kind in steps:
        start, end = min(one, other), max(one, other)
        held = with_lock(held, start, end, kind)
        model[start : end + 1] = [kind] * (end + 1 - start)
    assert [next((k for s, e, k in held if s <= at <= e), UNLOCK) for at in range(21)] == model
    assert held == sorted(held)
    for (_, end, kind), (start, _, after) in itertools.pairwise(held):
        assert end < start
        assert (end + 1, kind) != (start, after), "neighbours of a kind are one"


# --- locks -----------------------------------------------------------------------------------------


class Bench:
    """A file that is node 2 of a share, its locks, and the journal they are written to."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "file"
        self.file.touch()
        self.path = directory / "journal"
        self.journal = Journal(self.path)
        self.journal.begin("boot")
        self.opened = 0
        self.locks = HostLocks(SHARE, self.journal, self.open)

    def open(self, node: int, flags: int) -> int:
        if node != NODE:
            raise OSError(errno.ESTALE, "no such node")
        self.opened += 1
        return os.open(self.file, flags | os.O_CLOEXEC)

    def handle(self) -> int:
        opened = self.locks.perform(OpenForLocks(SHARE, 1, NODE, os.O_RDWR))
        assert isinstance(opened, Opened)
        return opened.handle

    def set(self, handle: int, owner: int, start: int, end: int, kind: int) -> None:
        self.locks.perform(SetLock(SHARE, 1, NODE, handle, owner, start, end, kind))

    def whole(self, handle: int, kind: int) -> None:
        self.locks.perform(SetLock(SHARE, 1, NODE, handle, 0, 0, 0, kind, whole=True))

    def test(self, handle: int, owner: int, start: int, end: int, kind: int) -> object:
        return self.locks.perform(files.TestLock(SHARE, 1, NODE, handle, owner, start, end, kind))

    def killed(self) -> None:
        """The server was killed: its locks are gone, its journal is there, and a successor comes."""
        self.journal.flush()
        past = read(self.path).locks.get(SHARE)
        self.locks.close()  # by now nothing of it can be written any more
        self.journal.close()
        self.journal = Journal(self.path)
        self.locks = HostLocks(SHARE, self.journal, self.open, past)

    def successor(self, keepsakes: Keepsakes) -> None:
        """The server goes on, or the next one begins, with a descriptor store."""
        kept = keepsakes.of(SHARE)
        past = read(self.path).locks.get(SHARE)
        self.locks = HostLocks(SHARE, self.journal, self.open, past, kept.claim().locks, kept)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.locks.close()
    made.journal.close()


def posix_lock_of_another(file: Path, start: int, length: int, kind: int = fcntl.F_WRLCK) -> bool:
    """Whether somebody else could take a POSIX lock now (and does not keep it)."""
    with file.open("rb+") as other:
        try:
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, 0, start, length, 0))
        except BlockingIOError:
            return False
        return True


def flock_of_another(file: Path, operation: int = fcntl.LOCK_EX) -> bool:
    with file.open("rb") as other:
        try:
            fcntl.flock(other, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_posix_lock_reaches_the_host(bench: Bench) -> None:
    handle = bench.handle()
    bench.set(handle, 5, 10, 19, WRITE)
    assert not posix_lock_of_another(bench.file, 0, 0)
    assert not posix_lock_of_another(bench.file, 19, 1)
    assert posix_lock_of_another(bench.file, 20, 1)
    bench.set(handle, 5, 15, 19, UNLOCK)
    assert posix_lock_of_another(bench.file, 15, 5)
    assert not posix_lock_of_another(bench.file, 14, 1)
    bench.set(handle, 5, 0, WHOLE_FILE_END, UNLOCK)
    assert posix_lock_of_another(bench.file, 0, 0)
    assert bench.locks.descriptors == 0, "what holds nothing is not open: the file may be executed"


def test_a_lock_of_the_host_is_respected_and_reported(bench: Bench) -> None:
    handle = bench.handle()
    with bench.file.open("rb+") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, 100, 0, 0))
        with pytest.raises(BlockingIOError):
            bench.set(handle, 5, 0, 100, READ)
        assert bench.test(handle, 5, 0, 100, READ) == LockState(WRITE, 100, WHOLE_FILE_END, 0)
        bench.set(handle, 5, 0, 99, READ)
        assert bench.test(handle, 5, 0, 99, WRITE) == LockState(UNLOCK, 0, 0, 0), (
            "one's own is not in the way"
        )
    assert bench.test(handle, 5, 0, 100, READ) == LockState(UNLOCK, 0, 0, 0)
    assert bench.locks.descriptors == 1


def test_owners_exclude_each_other_and_handles_of_one_do_not(bench: Bench) -> None:
    first, second = bench.handle(), bench.handle()
    bench.set(first, 5, 0, 9, WRITE)
    bench.set(second, 5, 5, 14, WRITE)
    with pytest.raises(BlockingIOError):
        bench.set(second, 6, 0, 0, READ)
    bench.locks.perform(ReleaseOwner(SHARE, 1, NODE, first, 5))
    bench.set(second, 6, 0, 0, READ)


def test_flock_belongs_to_the_handle(bench: Bench) -> None:
    first, second = bench.handle(), bench.handle()
    bench.whole(first, WRITE)
    assert not flock_of_another(bench.file, fcntl.LOCK_SH)
    with pytest.raises(BlockingIOError):
        bench.whole(second, READ)
    bench.whole(first, READ)
    bench.whole(second, READ)
    with pytest.raises(BlockingIOError):
        bench.whole(first, WRITE)
    assert bench.locks.descriptors == 1, "a conversion that fails has lost what there was (flock(2))"
    bench.whole(second, UNLOCK)
    assert flock_of_another(bench.file)


def test_release_ends_both_kinds(bench: Bench) -> None:
    handle = bench.handle()
    bench.whole(handle, WRITE)
    bench.set(handle, 5, 0, 9, WRITE)
    bench.locks.perform(Release(SHARE, 1, NODE, handle, 5))
    assert flock_of_another(bench.file)
    assert posix_lock_of_another(bench.file, 0, 0)
    bench.locks.perform(Release(SHARE, 1, NODE, handle, 5))  # asked again after a kill
    with pytest.raises(OSError) as refused:
        bench.set(handle, 5, 0, 9, WRITE)
    assert refused.value.errno == errno.EBADF


OPEN_FILE, PROCESS, CHILD = 1 << 60, 5, 6
"""Owners, as the guest's kernel makes them up: of F_OFD_SETLK, and of F_SETLK of two processes."""


def test_the_last_close_ends_what_was_locked_through_the_handle(bench: Bench) -> None:
    """The guest's agent was started anew, and does not know the owner any more."""
    first, second = bench.handle(), bench.handle()
    bench.set(first, OPEN_FILE, 0, 9, WRITE)
    bench.set(first, CHILD, 20, 29, WRITE)
    bench.set(second, PROCESS, 40, 49, WRITE)
    bench.set(first, PROCESS, 45, 45, UNLOCK)  # takes nothing through this one
    bench.locks.perform(Release(SHARE, 1, NODE, first, 0))
    assert posix_lock_of_another(bench.file, 0, 40)
    assert not posix_lock_of_another(bench.file, 44, 1)
    assert bench.locks.descriptors == 1
    bench.locks.perform(Release(SHARE, 1, NODE, second, 0))
    assert bench.locks.descriptors == 0


def test_what_was_locked_anew_through_another_handle_stays(bench: Bench) -> None:
    """A process closes a descriptor that its child has as well, and goes on with another one."""
    shared, own = bench.handle(), bench.handle()
    bench.set(shared, PROCESS, 0, 9, WRITE)
    bench.locks.perform(ReleaseOwner(SHARE, 1, NODE, shared, PROCESS))
    bench.set(own, PROCESS, 0, 9, WRITE)
    bench.set(shared, CHILD, 20, 29, WRITE)
    bench.locks.perform(Release(SHARE, 1, NODE, shared, 0))
    assert not posix_lock_of_another(bench.file, 0, 1)
    assert posix_lock_of_another(bench.file, 20, 1)


def test_a_lock_that_was_refused_ties_nothing_to_the_handle(bench: Bench) -> None:
    first, second = bench.handle(), bench.handle()
    bench.set(first, PROCESS, 0, 9, WRITE)
    bench.set(first, CHILD, 20, 29, WRITE)
    with pytest.raises(BlockingIOError):
        bench.set(second, PROCESS, 15, 25, WRITE)
    bench.locks.perform(Release(SHARE, 1, NODE, second, 0))
    assert not posix_lock_of_another(bench.file, 0, 1)


def test_locks_have_a_part_of_the_descriptors(bench: Bench) -> None:
    locks = HostLocks(SHARE, bench.journal, bench.open, budget=Budget(64))
    handles = []
    for _ in range(20):
        opened = locks.perform(OpenForLocks(SHARE, 1, NODE, os.O_RDWR))
        assert isinstance(opened, Opened)
        handles.append(opened.handle)
    for owner in range(10):
        locks.perform(SetLock(SHARE, 1, NODE, handles[0], owner, owner, owner, WRITE))
    for handle in handles[:6]:
        locks.perform(SetLock(SHARE, 1, NODE, handle, 0, 0, 0, READ, whole=True))
    for call in (
        SetLock(SHARE, 1, NODE, handles[0], 99, 50, 50, WRITE),
        SetLock(SHARE, 1, NODE, handles[19], 0, 0, 0, READ, whole=True),
    ):
        with pytest.raises(OSError) as refused:
            locks.perform(call)
        assert refused.value.errno == errno.ENOLCK
    assert locks.descriptors == FEWEST
    locks.perform(Release(SHARE, 1, NODE, handles[0], 0))
    assert locks.descriptors == 5
    locks.perform(call)
    locks.close()


def test_a_file_that_cannot_be_written_can_be_locked_for_reading(bench: Bench) -> None:
    asked: list[int] = []

    def read_only(node: int, flags: int) -> int:
        asked.append(flags)
        if flags != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        return bench.open(node, flags)

    locks = HostLocks(SHARE, bench.journal, read_only)
    handle = locks.perform(OpenForLocks(SHARE, 1, NODE, os.O_RDONLY))
    assert isinstance(handle, Opened)
    locks.perform(SetLock(SHARE, 1, NODE, handle.handle, 5, 0, 9, READ))
    assert asked == [os.O_RDWR, os.O_RDONLY]
    assert not posix_lock_of_another(bench.file, 0, 0)
    locks.close()


@pytest.mark.parametrize(
    ("start", "end", "kind"), [(-1, 5, READ), (5, 4, READ), (0, 1 << 63, READ), (0, 1, 3), (0, 1, -1)]
)
def test_nonsense_is_invalid(bench: Bench, start: int, end: int, kind: int) -> None:
    handle = bench.handle()
    with pytest.raises(OSError) as refused:
        bench.set(handle, 5, start, end, kind)
    assert refused.value.errno == errno.EINVAL
    assert bench.locks.descriptors == 0


def test_numbers_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HANDLES", 2)
    monkeypatch.setattr(module, "MAX_RANGES", 2)
    handle, _ = bench.handle(), bench.handle()
    with pytest.raises(OSError) as refused:
        bench.handle()
    assert refused.value.errno == errno.ENFILE
    bench.set(handle, 5, 0, 0, READ)
    bench.set(handle, 5, 2, 2, READ)
    with pytest.raises(OSError) as refused:
        bench.set(handle, 5, 4, 4, READ)
    assert refused.value.errno == errno.ENOLCK
    assert posix_lock_of_another(bench.file, 4, 1)


# --- after a kill ----------------------------------------------------------------------------------


def test_a_successor_takes_the_locks_again(bench: Bench) -> None:
    handle, other = bench.handle(), bench.handle()
    bench.whole(handle, WRITE)
    bench.set(handle, 5, 0, 9, WRITE)
    bench.set(handle, 5, 20, WHOLE_FILE_END, READ)
    bench.killed()
    assert flock_of_another(bench.file)
    bench.locks.settle()
    assert bench.locks.lost == 0
    assert not flock_of_another(bench.file)
    assert not posix_lock_of_another(bench.file, 0, 1)
    assert not posix_lock_of_another(bench.file, 1000, 1)
    assert posix_lock_of_another(bench.file, 10, 10)
    bench.set(other, 5, 0, WHOLE_FILE_END, UNLOCK)  # the handle is still good
    assert posix_lock_of_another(bench.file, 0, 0)
    assert bench.handle() == other + 1, "a number is not given out again"


def test_the_first_call_finds_the_locks_taken_again(bench: Bench) -> None:
    handle = bench.handle()
    bench.set(handle, 5, 0, 9, WRITE)
    bench.killed()
    with pytest.raises(BlockingIOError):
        bench.set(handle, 6, 0, 9, WRITE)


def test_a_successor_knows_what_was_locked_through_which_handle(bench: Bench) -> None:
    first, second = bench.handle(), bench.handle()
    bench.set(first, OPEN_FILE, 0, 9, WRITE)
    bench.set(second, PROCESS, 20, 29, WRITE)
    for _ in range(2):
        bench.killed()
        bench.locks.settle()
    assert not posix_lock_of_another(bench.file, 0, 1)
    bench.locks.perform(Release(SHARE, 1, NODE, first, 0))
    assert posix_lock_of_another(bench.file, 0, 1)
    assert not posix_lock_of_another(bench.file, 20, 1)
    bench.killed()
    bench.locks.settle()
    assert posix_lock_of_another(bench.file, 0, 1)
    bench.locks.perform(Release(SHARE, 1, NODE, second, 0))
    assert (bench.locks.descriptors, bench.locks.lost) == (0, 0)


def test_what_somebody_took_meanwhile_is_lost_and_counted(bench: Bench) -> None:
    handle = bench.handle()
    bench.whole(handle, READ)
    bench.set(handle, 5, 0, 9, WRITE)
    bench.set(handle, 5, 20, 29, WRITE)
    bench.killed()
    with bench.file.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, 0, 10, 0))
        bench.locks.settle()
        assert bench.locks.lost == 2
        assert not posix_lock_of_another(bench.file, 20, 1)
    bench.killed()
    bench.locks.settle()
    assert bench.locks.lost == 0, "and the next successor does not try to get it either"
    assert flock_of_another(bench.file)
    assert posix_lock_of_another(bench.file, 0, 10)
    assert not posix_lock_of_another(bench.file, 20, 1)


def test_a_file_that_is_gone_loses_its_locks(bench: Bench) -> None:
    bench.set(bench.handle(), 5, 0, 9, WRITE)
    bench.killed()
    bench.file.unlink()
    bench.locks.settle()
    assert bench.locks.lost == 1


# --- with the descriptor store ---------------------------------------------------------------------


def test_a_description_outlives_the_server(bench: Bench, tmp_path: Path) -> None:
    """Nobody can take the lock in between, and it is not tried again, but gone on with."""
    with closing(DescriptorStore()) as store:
        with store.opened() as (_, theirs), closing(Keepsakes(theirs)) as keepsakes:
            bench.successor(keepsakes)
            flocked, ranged = bench.handle(), bench.handle()
            bench.whole(flocked, WRITE)
            bench.set(ranged, 5, 10, 19, WRITE)
            bench.journal.flush()
        bench.locks.close()
        assert len(store) == 2
        assert not flock_of_another(bench.file)
        assert not posix_lock_of_another(bench.file, 10, 1)
        with store.opened() as (ours, theirs), closing(Keepsakes(theirs)) as keepsakes:
            opened = bench.opened
            bench.successor(keepsakes)
            bench.locks.settle()
            assert bench.opened == opened
            assert bench.locks.lost == 0
            bench.set(ranged, 6, 30, 39, WRITE)
            bench.set(ranged, 5, 0, WHOLE_FILE_END, UNLOCK)
            assert posix_lock_of_another(bench.file, 10, 1)  # at once, whatever the store does
            bench.whole(flocked, UNLOCK)
            assert flock_of_another(bench.file)
            store.take_in(ours)
            assert len(store) == 1


def test_a_kept_description_goes_with_the_handle(bench: Bench) -> None:
    with closing(DescriptorStore()) as store:
        with store.opened() as (_, theirs), closing(Keepsakes(theirs)) as keepsakes:
            bench.successor(keepsakes)
            handle = bench.handle()
            bench.set(handle, OPEN_FILE, 10, 19, WRITE)
            bench.journal.flush()
        bench.locks.close()
        with store.opened() as (ours, theirs), closing(Keepsakes(theirs)) as keepsakes:
            bench.successor(keepsakes)
            bench.locks.perform(Release(SHARE, 1, NODE, handle, 0))
            assert posix_lock_of_another(bench.file, 10, 1)
            store.take_in(ours)
            assert len(store) == 0


def test_a_lock_that_nobody_was_told_of_is_let_go_of(bench: Bench) -> None:
    with closing(DescriptorStore()) as store:
        with store.opened() as (_, theirs), closing(Keepsakes(theirs)) as keepsakes:
            bench.successor(keepsakes)
            handle = bench.handle()
            bench.journal.flush()
            kept = keepsakes.of(SHARE)
            with bench.file.open("rb") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                kept.keep_lock(kept.flock(handle), other.fileno())
        assert not flock_of_another(bench.file)
        with store.opened() as (ours, theirs), closing(Keepsakes(theirs)) as keepsakes:
            bench.successor(keepsakes)
            bench.whole(handle, WRITE)
            bench.whole(handle, UNLOCK)
            store.take_in(ours)
            assert len(store) == 0
