"""How much there is to copy, found out beside the copy: for a share of the whole, and no more exact than that needs."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Sequence
from typing import Final

from protocol.treeparts import is_part

#: Seconds that the copy waits for it: that of a few thousand files is there at once.
WAIT: Final = 0.2


class Survey:
    """Sums up what is below ``paths``, in a thread of its own that ends when the block does."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._total: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="survey", daemon=True)

    def __enter__(self) -> Survey:
        self._thread.start()
        self._thread.join(WAIT)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def take(self) -> int | None:
        """Bytes of all files together, once, as soon as they are known."""
        total, self._total = self._total, None
        return total

    def _run(self) -> None:
        seen: set[tuple[int, int]] = set()
        total = 0
        folders = []
        for path in self._paths:
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode):
                    total += status.st_size
                elif stat.S_ISDIR(status.st_mode):
                    folders.append(path)
        while folders and not self._ended.is_set():
            with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    total += _size(entry, folders, seen)
        if not self._ended.is_set():
            self._total = total


def _size(entry: os.DirEntry[str], folders: list[str], seen: set[tuple[int, int]]) -> int:
    if entry.is_dir(follow_symlinks=False):
        folders.append(entry.path)
        return 0
    if not entry.is_file(follow_symlinks=False) or is_part(os.fsencode(entry.name)):
        return 0
    status = entry.stat(follow_symlinks=False)
    if status.st_nlink > 1:
        if (status.st_dev, status.st_ino) in seen:
            return 0
        seen.add((status.st_dev, status.st_ino))
    return status.st_size
