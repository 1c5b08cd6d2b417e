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
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

FILE: Final = Path("/run/agentctl/fence")
"""In a VM, whose agents are both root's. On other machines see ``RunDir.fence``."""

SIZE: Final = 4096
"""Bytes of the file: a page, of which sixteen are used."""

_ANSWERED: Final = 0
_LANDED: Final = 1


class Tickets:
    """What was answered ahead and has come, by number: from 1 on, or what comes after ``answered``.

    ``landed`` is the last before the lowest that is outstanding; results come in any order.
    """

    __slots__ = ("_early", "answered", "landed")

    def __init__(self, answered: int = 0) -> None:
        self.answered = self.landed = answered
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

    def begin(self) -> int:
        """Before a program is answered ahead: the write's ticket."""
        return 0

    def end(self, ticket: int) -> None:
        """The host has done the write, or has failed to."""


class Writer(Unfenced):
    """The files agent's end. What its predecessor left outstanding counts as landed: it is with the transport, and
    nobody will say when it has come."""

    shared = True

    def __init__(self, numbers: memoryview) -> None:
        """``numbers``: as ``mapped`` gives them."""
        self._numbers = numbers
        self._tickets = Tickets(numbers[_ANSWERED])
        numbers[_LANDED] = self._tickets.landed

    def begin(self) -> int:
        ticket = self._numbers[_ANSWERED] = self._tickets.begin()
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


def open_writer(path: Path) -> Unfenced:
    numbers = mapped(path, mmap.PROT_READ | mmap.PROT_WRITE)
    return Unfenced() if numbers is None else Writer(numbers)


def open_reader(path: Path) -> Reader | None:
    numbers = mapped(path, mmap.PROT_READ)
    return None if numbers is None else Reader(numbers)


def mapped(path: Path, access: int) -> memoryview | None:
    """The numbers in the file ``path``, which either agent makes, whoever comes first; None if that cannot be."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.info("fence.none path=%s error=%s", path, error.strerror)
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            log.warning("fence.foreign path=%s uid=%d", path, status.st_uid)
            return None
        os.posix_fallocate(
            descriptor, 0, SIZE
        )  # no store may find the filesystem full: that would be a SIGBUS
        return memoryview(mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=access)).cast("Q")
    except OSError as error:
        log.warning("fence.unusable path=%s error=%s", path, error.strerror)
        return None
    finally:
        os.close(descriptor)
