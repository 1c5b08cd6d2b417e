"""Locks of the guest's processes that are locks on the host, too.

The laws:
- A handle is one open file of the guest, so its flock(2) is that of one open file description here. A POSIX
  lock belongs to a file and an owner (a process there), so it is an *open file description lock* (F_OFD_SETLK,
  fcntl(2)) on one description for each of them: it excludes host processes whichever kind they use, and other
  owners, and does not go away when this process closes some other descriptor of the file.
- With a handle go all locks that were taken through it, whoever their owner is. A process (the owner of POSIX locks)
  gives back all that it has of a file with each descriptor of it that it closes (``ReleaseOwner``, for FUSE_FLUSH), and
  that comes before the handle can go with the last of them (filp_close): by then it has none left through this handle.
  The owner of an open file description lock of the guest's (F_OFD_SETLK) is the open file itself, for which no FLUSH
  comes. The guest's agent gives those back too, but not if it was started anew meanwhile; then nobody else would.
- A lock is never waited for here: the guest asks again. So a lost guest leaves no waiter behind.
- Closing a description is how its locks are released, and nothing is open that holds none: a file that is open for
  writing cannot be executed on the host.
- What is held is in the journal, and the description that holds it in the descriptor store: a successor goes on with
  that. Where the store had no room, it takes the lock again; what somebody else has taken meanwhile is lost, counted
  and told, since there is no way to tell the process in the guest.
- A description of which there is a copy is unlocked before it is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from fileserver.budget import Budget
from fileserver.journal import Journal
from fileserver.keepsakes import Keepsakes, Name, ShareKeepsakes
from fileserver.ledger import Kind, LockRecord
from protocol.api import Done
from protocol.files import LockState, Opened, OpenForLocks, Release, ReleaseOwner, SetLock, TestLock

logger = logging.getLogger(__name__)

READ: Final = 0
WRITE: Final = 1
UNLOCK: Final = 2
"""F_RDLCK, F_WRLCK and F_UNLCK as Linux numbers them, which is what the guest says."""

WHOLE_FILE_END: Final = (1 << 63) - 1
"""The ``end`` of a lock up to wherever the file ends."""

#: Open files of the guest's on one share: a number each, and a descriptor only while it holds a lock.
MAX_HANDLES: Final = 1 << 18
#: Pieces of one file that one owner has locked; sqlite has three.
MAX_RANGES: Final = 4096

# struct flock: l_type, l_whence, l_start, l_len, l_pid, which must be 0 for F_OFD_* (fcntl(2)).
_FLOCK: Final = struct.Struct("@hhqqi4x")
_WHOLE_OPERATIONS: Final = {READ: fcntl.LOCK_SH, WRITE: fcntl.LOCK_EX, UNLOCK: fcntl.LOCK_UN}
_TYPES: Final = {READ: fcntl.F_RDLCK, WRITE: fcntl.F_WRLCK, UNLOCK: fcntl.F_UNLCK}
_KINDS: Final = {number: kind for kind, number in _TYPES.items()}

Range = tuple[int, int, int]
"""start, end (inclusive), READ or WRITE"""

OwnerKey = tuple[int, int]
"""node, owner"""


def with_lock(ranges: list[Range], start: int, end: int, kind: int) -> list[Range]:
    """The ranges one owner holds after ``start`` to ``end`` became ``kind``: sorted, neighbours of a kind joined."""
    others: list[Range] = []
    for held_start, held_end, held in ranges:
        if held == kind and held_start <= end + 1 and start - 1 <= held_end:
            start, end = min(start, held_start), max(end, held_end)
            continue
        if held_start < start:
            others.append((held_start, min(held_end, start - 1), held))
        if held_end > end:
            others.append((max(held_start, end + 1), held_end, held))
    if kind != UNLOCK:
        others.append((start, end, kind))
    return sorted(others)


@dataclass(slots=True)
class _Handle:
    """An open file of the guest's; ``fd`` is -1 while it holds no flock(2)."""

    node: int
    fd: int = -1
    owners: set[OwnerKey] = field(default_factory=set)  # of what was locked through it with fcntl(2)


@dataclass(slots=True)
class _Owner:
    """A process of the guest, as far as one file is concerned."""

    fd: int
    ranges: list[Range] = field(default_factory=list)
    handles: set[int] = field(default_factory=set)  # through which it has locked


class HostLocks:
    """The locks of one share. Thread-safe; lock calls of one share are done one after another."""

    def __init__(
        self,
        share: int,
        journal: Journal,
        open_file: Callable[[int, int], int],
        past: LockRecord | None = None,
        kept: dict[Name, int] | None = None,
        keepsakes: ShareKeepsakes | None = None,
        budget: Budget | None = None,
    ) -> None:
        """``open_file(node, flags)`` gives a descriptor of its own of a regular file, or raises ``OSError``.

        ``past`` is what a killed server held; it is taken again by ``settle``, or before the first call. What that
        needs of ``kept``, the descriptions with these locks, is taken out.
        """
        self._share = share
        self._journal = journal
        self._open_file = open_file
        self._past = past
        self._kept = {} if kept is None else kept
        self._keepsakes = keepsakes or Keepsakes().of(share)
        self._budget = budget or Budget()
        self._mutex = threading.Lock()
        self._handles: dict[int, _Handle] = {}
        self._owners: dict[OwnerKey, _Owner] = {}
        self._flocked = 0  # handles with a descriptor
        self._actions: dict[type, Callable[[Any], Any]] = {
            OpenForLocks: self._open,
            Release: self._release,
            ReleaseOwner: self._release_owner,
            TestLock: self._test,
            SetLock: self._set,
        }
        self.lost = 0

    @property
    def descriptors(self) -> int:
        """How many descriptors are open for locks."""
        return len(self._owners) + self._flocked

    def perform(self, call: object) -> object:
        """Do one lock call; returns its result. Raises ``OSError``; EAGAIN when another holds the lock."""
        with self._mutex:
            self._settle()
            return self._actions[type(call)](call)

    def settle(self) -> None:
        """Take again what a killed server held."""
        with self._mutex:
            self._settle()

    def close(self) -> None:
        """Close everything. What the descriptor store has stays locked, until that is told otherwise."""
        with self._mutex:
            self._past = None
            for handle in self._handles.values():
                if handle.fd >= 0:
                    os.close(handle.fd)
            for owner in self._owners.values():
                os.close(owner.fd)
            self._handles.clear()
            self._owners.clear()
            self._flocked = 0

    # --- the calls ---------------------------------------------------------------------------------

    def _open(self, call: OpenForLocks) -> Opened:
        if len(self._handles) >= MAX_HANDLES:
            raise _os_error(errno.ENFILE)
        handle = self._journal.next_handle()
        self._handles[handle] = _Handle(call.node)
        self._journal.add(Kind.HANDLE, self._share, handle, call.node)
        return Opened(handle)

    def _release(self, call: Release) -> Done:
        # A handle that is gone already is no error: a call may be asked again after a kill.
        if (handle := self._handles.pop(call.handle, None)) is not None:
            self._close_handle(call.handle, handle)
            for key in list(handle.owners):
                self._drop_owner(*key)
            self._journal.add(Kind.RELEASED, self._share, call.handle)
        return self._drop_owner(call.node, call.owner)

    def _release_owner(self, call: ReleaseOwner) -> Done:
        return self._drop_owner(call.node, call.owner)

    def _drop_owner(self, node: int, owner: int) -> Done:
        if (node, owner) in self._owners:
            self._close_owner(node, owner)
            self._journal.add(Kind.RANGES, self._share, node, owner, [])
        return Done()

    def _test(self, call: TestLock) -> LockState:
        self._handle(call)
        _check_range(call.start, call.end, call.kind, (READ, WRITE))
        held = self._owners.get((call.node, call.owner))
        fd = self._open_any(call.node) if held is None else held.fd
        try:
            request = _flock(call.start, call.end, call.kind)
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
        finally:
            if held is None:
                os.close(fd)
        kind, _, start, length, _ = _FLOCK.unpack(answer)
        end = start + length - 1 if length else WHOLE_FILE_END
        return LockState(_KINDS[kind], start, end, 0) if kind != fcntl.F_UNLCK else LockState(UNLOCK, 0, 0, 0)

    def _set(self, call: SetLock) -> Done:
        handle = self._handle(call)
        if call.whole:
            self._set_whole(call.handle, handle, call.kind)
        else:
            _check_range(call.start, call.end, call.kind, (READ, WRITE, UNLOCK))
            self._set_range(call)
            if call.kind != UNLOCK:
                self._locked_through((call.node, call.owner), call.handle)
        return Done()

    def _locked_through(self, key: OwnerKey, number: int) -> None:
        owner, handle = self._owners.get(key), self._handles.get(number)
        if owner is not None and handle is not None and number not in owner.handles:
            owner.handles.add(number)
            handle.owners.add(key)
            self._journal.add(Kind.THROUGH, self._share, *key, number)

    def _handle(self, call: SetLock | TestLock) -> _Handle:
        handle = self._handles.get(call.handle)
        if handle is None or handle.node != call.node:
            raise _os_error(errno.EBADF)
        return handle

    # --- flock(2) ----------------------------------------------------------------------------------

    def _set_whole(self, number: int, handle: _Handle, kind: int) -> None:
        if kind not in _WHOLE_OPERATIONS:
            raise _os_error(errno.EINVAL)
        try:
            self._flock(number, handle, kind)
        finally:
            # A conversion that fails has lost the lock that was there (flock(2)).
            self._journal.add(Kind.WHOLE, self._share, number, kind if handle.fd >= 0 else UNLOCK)

    def _flock(self, number: int, handle: _Handle, kind: int) -> None:
        if kind == UNLOCK:
            self._close_handle(number, handle)
            return
        if handle.fd < 0:
            handle.fd = self._open_to_lock(handle.node, os.O_RDONLY)
            self._flocked += 1
        try:
            fcntl.flock(handle.fd, _WHOLE_OPERATIONS[kind] | fcntl.LOCK_NB)
        except OSError:
            self._close_handle(number, handle)
            raise
        self._keepsakes.keep_lock(self._keepsakes.flock(number), handle.fd)

    def _close_handle(self, number: int, handle: _Handle) -> None:
        if handle.fd >= 0:
            _unlock(handle.fd)
            self._keepsakes.give_up_lock(self._keepsakes.flock(number))
            os.close(handle.fd)
            handle.fd = -1
            self._flocked -= 1

    # --- fcntl(2) ----------------------------------------------------------------------------------

    def _set_range(self, call: SetLock) -> None:
        key = (call.node, call.owner)
        owner = self._owners.get(key)
        if owner is None:
            if call.kind == UNLOCK:
                return
            owner = self._owners[key] = _Owner(self._open_to_lock(call.node))
        try:
            after = with_lock(owner.ranges, call.start, call.end, call.kind)
            if len(after) > MAX_RANGES:
                raise _os_error(errno.ENOLCK)
            fcntl.fcntl(owner.fd, fcntl.F_OFD_SETLK, _flock(call.start, call.end, call.kind))
            owner.ranges = after
        finally:
            if not owner.ranges:
                self._close_owner(*key)
        if owner.ranges:
            self._keepsakes.keep_lock(self._keepsakes.ranges(*key), owner.fd)
        self._journal.add(Kind.RANGES, self._share, *key, [list(piece) for piece in owner.ranges])

    def _close_owner(self, node: int, owner: int) -> None:
        key = (node, owner)
        gone = self._owners.pop(key)
        for number in gone.handles:
            if (handle := self._handles.get(number)) is not None:
                handle.owners.discard(key)
        _unlock(gone.fd)
        self._keepsakes.give_up_lock(self._keepsakes.ranges(*key))
        os.close(gone.fd)

    def _open_to_lock(self, node: int, first: int = os.O_RDWR) -> int:
        """A description that stays open for as long as the lock. Raises ENOLCK."""
        if self.descriptors >= self._budget.locks:
            raise _os_error(errno.ENOLCK)
        return self._open_any(node, first)

    def _open_any(self, node: int, first: int = os.O_RDWR) -> int:
        """A description of its own, open the way ``first`` says, else in any way there is."""
        for flags in (first, os.O_RDONLY):
            try:
                return self._open_file(node, flags)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                    raise
        return self._open_file(node, os.O_WRONLY)

    # --- after a kill ------------------------------------------------------------------------------

    def _settle(self) -> None:
        past, self._past = self._past, None
        if past is None:
            return
        self._handles = {number: _Handle(node) for number, node in past.handles.items()}
        for number, kind in past.whole.items():
            if kind != UNLOCK and (handle := self._handles.get(number)) is not None:
                handle.fd = self._kept.pop(self._keepsakes.flock(number), -1)
                self._flocked += handle.fd >= 0
                self._take_again(handle.node, partial(self._set_whole, number, handle, kind))
        for (node, owner), ranges in past.ranges.items():
            # What is not got again must not be tried again by the next successor either.
            self._journal.add(Kind.RANGES, self._share, node, owner, [])
            if (descriptor := self._kept.pop(self._keepsakes.ranges(node, owner), -1)) >= 0:
                self._owners[node, owner] = _Owner(descriptor)
            for start, end, kind in ranges:
                call = SetLock(self._share, 0, node, 0, owner, start, end, kind)
                self._take_again(node, partial(self._set_range, call))
            for number in past.through.get((node, owner), ()):
                self._locked_through((node, owner), number)
        self._let_go_of_kept()

    def _let_go_of_kept(self) -> None:
        """What nobody has written down was not answered either, and is asked again, of another description."""
        while self._kept:
            name, descriptor = self._kept.popitem()
            _unlock(descriptor)
            self._keepsakes.give_up_lock(name)
            os.close(descriptor)

    def _take_again(self, node: int, take: Callable[[], None]) -> None:
        try:
            take()
        except OSError as error:
            self.lost += 1
            logger.warning("share %d: a lock on node %d was lost: %s", self._share, node, error)


def _flock(start: int, end: int, kind: int) -> bytes:
    length = 0 if end == WHOLE_FILE_END else end - start + 1
    return _FLOCK.pack(_TYPES[kind], os.SEEK_SET, start, length, 0)


def _unlock(descriptor: int) -> None:
    """Whatever it holds. What a network filesystem refuses here ends with the copy, which is closed soon."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(0, WHOLE_FILE_END, UNLOCK))


def _check_range(start: int, end: int, kind: int, kinds: tuple[int, ...]) -> None:
    if not 0 <= start <= end <= WHOLE_FILE_END or kind not in kinds:
        raise _os_error(errno.EINVAL)


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
