"""The records of a copy (``protocol.treecopy``) as files and folders. Blocking: for a thread, or a process.

The laws: a file has its name when it is whole, and until then whoever had that name keeps it; whatever interrupts
the copy, no part of a file is left. Nothing outside of the destination is touched, also by a hostile sender: each
folder is entered through the one above it, and no symlink that is there, or that was sent, is followed. What cannot
be written is told (``problem``) and left out, and the copy goes on; but not on a full disk.

Modes and times are kept, owners are not, and so neither are set-id bits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO, Final

from protocol.treecopy import Cut, Entry, Hole, Kind, read_entry, read_piece
from protocol.treesend import Problem, Progress

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_MODE: Final = 0o777
_FOLDER_MODE: Final = 0o1777

#: With these nothing else will fit either.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class CannotReceive(Exception):
    """There is nowhere to put anything, or no longer; the message is a clause."""


@dataclass(frozen=True, slots=True)
class _Level:
    """A folder that is being filled; ``descriptor`` is -1 if it could not be made. ``new``: by us, just now."""

    descriptor: int
    mode: int
    path: tuple[bytes, ...]
    new: bool


class Receiver:
    """Puts one copy at ``destination``.

    That is a folder to put things into or, of a ``single`` thing, the name that it gets. Raises ``CannotReceive``,
    ``Cut``, ``DecodeError``.
    """

    def __init__(
        self,
        stream: BinaryIO,
        destination: str,
        problem: Problem,
        progress: Progress = lambda path, size: None,
        *,
        single: bool,
    ) -> None:
        self._stream = stream
        self._problem = problem
        self._progress = progress
        self._shown = destination.rstrip("/")
        self._only_folders = False
        self._rename: bytes | None = None
        self._root = self._open(destination, single)
        self._numbered: dict[int, tuple[bytes, ...]] = {}
        token = os.urandom(6).hex().encode()
        self._temporary = (b".agentctl-cp-%s-%d" % (token, number) for number in count())

    def run(self) -> None:
        """Until the copy is complete."""
        levels = [_Level(self._root, 0, (), new=False)]
        try:
            while (entry := read_entry(self._stream)).kind is not Kind.END:
                self._take(levels, entry)
            if len(levels) > 1:
                raise Cut("the copy ended within a folder")
        finally:
            for level in levels:
                if level.descriptor >= 0:
                    os.close(level.descriptor)

    # --- where to ----------------------------------------------------------------------------------

    def _open(self, destination: str, single: bool) -> int:
        try:
            return os.open(destination or ".", _FOLDER)
        except (FileNotFoundError, NotADirectoryError) as error:
            if not single:
                raise CannotReceive(f"{destination}: {error.strerror}") from None
        except OSError as error:
            raise CannotReceive(f"{destination}: {error.strerror}") from None
        self._only_folders = destination.endswith("/")
        # Who names a symlink means what it leads to; it is not to be replaced by a file.
        place = destination.rstrip("/")
        parent, name = os.path.split(os.path.realpath(place) if os.path.islink(place) else place)
        self._rename = os.fsencode(name)
        self._shown = parent
        try:
            return os.open(parent or ".", _FOLDER)
        except OSError as error:
            raise CannotReceive(f"{parent}: {error.strerror}") from None

    # --- one record --------------------------------------------------------------------------------

    def _take(self, levels: list[_Level], entry: Entry) -> None:
        level = levels[-1]
        if entry.kind is Kind.LEAVE:
            if len(levels) == 1:
                raise Cut("the copy leaves what it never entered")
            self._leave(levels.pop(), entry)
            return
        top = len(levels) == 1
        name = self._rename if top and self._rename is not None else entry.name
        path = level.path if name == b"." else (*level.path, name)
        content = _Content(self._stream, ended=entry.kind is not Kind.FILE)
        below = _Level(-1, 0, path, new=False)
        try:
            if level.descriptor >= 0:
                self._check_name(entry, name, top=top)
                below = self._make(level, entry, path, content) or below
        except _Refused as error:
            self._problem(self._path(path), str(error))
        except OSError as error:
            if error.errno in _FULL:
                raise CannotReceive(f"{self._path(path)}: {error.strerror}") from None
            self._problem(self._path(path), error.strerror or str(error))
        if entry.kind is Kind.ENTER:
            levels.append(below)
        content.pass_over()

    def _check_name(self, entry: Entry, name: bytes, *, top: bool) -> None:
        if top and self._only_folders and entry.kind is not Kind.ENTER:
            raise _Refused(os.strerror(errno.ENOTDIR))
        if name == b"." and not (top and entry.kind is Kind.ENTER):
            raise _Refused("not a name")

    def _make(self, level: _Level, entry: Entry, path: tuple[bytes, ...], content: _Content) -> _Level | None:
        """Of a folder, it. Raises ``OSError``, ``_Refused``."""
        match entry.kind:
            case Kind.ENTER:
                self._progress(self._path(path), 0)
                return self._entered(level, entry, path)
            case Kind.FILE:
                self._receive_file(level, entry, path, content)
            case Kind.SYMLINK:
                with self._staged(level, path[-1]) as temporary:
                    os.symlink(entry.target, temporary, dir_fd=level.descriptor)
                    times = (entry.mtime, entry.mtime)
                    os.utime(temporary, ns=times, dir_fd=level.descriptor, follow_symlinks=False)
            case Kind.HARDLINK:
                self._link(level, entry, path)
        return None

    # --- folders -----------------------------------------------------------------------------------

    def _entered(self, level: _Level, entry: Entry, path: tuple[bytes, ...]) -> _Level:
        name, new = path[-1] if path else b".", False
        with contextlib.suppress(FileExistsError):
            # Nobody else's until it has its mode, which comes last.
            os.mkdir(name, 0o700, dir_fd=level.descriptor)
            new = True
        descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=level.descriptor)
        # "." is the destination, which has a mode of its own already.
        return _Level(descriptor, -1 if name == b"." else entry.mode & _FOLDER_MODE, path, new)

    def _leave(self, level: _Level, entry: Entry) -> None:
        if level.descriptor < 0:
            return
        try:
            if level.mode >= 0:
                os.fchmod(level.descriptor, level.mode)
                os.utime(level.descriptor, ns=(entry.mtime, entry.mtime))
        except OSError as error:
            self._problem(self._path(level.path), error.strerror or str(error))
        finally:
            os.close(level.descriptor)

    # --- files -------------------------------------------------------------------------------------

    def _receive_file(self, level: _Level, entry: Entry, path: tuple[bytes, ...], content: _Content) -> None:
        with contextlib.suppress(_Broken), self._staged(level, path[-1]) as temporary:
            descriptor = os.open(temporary, _NEW, 0o600, dir_fd=level.descriptor)
            try:
                self._write(descriptor, content, self._path(path))
                os.fchmod(descriptor, entry.mode & _FILE_MODE)
                os.utime(descriptor, ns=(entry.mtime, entry.mtime))
            finally:
                os.close(descriptor)
            if entry.number:
                self._numbered[entry.number] = path

    def _write(self, descriptor: int, content: _Content, shown: str) -> None:
        size, ends_with_hole = 0, False
        for piece in content:
            ends_with_hole = isinstance(piece, Hole)
            if isinstance(piece, Hole):
                size += piece.size
                os.lseek(descriptor, size, os.SEEK_SET)
                continue
            size += len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
            self._progress(shown, len(piece))
        if ends_with_hole:
            os.ftruncate(descriptor, size)
        self._progress(shown, 0)

    @contextlib.contextmanager
    def _staged(self, level: _Level, name: bytes) -> Iterator[bytes]:
        """The block makes something of this name in the folder of ``level``; then it is called ``name``, or gone."""
        temporary = next(self._temporary)
        try:
            yield temporary
            if not level.new:
                self._check_replaceable(level, name)
            os.rename(temporary, name, src_dir_fd=level.descriptor, dst_dir_fd=level.descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=level.descriptor)
            raise

    def _check_replaceable(self, level: _Level, name: bytes) -> None:
        """A device that is called so would be lost: /dev/null is not to become a file."""
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(name, dir_fd=level.descriptor, follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
                raise _Refused("what is there is no file, and is not replaced")

    def _link(self, level: _Level, entry: Entry, path: tuple[bytes, ...]) -> None:
        original = self._numbered.get(entry.number)
        if original is None:
            raise _Refused("the file that it is another name of could not be copied")
        with self._folder(original[:-1]) as folder, self._staged(level, path[-1]) as temporary:
            os.link(
                original[-1],
                temporary,
                src_dir_fd=folder,
                dst_dir_fd=level.descriptor,
                follow_symlinks=False,
            )
        # Renaming one name of a file to another does nothing (rename(2)), if a sender says the same twice.
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=level.descriptor)

    @contextlib.contextmanager
    def _folder(self, path: tuple[bytes, ...]) -> Iterator[int]:
        """The folder of an earlier file, walked to again: they may be many, descriptors are few."""
        descriptor = os.dup(self._root)
        try:
            for name in path:
                below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def _path(self, path: tuple[bytes, ...]) -> str:
        return os.path.join(self._shown, *map(os.fsdecode, path)) if path else self._shown


class _Content:
    """The pieces of one file, once. Iterating raises ``_Broken`` after the last if they are not the whole of it."""

    def __init__(self, stream: BinaryIO, *, ended: bool) -> None:
        self._stream = stream
        self._ended = ended

    def __iter__(self) -> Iterator[bytes | Hole]:
        while not isinstance(piece := read_piece(self._stream), bool):
            yield piece
        self._ended = True
        if not piece:
            raise _Broken

    def pass_over(self) -> None:
        """Read what of them nobody wanted, so that the next record is the next to be read."""
        while not self._ended:
            self._ended = isinstance(read_piece(self._stream), bool)


class _Broken(Exception):
    """The sender could not read all of a file, and has told so."""


class _Refused(Exception):
    """It is not done; the message says why."""
