"""Writes that a program was answered for before the host has them: counted where both agents see it.

The files agent answers a write ahead, and its program goes on to say something by another way: an exit status, an
answer over a forwarded port. The law: that leaves the guest agent only once the write is on the host. So the files
agent publishes two numbers in a page that both map, and the guest agent's link compares them before it writes
(``protocol.outlet.Fence``): ``answered``, the last ticket given out, and ``landed``, up to which all have come. (How
many have come would not do: a later write's result would pass for an earlier one's.)

One thread of one process writes, one reads; each number is eight bytes, aligned, which x86-64 and aarch64 store and
load whole. A ticket is published before its program is answered, and that, a system call, orders what is seen of it.
No memory is no error: nothing waits then, and nobody should answer ahead (``shared``).
"""

from __future__ import annotations

import logging
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from guest_agent.spool import START, Left, Spool

log = logging.getLogger(__name__)

FILE: Final = Path("/run/agentctl/fence")
"""In a VM, whose agents are both root's. On other machines see ``RunDir.fence``."""

SIZE: Final = START
"""Bytes of the file's first page, of which sixteen are used. Behind it is the spool."""

_ANSWERED: Final = 0
_LANDED: Final = 1


class Tickets:
    """What was answered ahead and has come, by number: from 1 on, or what comes after ``answered``.

    ``landed`` is the last before the lowest that is outstanding; results come in any order.
    """

    __slots__ = ("_early", "answered", "landed")

    def __init__(self, answered: int = 0, landed: int | None = None) -> None:
        self.answered = answered
        self.landed = answered if landed is None else landed
        self._early: set[int] = set()  # have come while one before them is outstanding

    def begin(self) -> int:
        self.answered += 1
        return self.answered

    def end(self, ticket: int) -> bool:
        """Whether ``landed`` is another now. A ticket that has ended already changes nothing."""
        if ticket != self.landed + 1:
            if ticket > self.landed:
                self._early.add(ticket)
            return False
        self.landed = ticket
        while self._early and (following := self.landed + 1) in self._early:
            self._early.remove(following)
            self.landed = following
        return True


class Unfenced:
    """Of whom nobody is told: the files agent's end where there is no memory."""

    shared = False
    """Whether the guest agent sees it. If not, who is answered ahead may be heard of before what he wrote is there."""

    spooled = False
    """Whether what is answered ahead outlives this process, also if it has not left."""
    left: Sequence[Left] = ()
    """What a killed predecessor has answered for and may not have landed, in order: to be asked again, with its
    tickets."""

    def begin(self, call: bytes = b"", payload: bytes | memoryview = b"") -> int:
        """Before a program is answered ahead for ``call``, which is on its way: its ticket; 0: it may not be."""
        return 0

    def end(self, ticket: int) -> None:
        """The host has done the write, or has failed to."""


class Writer(Unfenced):
    """The files agent's end. With a spool, what its predecessor left outstanding still is, as far as it is there
    (``left``). Without, it counts as landed: it is with the transport, and nobody will say when it has come."""

    shared = True

    def __init__(self, numbers: memoryview, spool: Spool | None = None) -> None:
        """``numbers``: of the file's first page."""
        self._numbers = numbers
        self._spool = spool
        self.spooled = spool is not None
        landed, answered = numbers[_LANDED], numbers[_ANSWERED]
        self.left = () if spool is None else spool.left(landed, answered)
        self._tickets = Tickets(answered, self.left[0].ticket - 1 if self.left else answered)
        for ticket in range((self.left[-1].ticket if self.left else answered) + 1, answered + 1):
            self._tickets.end(ticket)
        numbers[_LANDED] = self._tickets.landed

    def begin(self, call: bytes = b"", payload: bytes | memoryview = b"") -> int:
        tickets = self._tickets
        if self._spool is not None:
            if tickets.landed == tickets.answered:
                self._spool.clear()
            if not self._spool.keep(tickets.answered + 1, call, payload):
                return 0
        ticket = self._numbers[_ANSWERED] = tickets.begin()
        return ticket

    def end(self, ticket: int) -> None:
        if self._tickets.end(ticket):
            self._numbers[_LANDED] = self._tickets.landed


class Reader:
    """The guest agent's end: a ``protocol.outlet.Fence``."""

    def __init__(self, numbers: memoryview) -> None:
        self._numbers = numbers

    def mark(self) -> int:
        # In this order: of what is answered in between, nothing is said yet.
        answered: int = self._numbers[_ANSWERED]
        return answered if answered > self._numbers[_LANDED] else 0

    def passed(self, mark: int) -> bool:
        landed: int = self._numbers[_LANDED]
        return landed >= mark


def open_writer(path: Path, *, spooled: bool = True) -> Unfenced:
    """``spooled``: what is answered ahead outlives this process, for a successor that takes over its mounts."""
    if (descriptor := _opened(path)) is None:
        return Unfenced()
    if (numbers := _mapped(path, descriptor, mmap.PROT_READ | mmap.PROT_WRITE)) is None:
        os.close(descriptor)
        return Unfenced()
    if spooled:
        return Writer(numbers, Spool(descriptor))
    os.close(descriptor)
    return Writer(numbers)


def open_reader(path: Path) -> Reader | None:
    if (descriptor := _opened(path)) is None:
        return None
    try:
        numbers = _mapped(path, descriptor, mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return None if numbers is None else Reader(numbers)


def _opened(path: Path) -> int | None:
    """The file ``path``, which either agent makes, whoever comes first; None if that cannot be."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.info("fence.none path=%s error=%s", path, error.strerror)
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    log.warning("fence.foreign path=%s uid=%d", path, status.st_uid)
    return None


def _mapped(path: Path, descriptor: int, access: int) -> memoryview | None:
    """The numbers."""
    try:
        # No store may find the filesystem full: that would be a SIGBUS.
        os.posix_fallocate(descriptor, 0, SIZE)
        return memoryview(mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=access)).cast("Q")
    except OSError as error:
        log.warning("fence.unusable path=%s error=%s", path, error.strerror)
        return None
