"""Which systemd unit a socket belongs to, from the cgroup id that the kernel keeps with the socket.

The kernel stores the cgroup of the process that *made* a socket, so the answer outlives that process
and is the same for every process that inherited it. A cgroup's id is the inode number of its folder
below the cgroup2 mount (kernfs, 64 bits); ids are never used twice within a boot.
"""

from __future__ import annotations

import os
from pathlib import Path

HIERARCHIES = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
"""Where cgroup2 is mounted: alone, or beside version 1 (systemd's hybrid mode)."""

MAX_CACHED = 4096
"""Ids remembered. A guest has some hundreds of cgroups; beyond this the cache starts afresh."""


def find_hierarchy() -> Path | None:
    """The mount point of cgroup2, or None where there is none."""
    return next((path for path in HIERARCHIES if (path / "cgroup.controllers").exists()), None)


def unit_of(path: str) -> str:
    """The unit a cgroup path belongs to: its outermost component that is a service, scope or the like.

    ``/system.slice/docker.service`` is ``docker.service``; what a unit makes below itself is still
    that unit. Slices only group units. Empty for a cgroup that systemd knows nothing of.
    """
    units = (part for part in path.split("/") if part.endswith((".service", ".scope", ".socket", ".mount")))
    return next(units, "")


class Units:
    """A cache from cgroup id to unit name; walks the hierarchy only for an id it has not met."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._names: dict[int, str] = {}
        self.walks = 0

    def name(self, cgroup_id: int) -> str:
        """The unit of a cgroup, empty if the cgroup is gone or belongs to no unit."""
        if cgroup_id not in self._names and self._root is not None:
            self._walk(self._root)
            # A cgroup that was removed before anyone looked will not come back: remember that, too.
            self._names.setdefault(cgroup_id, "")
        return self._names.get(cgroup_id, "")

    def _walk(self, root: Path) -> None:
        self.walks += 1
        if len(self._names) > MAX_CACHED:
            self._names.clear()
        for folder, _, _, folder_fd in os.fwalk(root, onerror=None):
            self._names.setdefault(os.fstat(folder_fd).st_ino, unit_of(folder.removeprefix(str(root))))
