"""The memory of the bulk plane as one side has it mapped: which bytes are whose slots. Sans-IO.

Both sides map the same file, in one piece: ``SLOTS`` slots, then a mark page for each plane. Each plane has a range of
the slots, the first half of it the host's to write to, the second the guest's. The law: who has a view has memory;
``close`` lets the views out there live on, and the mapping ends with the last of them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from protocol.bulk import SLOT
from protocol.session import Role

_MADV_POPULATE_WRITE: Final = 23
"""linux/mman.h, since Linux 5.14; ``mmap`` has no name for it before Python 3.13."""

MARK_PAGE: Final = 4096
"""A page of its own, so that a mark is one in the tables of either kernel."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane's part of the file: ``slots`` for each side, from ``first`` on, and the mark page ``number``."""

    first: int
    slots: int
    number: int


CONTROL: Final = Plane(0, 64, 0)
FILES: Final = Plane(128, 128, 1)

SLOTS: Final = FILES.first + 2 * FILES.slots

FILE_SIZE: Final = SLOTS * SLOT + 2 * MARK_PAGE
"""48 MiB and two pages."""


class Region:
    """``memory`` is the whole file, mapped shared."""

    def __init__(self, memory: mmap.mmap) -> None:
        if len(memory) != FILE_SIZE:
            raise ValueError(f"the shared memory has {len(memory)} bytes instead of {FILE_SIZE}")
        self._memory = memory
        self._view = memoryview(memory)

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot, counted over the whole file."""
        if not 0 <= slot < SLOTS:
            raise ValueError(f"there is no slot {slot}")
        return self._view[slot * SLOT : (slot + 1) * SLOT]

    def halves(self, plane: Plane, role: Role) -> tuple[memoryview, memoryview]:
        """The slots of ``plane`` that ``role`` writes to, and those that it reads."""
        middle, end = plane.first + plane.slots, plane.first + 2 * plane.slots
        host = self._view[plane.first * SLOT : middle * SLOT]
        guest = self._view[middle * SLOT : end * SLOT]
        return (host, guest) if role is Role.HOST else (guest, host)

    def mark(self, plane: Plane) -> memoryview:
        """The plane's mark page, by which both sides see that it is the same memory that they have."""
        start = SLOTS * SLOT + plane.number * MARK_PAGE
        return self._view[start : start + MARK_PAGE]

    def populate(self, plane: Plane) -> None:
        """Have the slots of ``plane`` in this process's page tables now, so that no system call that copies to or
        from them has to wait for a page. A kernel that cannot do that maps page by page, as they are used."""
        with suppress(OSError):
            self._memory.madvise(_MADV_POPULATE_WRITE, plane.first * SLOT, 2 * plane.slots * SLOT)

    def close(self) -> None:
        """Let go of the memory. It stays mapped for whoever still has a view."""
        self._view.release()
        with suppress(BufferError):
            self._memory.close()
