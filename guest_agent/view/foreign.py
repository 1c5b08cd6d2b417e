"""Which devices are FUSE's: folders of the host's that are mounted here, above all.

They are shown empty. They are the host's own files, which it can look at without us; and a view that lies in one of
them would be looked for in itself, by a process that waits for its own answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

MOUNTINFO: Final = Path("/proc/self/mountinfo")

LOOK_AGAIN: Final = 1.0
"""Seconds for which a look is good."""


class FuseDevices:
    """Thread-safe: what it holds is replaced, not changed."""

    def __init__(self, mountinfo: Path = MOUNTINFO, clock: Callable[[], float] = time.monotonic) -> None:
        self._mountinfo = mountinfo
        self._clock = clock
        self._looked = float("-inf")
        self._devices: frozenset[int] = frozenset()

    def __contains__(self, device: object) -> bool:
        if device in self._devices:
            return True
        if isinstance(device, int) and os.major(device) == 0 and self._clock() - self._looked >= LOOK_AGAIN:
            self._looked = self._clock()
            self._devices = fuse_devices(self._mountinfo.read_bytes())
            return device in self._devices
        return False


def fuse_devices(mountinfo: bytes) -> frozenset[int]:
    """The numbers (st_dev) of mounts that a process serves. Format: proc_pid_mountinfo(5)."""
    found = set()
    for line in mountinfo.splitlines():
        fields = line.split(b" ")
        kind = fields[fields.index(b"-", 6) + 1]
        if kind in (b"fuse", b"fuseblk") or kind.startswith(b"fuse."):
            major, _, minor = fields[2].partition(b":")
            found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)
