"""What the VM's disk takes of this machine's, and when there is little of that left.

The law: who watches an instance and who examines the machine judge by the same mark. QEMU stops a VM whose disk
cannot grow, so the user is told while there is still something that can be done about it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from host_agent import sizes

LITTLE_ROOM: Final = 5 << 30
"""Bytes of this machine's disk: an image or two, and it is full, which stops the VM."""

ENOUGH_MORE: Final = 1 << 30
"""Bytes above the mark from which on there is room again, so that nobody is told the same thing twice a minute."""


class DiskState(StrEnum):
    """Of the machine's disk; as ``InstanceStatus`` says it."""

    ROOMY = ""
    LOW = "low"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """In bytes: the VM's disk is ``size``, of which it takes ``allocated`` here, where ``free`` are left."""

    size: int
    allocated: int
    free: int

    @classmethod
    def of(cls, disk: Path, size: int) -> DiskRoom:
        """``disk`` need not be there yet; its folder must. Raises ``OSError``."""
        return cls(size, allocated(disk), shutil.disk_usage(disk.parent).free)

    @property
    def mark(self) -> int:
        """With fewer free bytes there is little room: less than the VM's disk may still take."""
        return min(LITTLE_ROOM, max(0, self.size - self.allocated))

    def judged(self, before: DiskState, *, stopped: bool) -> DiskState:
        """How things are, after they were ``before``; ``stopped``: QEMU has stopped the VM for want of room."""
        if stopped:
            return DiskState.FULL
        mark = self.mark if before is DiskState.ROOMY else self.mark + ENOUGH_MORE
        return DiskState.LOW if self.free < mark and self.mark else DiskState.ROOMY


def allocated(path: Path) -> int:
    """Bytes of the disk that a sparse file takes; 0 of one that is not there."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def little_left(free: int) -> str:
    """A sentence about it."""
    return f"{sizes.show(free)} are left on this machine's disk; once it is full, the VM waits"


LOW_HINT: Final = "free some space; what the VM has deleted: agentctl disk compact"
