"""The shared folder itself: found by its path, watched, and adopted again when it was replaced."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from fileserver import linux
from fileserver.core import Core
from fileserver.prompt import Disk
from protocol.files import ROOT


class Stage(StrEnum):
    SERVING = "serving"
    MISSING = "missing"
    DENIED = "denied"
    NOT_A_DIRECTORY = "not-a-directory"


_STAGES: Final = {
    errno.ENOENT: Stage.MISSING,
    errno.ENOTDIR: Stage.NOT_A_DIRECTORY,
    errno.EACCES: Stage.DENIED,
    errno.EPERM: Stage.DENIED,
}

FREE_AGAIN: Final = 16 << 20
"""Bytes that must be free before a disk that was full is called anything else."""

QUOTA_REMEMBERED: Final = 60.0
"""Seconds for which a refused quota counts: nobody can be asked whether there is room again."""


class Root:
    """Keeps node 1 the directory at the path, which is absolute. No symlink in it is followed, not even at first: a
    share may lie in another one, where guests put symlinks to where they like.

    A root that was moved away is missing, even though it could still be reached: what its path means is what is
    shared. Files in it that are held go on working.
    """

    def __init__(self, path: bytes, core: Core, open_root: Callable[[], int] | None = None) -> None:
        """``open_root`` returns an O_PATH descriptor of what has no path; ``path`` is its name then."""
        self._open_root = open_root or self._walk
        self._path = path
        self._core = core
        self._adopted: tuple[int, int, int] | None = None
        self.stage = Stage.MISSING
        self.reason = ""
        self.disk: Disk | None = None
        """What the folder is on; another object whenever that may be something else."""

    def check(self) -> bool:
        """Look again; True if anything is different now."""
        before = (self.stage, self.reason)
        self._core.reach.devices.forget()
        try:
            replaced = self._adopt()
        except OSError as error:
            replaced = False
            self._adopted = self.disk = None
            self._core.reach.lose_root(error.errno or errno.EIO)
            self._describe(_STAGES.get(error.errno or 0, Stage.MISSING), error)
        return replaced or before != (self.stage, self.reason)

    def _adopt(self) -> bool:
        descriptor = self._core.reach.opening(self._open_root)
        try:
            status = linux.fstatx(descriptor)
            if not stat.S_ISDIR(status.mode):
                raise linux.failure(errno.ENOTDIR)
            self._seal(status, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        replaced = self._core.reach.set_root(descriptor, status)
        with self._core.reach.use(ROOT) as root:
            usable = os.access(linux.magic_link(root.descriptor), os.R_OK | os.X_OK, effective_ids=True)
        if usable:
            self.stage, self.reason = Stage.SERVING, ""
        else:
            self._describe(Stage.DENIED, linux.failure(errno.EACCES))
        return replaced

    def _seal(self, status: linux.Status, descriptor: int) -> None:
        """Before the first guest gets to see what is below it: with another root, what is to be hidden is another."""
        identity = (status.device, status.ino, status.birth_ns())
        if identity != self._adopted:
            self._core.seal()
            self._adopted, self.disk = identity, None
        if self.disk is None:
            self.disk = Disk(status.device, linux.filesystem_type(descriptor))

    def _walk(self) -> int:
        """An O_PATH descriptor of what is at the path; ENOTDIR where a symlink is on the way."""
        descriptor = os.open(b"/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in self._path.split(b"/"):
            if name:
                directory = descriptor
                try:
                    descriptor = linux.open_entry(directory, name)
                finally:
                    os.close(directory)
        return descriptor

    def _describe(self, stage: Stage, error: OSError) -> None:
        path = os.fsdecode(self._path)
        self.stage = stage
        self.reason = {
            Stage.MISSING: f"{path} does not exist",
            Stage.NOT_A_DIRECTORY: f"{path} is not a directory",
            Stage.DENIED: f"{path} may not be read",
        }[stage]
        if error.errno not in _STAGES:
            self.reason = f"{path}: {error.strerror}"


class Fullness:
    """Whether the disk (or a quota) has refused data, and has no room since."""

    def __init__(self) -> None:
        self.full = False
        self._refused = 0.0

    def refused(self, now: float) -> None:
        self._refused = now
        self.full = True

    def check(self, core: Core, now: float) -> None:
        """Once a second; asks the filesystem only while it counts as full."""
        if not self.full:
            return
        try:
            with core.reach.use(ROOT) as root:
                size = os.fstatvfs(root.descriptor)
        except OSError:
            return
        room = size.f_bavail * size.f_frsize >= FREE_AGAIN and (size.f_favail > 0 or size.f_files == 0)
        # With room on the disk, what refused was a quota.
        self.full = not room or now - self._refused < QUOTA_REMEMBERED
