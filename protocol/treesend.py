"""Files and folders as the records of a copy (``protocol.treecopy``). Blocking: for a thread, or a process.

The law: what is sent is what was named, whatever somebody renames meanwhile: below that no symlink is followed, and
each folder is read through its descriptor. What cannot be read is told (``problem``) and left out, and the copy goes
on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from protocol import treecopy
from protocol.treecopy import MAX_PIECE, Entry, Kind, encode

#: Is told the path and a reason.
Problem = Callable[[str, str], None]
#: Is told the path, and the bytes that came since.
Progress = Callable[[str, int], None]

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_COPIED: Final = {
    stat.S_IFSOCK: "a socket, which cannot be copied",
    stat.S_IFIFO: "a pipe, which cannot be copied",
    stat.S_IFBLK: "a device, which cannot be copied",
    stat.S_IFCHR: "a device, which cannot be copied",
}


@dataclass(frozen=True, slots=True)
class _Folder:
    """One that is being read: what of it is still to come."""

    descriptor: int
    names: Iterator[str]
    shown: str
    mtime: int


def top_name(path: str) -> bytes:
    """What ``path`` is called where it arrives; ``.`` of one that is called nothing, whose content is meant."""
    name = os.path.basename(path.rstrip("/"))
    return os.fsencode(name) if name not in ("", ".", "..") else b"."


class Sender:
    """Writes one copy to ``stream``. Raises what writing to it raises."""

    def __init__(
        self, stream: BinaryIO, problem: Problem, progress: Progress = lambda path, size: None
    ) -> None:
        self._stream = stream
        self._problem = problem
        self._progress = progress
        self._numbers: dict[tuple[int, int], int] = {}

    def send(self, path: str) -> None:
        """A file, a symlink, or a folder with all that is below it."""
        folders: list[_Folder] = []
        try:
            self._send_one(folders, path, top_name(path), path)
            while folders:
                folder = folders[-1]
                name = next(folder.names, None)
                if name is not None:
                    self._send_one(
                        folders, name, os.fsencode(name), f"{folder.shown}/{name}", folder.descriptor
                    )
                    continue
                self._write(Entry(Kind.LEAVE, mtime=folder.mtime))
                os.close(folders.pop().descriptor)
        finally:
            for folder in folders:
                os.close(folder.descriptor)

    def finish(self) -> None:
        """Nothing else comes."""
        self._write(Entry(Kind.END))
        self._stream.flush()

    def _write(self, entry: Entry) -> None:
        self._stream.write(encode(entry))

    def _send_one(
        self, folders: list[_Folder], path: str, name: bytes, shown: str, below: int | None = None
    ) -> None:
        """``path`` is relative to the folder ``below``."""
        try:
            status = os.stat(path, dir_fd=below, follow_symlinks=False)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                folders.append(self._entered(path, name, shown, below))
            elif kind == stat.S_IFREG:
                self._send_file(path, name, shown, below)
            elif kind == stat.S_IFLNK:
                target = os.fsencode(os.readlink(path, dir_fd=below))
                self._write(Entry(Kind.SYMLINK, name, mtime=status.st_mtime_ns, target=target))
            else:
                self._problem(shown, _NOT_COPIED.get(kind, "of a kind that cannot be copied"))
        except _Unreadable as error:
            self._problem(shown, str(error))
        except OSError as error:
            if error.errno in _OF_THE_STREAM:
                raise
            self._problem(shown, error.strerror or str(error))

    def _entered(self, path: str, name: bytes, shown: str, below: int | None) -> _Folder:
        descriptor = os.open(path, _READ | os.O_DIRECTORY, dir_fd=below)
        try:
            status = os.fstat(descriptor)
            names = sorted(os.listdir(descriptor))
            self._write(Entry(Kind.ENTER, name, mode=stat.S_IMODE(status.st_mode)))
        except BaseException:
            os.close(descriptor)
            raise
        self._progress(shown, 0)
        return _Folder(descriptor, iter(names), shown.rstrip("/"), status.st_mtime_ns)

    def _send_file(self, path: str, name: bytes, shown: str, below: int | None) -> None:
        # Not to be held up if it has just been replaced by a pipe.
        descriptor = os.open(path, _READ | os.O_NONBLOCK, dir_fd=below)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _Unreadable("it was replaced while it was looked at")
            number = self._numbers.get((status.st_dev, status.st_ino), 0) if status.st_nlink > 1 else 0
            if number:
                self._write(Entry(Kind.HARDLINK, name, number=number))
                return
            if status.st_nlink > 1:
                number = len(self._numbers) + 1
                self._numbers[status.st_dev, status.st_ino] = number
            self._write(Entry(Kind.FILE, name, stat.S_IMODE(status.st_mode), status.st_mtime_ns, number))
            self._send_content(descriptor, status, shown)
        finally:
            os.close(descriptor)

    def _send_content(self, descriptor: int, status: os.stat_result, shown: str) -> None:
        """As much as it had when it was opened; of one that says it has nothing, as files of /proc do, all."""
        try:
            for piece in _pieces(descriptor, status):
                if isinstance(piece, treecopy.Hole):
                    self._stream.write(treecopy.hole(piece.size))
                    continue
                self._stream.write(treecopy.piece_head(len(piece)))
                self._stream.write(piece)
                self._progress(shown, len(piece))
        except _Unreadable:
            self._stream.write(treecopy.BROKEN)
            raise
        self._stream.write(treecopy.WHOLE)
        self._progress(shown, 0)


class _Unreadable(Exception):
    """A file, or the rest of it, cannot be read; the message says why."""


#: Errors of writing to a pipe; reading a file gives none of them.
_OF_THE_STREAM: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN})


def _pieces(descriptor: int, status: os.stat_result) -> Iterator[bytes | treecopy.Hole]:
    """Raises ``_Unreadable``."""
    try:
        if status.st_blocks * 512 < status.st_size:
            yield from _extents(descriptor, status.st_size)
        else:
            yield from _read(descriptor, status.st_size or None)
    except OSError as error:
        raise _Unreadable(error.strerror or str(error)) from None


def _read(descriptor: int, limit: int | None) -> Iterator[bytes]:
    while data := os.read(descriptor, MAX_PIECE if limit is None else min(MAX_PIECE, limit)):
        yield data
        if limit is not None:
            limit -= len(data)
            if not limit:
                return


def _extents(descriptor: int, size: int) -> Iterator[bytes | treecopy.Hole]:
    """Of a sparse file, or of one whose filesystem compresses it (then there is one extent)."""
    at = 0
    while at < size:
        start = size
        with contextlib.suppress(OSError):  # ENXIO: there are only zeros
            start = min(os.lseek(descriptor, at, os.SEEK_DATA), size)
        if start > at:
            yield treecopy.Hole(start - at)
        if start < size:
            at = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
            os.lseek(descriptor, start, os.SEEK_SET)
            yield from _read(descriptor, at - start)
        else:
            at = size
