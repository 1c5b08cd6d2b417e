"""Files that have not come whole yet: what a copy that was cut off leaves, beside the file that it is to be.

``.agentctl-part-TARGET-SOURCE``, where TARGET is of the name that it is to get and SOURCE of what it is a part of
(``treeresume.identity``). The laws: a part is locked by the copy that writes it, so that two of them never write one;
one of another source is never gone on with, and goes as soon as the same name is copied again; one that nobody has
touched for a week goes when something large is next copied into its folder. What somebody else may have put there under
such a name is neither read nor written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

PREFIX: Final = b".agentctl-part-"
#: What is not kept begins so; it stays if the copy is killed.
UNKEPT: Final = b".agentctl-cp-"
#: Seconds after which a part that nobody has gone on with goes.
KEPT_FOR: Final = 7 * 24 * 3600.0
#: Seconds that a part is waited for which another copy is at: most likely one that is just about to find out that it
#: was cut off.
PATIENCE: Final = 10.0

_OPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def folder_mark(name: bytes, source: bytes) -> bytes:
    """In a folder that is new under another name: it is a copy of ``name``, of ``source``, which is not complete."""
    return PREFIX + _of(name + b"/" + source) + b"-folder"


def is_part(name: bytes) -> bool:
    return name.startswith(PREFIX)


@dataclass(slots=True)
class Part:
    """One that is ours alone until it is closed, which leaves it where it is."""

    name: bytes
    descriptor: int

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        os.close(self.descriptor)


class Parts:
    """Those of the folders that one copy comes to."""

    def __init__(self, clock: Callable[[], float] = time.time, patience: float = PATIENCE) -> None:
        self._clock = clock
        self._patience = patience
        self._names: dict[tuple[int, int], list[bytes]] = {}

    def find(self, folder: int, target: bytes, source: bytes) -> Part | None:
        """What is there of ``target``. Others of the same target are removed, and what is too old."""
        wanted = _name(target, source)
        found = None
        for name in self._in(folder):
            if name == wanted:
                found = self._when_free(folder, name)
            elif name.startswith(PREFIX + _of(target) + b"-") and not name.endswith(b"-folder"):
                _remove(folder, name)
        return found

    def make(self, folder: int, target: bytes, source: bytes) -> Part | None:
        """An empty one. None if there can be none: another copy is at it. Raises ``OSError``."""
        name, new = _name(target, source), False
        with contextlib.suppress(FileExistsError):
            os.close(os.open(name, _OPEN | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder))
            new = True
        try:
            part = _locked(folder, name)
        except BlockingIOError:
            return None
        if part is not None:
            os.ftruncate(part.descriptor, 0)
        elif new:  # where files are not ours though we make them, or cannot be locked
            os.unlink(name, dir_fd=folder)
        return part

    def _when_free(self, folder: int, name: bytes) -> Part | None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return _locked(folder, name)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return None
            time.sleep(0.05)

    def _in(self, folder: int) -> list[bytes]:
        status = os.fstat(folder)
        key = (status.st_dev, status.st_ino)
        if key not in self._names:
            names = [os.fsencode(name) for name in os.listdir(folder)]
            ours = [name for name in names if name.startswith((PREFIX, UNKEPT))]
            self._names[key] = [name for name in ours if not self._was_old(folder, name)]
        return self._names[key]

    def _was_old(self, folder: int, name: bytes) -> bool:
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and status.st_mtime < self._clock() - KEPT_FOR:
                return _remove(folder, name)
        return False


def _of(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=8).hexdigest().encode()


def _name(target: bytes, source: bytes) -> bytes:
    return PREFIX + _of(target) + b"-" + source


def _locked(folder: int, name: bytes) -> Part | None:
    """None if it is not there, or not ours. Raises ``BlockingIOError`` if another copy is at it."""
    try:
        descriptor = os.open(name, _OPEN, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EISDIR):
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_ours(os.fstat(descriptor), os.stat(name, dir_fd=folder, follow_symlinks=False)):
            return Part(name, descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # it has its name by now; or there are no locks here, and so no parts
    os.close(descriptor)
    return None


def _is_ours(opened: os.stat_result, named: os.stat_result) -> bool:
    same = (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)
    private = stat.S_ISREG(opened.st_mode) and opened.st_nlink == 1
    return same and private and opened.st_uid == os.geteuid()


def _remove(folder: int, name: bytes) -> bool:
    """Unless somebody is at it."""
    with contextlib.suppress(OSError):
        part = _locked(folder, name)
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
            part.close()
            return True
    return False
