"""The kernel's side: mfusepy, as it is but for what it drops on the way. Imported by the process of the view alone.

mfusepy's wrappers for libfuse 3 leave out the flags of a rename, the handle of a file whose attributes are changed, and
the two words of utimensat(2) that are no times. Without the flags a rename overwrites what it was told not to; without
the handle a file that was removed cannot be reached. So these five are ours.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import mfusepy

from host_agent.view.attributes import Attributes
from host_agent.view.files import NOW, OMIT, Files
from host_agent.view.unmounting import SUBTYPE
from protocol.files import MAX_DATA

_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_NOBODY: Final = (1 << 32) - 1
_FIRST_TIME, _LAST_TIME = -(1 << 63), (1 << 64) - 1
"""ns since the epoch, 1677 to 2554: what a message can say. Filesystems end earlier, and take their last for what is
later, too."""


class FuseError(Exception):
    """libfuse has not mounted it; what it has to say is on stderr."""


def _path(path: str | None) -> bytes:
    return b"" if path is None else os.fsencode(path)


def _fields(attributes: Attributes) -> dict[str, int]:
    return {
        "st_ino": attributes.ino,
        "st_mode": attributes.mode,
        "st_nlink": attributes.nlink,
        "st_uid": attributes.uid,
        "st_gid": attributes.gid,
        "st_rdev": attributes.rdev,
        "st_size": attributes.size,
        "st_blksize": attributes.blksize,
        "st_blocks": attributes.blocks,
        "st_atime": attributes.atime,
        "st_mtime": attributes.mtime,
        "st_ctime": attributes.ctime,
    }


class Operations:
    """``Files``, by the names and types that mfusepy calls them. With ``raw_fi``: a handle is in ``fi.fh``."""

    use_ns = True

    def __init__(self, files: Files, mounted: Callable[[], None], begins: Callable[[], None]) -> None:
        self._files = files
        self._mounted = mounted
        self.begins = begins

    def init_with_config(self, connection: Any, config: Any) -> None:
        # A file that is removed while it is open goes on by its handle, but for fstat(2), which the kernel asks without
        # one. Its other name (.fuse_hidden) would be worse: the directory cannot be removed then, and a rename over an
        # open file becomes two, between which the guest's programs find none.
        config.hard_remove = config.nullpath_ok = 1
        config.use_ino = 1
        # What one message takes; a kernel with a larger fs.fuse.max_pages_limit would send more.
        connection.max_write = min(connection.max_write, MAX_DATA)
        self._mounted()

    def destroy(self, path: str) -> None:
        """Nothing is kept here."""

    # --- attributes ----------------------------------------------------------------------------------

    def getattr(self, path: str | None, fi: Any = None) -> dict[str, int]:
        return _fields(self._files.getattr(_path(path), None if fi is None else fi.fh))

    def chmod(self, path: str | None, mode: int, fi: Any = None) -> None:
        self._files.chmod(_path(path), mode, None if fi is None else fi.fh)

    def chown(self, path: str | None, uid: int, gid: int, fi: Any = None) -> None:
        self._files.chown(_path(path), uid, gid, None if fi is None else fi.fh)

    def truncate(self, path: str | None, length: int, fi: Any = None) -> None:
        self._files.truncate(_path(path), length, None if fi is None else fi.fh)

    def utimens(self, path: str | None, times: tuple[int, int], fi: Any = None) -> None:
        self._files.utimens(_path(path), *times, None if fi is None else fi.fh)

    def access(self, path: str, mode: int) -> None:
        self._files.access(_path(path), mode)

    def statfs(self, path: str) -> dict[str, int]:
        size = self._files.statfs(_path(path))
        return {
            "f_bsize": size.bsize,
            "f_frsize": size.frsize,
            "f_blocks": size.blocks,
            "f_bfree": size.bfree,
            "f_bavail": size.bavail,
            "f_files": size.files,
            "f_ffree": size.ffree,
            "f_favail": size.ffree,
            "f_namemax": size.namelen,
        }

    # --- names ---------------------------------------------------------------------------------------

    def readlink(self, path: str) -> str:
        return os.fsdecode(self._files.readlink(_path(path)))

    def mknod(self, path: str, mode: int, dev: int) -> None:
        self._files.mknod(_path(path), mode)

    def mkdir(self, path: str, mode: int) -> None:
        self._files.mkdir(_path(path), mode)

    def unlink(self, path: str) -> None:
        self._files.unlink(_path(path))

    def rmdir(self, path: str) -> None:
        self._files.rmdir(_path(path))

    def symlink(self, path: str, target: str) -> None:
        self._files.symlink(_path(path), os.fsencode(target))

    def link(self, path: str, existing: str) -> None:
        self._files.link(_path(existing), _path(path))

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        self._files.rename(_path(old), _path(new), flags)

    def opendir(self, path: str) -> int:
        return self._files.directories.opendir(_path(path))

    def releasedir(self, path: str | None, handle: int) -> None:
        self._files.directories.releasedir(handle)

    def readdir_with_offset(
        self, path: str | None, offset: int, handle: int
    ) -> Iterator[tuple[str, dict[str, int] | None, int]]:
        for name, attributes, behind in self._files.directories.readdir(handle, offset):
            yield os.fsdecode(name), None if attributes is None else _fields(attributes), behind

    def fsyncdir(self, path: str | None, datasync: int, handle: int) -> None:
        self._files.directories.fsyncdir(handle)

    # --- data ----------------------------------------------------------------------------------------

    def open(self, path: str, fi: Any) -> int:
        fi.fh = self._files.data.open(_path(path), fi.flags)
        return 0

    def create(self, path: str, mode: int, fi: Any) -> int:
        fi.fh = self._files.data.create(_path(path), mode, fi.flags)
        return 0

    def read(self, path: str | None, size: int, offset: int, fi: Any) -> bytes:
        return self._files.data.read(fi.fh, size, offset)

    def write(self, path: str | None, data: bytes, offset: int, fi: Any) -> int:
        return self._files.data.write(fi.fh, data, offset, append=bool(fi.flags & os.O_APPEND))

    def release(self, path: str | None, fi: Any) -> None:
        self._files.data.release(fi.fh)

    def fsync(self, path: str | None, datasync: int, fi: Any) -> None:
        self._files.data.fsync(fi.fh, data_only=bool(datasync))

    def fallocate(self, path: str | None, mode: int, offset: int, size: int, fi: Any) -> None:
        self._files.data.fallocate(fi.fh, mode, offset, size)

    # --- extended attributes -------------------------------------------------------------------------

    def getxattr(self, path: str, name: str, *position: int) -> bytes:
        return self._files.getxattr(_path(path), os.fsencode(name))

    def listxattr(self, path: str) -> list[str]:
        return [os.fsdecode(name) for name in self._files.listxattr(_path(path))]

    def setxattr(self, path: str, name: str, value: bytes, flags: int, *position: int) -> None:
        self._files.setxattr(_path(path), os.fsencode(name), value, flags)

    def removexattr(self, path: str, name: str) -> None:
        self._files.removexattr(_path(path), os.fsencode(name))


def _handle(fip: Any) -> Any:
    return fip.contents if fip else None


def _decoded(path: bytes | None) -> str | None:
    return None if path is None else os.fsdecode(path)


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """With what is dropped otherwise."""

    def _wrapper(self, func: Callable[..., Any], *args: Any) -> Any:
        self.operations.begins()
        return super()._wrapper(func, *args)

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> None:
        self.operations.rename(os.fsdecode(old), os.fsdecode(new), flags)

    def chmod_fuse_3(self, path: bytes | None, mode: int, fip: Any) -> None:
        self.operations.chmod(_decoded(path), mode, _handle(fip))

    def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, fip: Any) -> None:
        ids = [-1 if each == _NOBODY else each for each in (uid, gid)]
        self.operations.chown(_decoded(path), *ids, _handle(fip))

    def truncate_fuse_3(self, path: bytes | None, length: int, fip: Any) -> None:
        self.operations.truncate(_decoded(path), length, _handle(fip))

    def utimens_fuse_3(self, path: bytes | None, buffer: Any, fip: Any) -> None:
        times = (NOW, NOW)
        if buffer:
            times = (_time(buffer.contents.actime), _time(buffer.contents.modtime))
        self.operations.utimens(_decoded(path), times, _handle(fip))


def _time(time: Any) -> int:
    """ns since the epoch; times before that that would mean something else are the epoch."""
    if time.tv_nsec == _UTIME_NOW:
        return NOW
    if time.tv_nsec == _UTIME_OMIT:
        return OMIT
    nanoseconds: int = time.tv_sec * 10**9 + time.tv_nsec
    return 0 if nanoseconds in (NOW, OMIT) else min(max(nanoseconds, _FIRST_TIME), _LAST_TIME)


def serve(
    files: Files, path: str, source: str, mounted: Callable[[], None], begins: Callable[[], None]
) -> None:
    """Mount and serve until somebody unmounts, or a SIGTERM comes to this thread. Raises ``FuseError``.

    ``mounted`` is called once the kernel asks, ``begins`` before each operation.
    """
    if mfusepy.fuse_version_major != 3:
        raise FuseError(f"libfuse {mfusepy.fuse_version_major} was found, and libfuse 3 is needed")
    try:
        # One thread: what Python does in several takes turns anyway. The kernel keeps names and attributes for 1 s.
        _Fuse(
            Operations(files, mounted, begins),
            path,
            raw_fi=True,
            foreground=True,
            nothreads=True,
            fsname=source,
            subtype=SUBTYPE,
            nosuid=True,
            nodev=True,
        )
    except RuntimeError as error:
        raise FuseError(os.strerror(errno.EIO) if not error.args else f"libfuse ended with {error}") from None
