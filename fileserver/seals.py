"""Directories of the host that no guest may see into, and what leads to them.

The laws:
- A sealed directory is known by what it is (st_dev, st_ino), so it is sealed by whatever name a guest reaches it.
- What its path leads through, directories and symlinks, stays where it is: else a guest could put a folder of its
  own where the host looks for the sealed one.
- What was sealed once stays so: a look that comes too late, or sees less, takes nothing back.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable
from typing import Final

from fileserver.linux import failure

logger = logging.getLogger(__name__)

MAX_SYMLINKS: Final = 40
"""In one path: the kernel's own bound (MAXSYMLINKS, include/linux/namei.h)."""

_File = tuple[int, int]


class Seals:
    """The directories at ``paths``; contains (st_dev, st_ino). Thread-safe: what it holds is replaced, not changed."""

    def __init__(
        self, paths: Iterable[str | bytes] = (), is_foreign: Callable[[int], bool] = lambda device: False
    ) -> None:
        """``is_foreign``: also everything on such a device (st_dev) is sealed."""
        self._is_foreign = is_foreign
        self._paths = tuple(os.path.join(os.getcwdb(), os.fsencode(path)) for path in paths)
        self._sealed: frozenset[_File] = frozenset()
        self._ways: frozenset[_File] = frozenset()

    def __contains__(self, file: object) -> bool:
        return file in self._sealed or (isinstance(file, tuple) and self._is_foreign(file[0]))

    def __bool__(self) -> bool:
        return bool(self._sealed)

    def is_on_the_way(self, file: _File) -> bool:
        """Whether a sealed directory is below ``file``, or is reached through this symlink."""
        return file in self._ways

    def look(self) -> bool:
        """Find the directories; one that does not exist seals nothing. True if one more is sealed."""
        before = self._sealed
        for path in self._paths:
            try:
                end, way = _follow(path)
            except OSError as error:
                logger.warning("nothing to hide at %s: %s", os.fsdecode(path), error)
                continue
            self._sealed |= {end}
            self._ways |= way
        return self._sealed != before


def _follow(path: bytes) -> tuple[_File, frozenset[_File]]:
    """What ``path`` (absolute) means, and every directory and symlink that it leads through below ``/``."""
    here, todo = b"/", path.split(b"/")[::-1]
    met: set[_File] = set()
    links = 0
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            here = os.path.dirname(here)  # without symlinks, as it always is
            continue
        entry = os.path.join(here, name)
        status = os.lstat(entry)
        met.add((status.st_dev, status.st_ino))
        if not stat.S_ISLNK(status.st_mode):
            here = entry
            continue
        links += 1
        if links > MAX_SYMLINKS:
            raise failure(errno.ELOOP)
        target = os.readlink(entry)
        if target.startswith(b"/"):
            here = b"/"
        todo += target.split(b"/")[::-1]
    status = os.lstat(here)
    end = (status.st_dev, status.st_ino)
    return end, frozenset(met - {end})
