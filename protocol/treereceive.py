"""The records of a copy (``protocol.treecopy``) as files and folders. Blocking: for a thread, or a process.

The laws: a file has its name when it is whole, and until then whoever had that name keeps it. Whatever interrupts the
copy, no part of a file is left; but of a large one, which the sender asked for (``treeresume``), what came is kept
for the next attempt (``treeparts``), unless the disk is full or the file cannot be had. Nothing outside of the
destination is touched, also by a hostile sender: each folder is entered through the one above it, and no symlink that
is there, or that was sent, is followed. What cannot be written is told (``problem``) and left out, and the copy goes
on; but not on a full disk.

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

from protocol.errors import DecodeError
from protocol.treeanswers import Answers, Asked
from protocol.treecopy import Cut, Entry, Hole, Kind, read_entry, read_piece, split_path
from protocol.treegauge import Gauge
from protocol.treeparts import UNKEPT, Part, Parts, folder_mark
from protocol.treeresume import PART_FROM, decode_start
from protocol.treesend import Problem

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MARK: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_MODE: Final = 0o777
_FOLDER_MODE: Final = 0o1777

#: With these nothing else will fit either.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class CannotReceive(Exception):
    """There is nowhere to put anything, or no longer; the message is a clause."""


@dataclass(frozen=True, slots=True)
class _Level:
    """A folder that is being filled; ``descriptor`` is -1 if it could not be made. ``new``: by us, just now.

    ``mark`` is in it until it is complete.
    """

    descriptor: int
    mode: int
    path: tuple[bytes, ...]
    new: bool
    mark: bytes = b""


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
        gauge: Gauge | None = None,
        *,
        single: bool,
        answers: BinaryIO | None = None,
        parts: Parts | None = None,
    ) -> None:
        """``answers``: where the sender, who asks, hears what is there already."""
        self._stream = stream
        self._problem = problem
        self._gauge = gauge or Gauge()
        self._single = single
        self._parts = parts or Parts()
        self._goes_on = False
        self._shown = destination.rstrip("/")
        self._only_folders = False
        self._rename: bytes | None = None
        self._root = self._open(destination, single)
        self._numbered: dict[int, tuple[bytes, ...]] = {}
        token = os.urandom(6).hex().encode()
        self._temporary = (UNKEPT + b"%s-%d" % (token, number) for number in count())
        self._asked = Answers(answers, self._folder, self._parts, self._gauge)

    def run(self) -> None:
        """Until the copy is complete."""
        levels = [_Level(self._root, 0, (), new=False)]
        try:
            while (entry := read_entry(self._stream)).kind is not Kind.END:
                match entry.kind:
                    case Kind.ASK:
                        first, *rest = split_path(entry.target)
                        self._asked.ask(entry, (*self._place(first, folder=bool(rest)), *rest))
                    case Kind.PROVE:
                        self._asked.prove(entry)
                    case Kind.TOTAL:
                        self._gauge.total = entry.number
                    case _:
                        self._take(levels, entry)
            if len(levels) > 1:
                raise Cut("the copy ended within a folder")
        finally:
            self._asked.close()
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

    def _place(self, name: bytes, *, folder: bool) -> tuple[bytes, ...]:
        """Where that goes which comes as ``name``, and not in a folder. () is the destination itself."""
        if self._rename is not None:
            return (self._rename,)
        if name == b"." or (folder and self._goes_on):
            return ()
        return (name,)

    def _is_marked(self, entry: Entry) -> bool:
        """The destination was not there when the copy of this began, which was cut off: it goes on there."""
        if not self._single or entry.name == b".":
            return False
        with contextlib.suppress(OSError):
            mark = folder_mark(entry.name, entry.target)
            status = os.stat(mark, dir_fd=self._root, follow_symlinks=False)
            return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        return False

    # --- one record --------------------------------------------------------------------------------

    def _take(self, levels: list[_Level], entry: Entry) -> None:
        level = levels[-1]
        if entry.kind is Kind.LEAVE:
            if len(levels) == 1:
                raise Cut("the copy leaves what it never entered")
            self._leave(levels.pop(), entry)
            return
        top = len(levels) == 1
        path = (*level.path, entry.name)
        if top:
            # Before anything is asked of what is in it.
            self._goes_on = entry.kind is Kind.ENTER and self._is_marked(entry)
            path = self._place(entry.name, folder=entry.kind is Kind.ENTER)
        content = _Content(self._stream, ended=entry.kind is not Kind.FILE)
        below = _Level(-1, 0, path, new=False)
        try:
            if level.descriptor >= 0:
                self._check_name(entry, path, top=top)
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
        if entry.kind is Kind.FILE and entry.target:
            self._asked.forget(decode_start(entry.target)[0])

    def _check_name(self, entry: Entry, path: tuple[bytes, ...], *, top: bool) -> None:
        if top and self._only_folders and entry.kind is not Kind.ENTER:
            raise _Refused(os.strerror(errno.ENOTDIR))
        if path[-1:] in ((), (b".",)) and not (top and entry.kind is Kind.ENTER):
            raise _Refused("not a name")

    def _make(self, level: _Level, entry: Entry, path: tuple[bytes, ...], content: _Content) -> _Level | None:
        """Of a folder, it. Raises ``OSError``, ``_Refused``."""
        match entry.kind:
            case Kind.ENTER:
                self._gauge.path = self._path(path)
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
        if entry.name == b".":  # the destination, which has a mode of its own if it was there
            return _Level(descriptor, -1, path, new)
        mark = b""
        if not path or (new and path == (self._rename,)):
            mark = folder_mark(entry.name, entry.target)
            try:
                os.close(os.open(mark, _MARK, 0o600, dir_fd=descriptor))
            except BaseException:
                os.close(descriptor)
                raise
        return _Level(descriptor, entry.mode & _FOLDER_MODE, path, new, mark)

    def _leave(self, level: _Level, entry: Entry) -> None:
        if level.descriptor < 0:
            return
        try:
            if level.mark:
                os.unlink(level.mark, dir_fd=level.descriptor)
            if level.mode >= 0:
                os.fchmod(level.descriptor, level.mode)
                os.utime(level.descriptor, ns=(entry.mtime, entry.mtime))
        except OSError as error:
            self._problem(self._path(level.path), error.strerror or str(error))
        finally:
            os.close(level.descriptor)

    # --- files -------------------------------------------------------------------------------------

    def _receive_file(self, level: _Level, entry: Entry, path: tuple[bytes, ...], content: _Content) -> None:
        self._gauge.at(self._path(path))
        asked, offset = self._taken(entry)
        part = asked.part if asked else None
        try:
            if asked is not None and asked.whole and offset:
                self._keep(level, entry, path[-1], content)
            else:
                if asked is not None and part is None and asked.size >= PART_FROM:
                    part = self._parts.make(level.descriptor, path[-1], asked.source)
                if part is None:
                    self._receive_whole(level, entry, path[-1], content)
                else:
                    self._receive_rest(level, entry, path[-1], content, part, offset)
        except _Broken:
            return
        finally:
            if part is not None:
                part.close()
        if entry.number:
            self._numbered[entry.number] = path

    def _taken(self, entry: Entry) -> tuple[Asked | None, int]:
        """What was asked for this file, and where its content begins. Raises ``DecodeError``."""
        if not entry.target:
            return None, 0
        question, offset = decode_start(entry.target)
        return self._asked.take(question, offset), offset

    def _receive_whole(self, level: _Level, entry: Entry, name: bytes, content: _Content) -> None:
        with self._staged(level, name) as temporary:
            descriptor = os.open(temporary, _NEW, 0o600, dir_fd=level.descriptor)
            try:
                self._write(descriptor, content, 0, stays=False)
                _finish(descriptor, entry)
            finally:
                os.close(descriptor)

    def _receive_rest(
        self, level: _Level, entry: Entry, name: bytes, content: _Content, part: Part, offset: int
    ) -> None:
        """All that comes after ``offset``. What there is of it stays if the copy is cut off, and only then."""
        try:
            os.ftruncate(part.descriptor, offset)
            self._gauge.had(offset)
            self._gauge.part = offset
            self._write(part.descriptor, content, offset, stays=True)
            _finish(part.descriptor, entry)
            self._rename_to(level, part.name, name)
        except BaseException as error:
            if isinstance(error, OSError | _Refused | _Broken) or not part.size:
                with contextlib.suppress(OSError):
                    os.unlink(part.name, dir_fd=level.descriptor)
            raise

    def _keep(self, level: _Level, entry: Entry, name: bytes, content: _Content) -> None:
        """It is there already, as both sides have read."""
        for _ in content:
            raise DecodeError("more of a file that is whole")
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=level.descriptor)
        try:
            self._gauge.had(os.fstat(descriptor).st_size)
            _finish(descriptor, entry)
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, content: _Content, size: int, *, stays: bool) -> None:
        """All that comes, behind the ``size`` bytes that are there."""
        os.lseek(descriptor, size, os.SEEK_SET)
        ends_with_hole = False
        for piece in content:
            ends_with_hole = isinstance(piece, Hole)
            if isinstance(piece, Hole):
                size += piece.size
                os.lseek(descriptor, size, os.SEEK_SET)
                self._gauge.had(piece.size)
                continue
            size += len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
            self._gauge.moved(len(piece), stays=stays)
        if ends_with_hole:
            os.ftruncate(descriptor, size)

    @contextlib.contextmanager
    def _staged(self, level: _Level, name: bytes) -> Iterator[bytes]:
        """The block makes something of this name in the folder of ``level``; then it is called ``name``, or gone."""
        temporary = next(self._temporary)
        try:
            yield temporary
            self._rename_to(level, temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=level.descriptor)
            raise

    def _rename_to(self, level: _Level, temporary: bytes, name: bytes) -> None:
        if not level.new:
            self._check_replaceable(level, name)
        os.rename(temporary, name, src_dir_fd=level.descriptor, dst_dir_fd=level.descriptor)

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


def _finish(descriptor: int, entry: Entry) -> None:
    """Raises ``OSError``."""
    os.fchmod(descriptor, entry.mode & _FILE_MODE)
    os.utime(descriptor, ns=(entry.mtime, entry.mtime))


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
