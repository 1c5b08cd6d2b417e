"""Which devices are those of mounts that are shown empty.

In a guest that shows its files they are FUSE's, the folders of the host's above all: those are its own, and it can look
at them without us. On a host they are the views of guests. If either was served, a tree would be looked for in itself,
by a process that waits for its own answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

MOUNTINFO: Final = Path("/proc/self/mountinfo")

LOOK_AGAIN: Final = 1.0
"""Seconds for which a look is good. The number of a mount that has gone is another one's at once."""

IsMeant = Callable[[bytes], bool]
"""Of a kind of filesystem, as mountinfo names it."""


class ForeignDevices:
    """Contains device numbers (st_dev). Thread-safe: what it holds is replaced, not changed."""

    def __init__(
        self, is_meant: IsMeant, mountinfo: Path = MOUNTINFO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_meant = is_meant
        self._mountinfo = mountinfo
        self._clock = clock
        self._looked = float("-inf")
        self._devices: frozenset[int] = frozenset()

    def __contains__(self, device: object) -> bool:
        if not isinstance(device, int) or (os.major(device) and device not in self._devices):
            return False  # of a disk, which is asked about most: no reason to look
        if self._clock() - self._looked >= LOOK_AGAIN:
            self._looked = self._clock()
            self._devices = self._look()
        return device in self._devices

    def _look(self) -> frozenset[int]:
        try:
            return devices_of(self._is_meant, self._mountinfo.read_bytes())
        except OSError:  # on systems that have none
            return frozenset()


def is_fuse(kind: bytes) -> bool:
    """Of a filesystem that a process serves."""
    return kind in (b"fuse", b"fuseblk") or kind.startswith(b"fuse.")


def devices_of(is_meant: IsMeant, mountinfo: bytes) -> frozenset[int]:
    """The device numbers of mounts. Format: proc_pid_mountinfo(5)."""
    found = set()
    for line in mountinfo.splitlines():
        fields = line.split(b" ")
        if is_meant(fields[fields.index(b"-", 6) + 1]):
            major, _, minor = fields[2].partition(b":")
            found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)
