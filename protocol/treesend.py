"""Files and folders as the records of a copy (``protocol.treecopy``). Blocking: for a thread, or a process.

The law: what is sent is what was named, whatever somebody renames meanwhile: below that no symlink is followed, and
each folder is read through its descriptor. What cannot be read is told (``problem``) and left out, and the copy goes
on.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import BinaryIO, Final

from protocol import treecopy
from protocol.errors import DecodeError
from protocol.treecopy import MAX_PIECE, Entry, Kind, encode
from protocol.treegauge import Gauge
from protocol.treeparts import is_part
from protocol.treeresume import (
    ASK_FROM,
    PART_FROM,
    digest,
    encode_start,
    folder_identity,
    identity,
    read_answer,
)
from protocol.treesurvey import Survey

#: Is told the path and a reason.
Problem = Callable[[str, str], None]
#: Files that were looked at before the first of them is sent, while answers are on their way. Each is open, and of a
#: user's 1,024 descriptors. With files of 16 KiB that is 3 MiB for each round trip.
FILES_AHEAD: Final = 200
#: Things of any kind that wait for that.
AHEAD: Final = 2000

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
    name: bytes
    shown: str
    mtime: int


def top_name(path: str) -> bytes:
    """What ``path`` is called where it arrives; ``.`` of one that is called nothing, whose content is meant."""
    name = os.path.basename(path.rstrip("/"))
    return os.fsencode(name) if name not in ("", ".", "..") else b"."


@dataclass(slots=True)
class _Opened:
    """A file that is going to be sent. ``question`` is 0 if nobody was asked what is there of it."""

    descriptor: int
    status: os.stat_result
    head: Entry
    shown: str
    place: bytes
    question: int = 0
    proved: int = 0
    start: int | None = None


class Sender:
    """Writes one copy to ``stream``. Raises what writing to it raises, and ``Cut`` if nobody answers any more.

    ``answers``: from the receiver, who is asked what is there already; without it all is sent. ``survey`` says how much
    there is to send, and may be told so late that nobody hears it.
    """

    def __init__(
        self,
        stream: BinaryIO,
        problem: Problem,
        gauge: Gauge | None = None,
        *,
        answers: BinaryIO | None = None,
        survey: Survey | None = None,
    ) -> None:
        self._stream = stream
        self._problem = problem
        self._gauge = gauge or Gauge()
        self._answers = answers
        self._survey = survey
        self._numbers: dict[tuple[int, int], int] = {}
        self._questions = count(1)
        self._open: dict[int, _Opened] = {}
        self._ahead: deque[Entry | _Opened] = deque()
        self._files_ahead = 0

    def send(self, path: str) -> None:
        """A file, a symlink, or a folder with all that is below it."""
        walk = self._walk(path)
        try:
            for found in walk:
                self._ahead.append(found)
                if isinstance(found, _Opened):
                    self._files_ahead += 1
                    self._ask(found)
                while self._ahead and self._looked_far_enough():
                    self._send_next()
            while self._ahead:
                self._send_next()
        finally:
            walk.close()
            for found in self._ahead:
                if isinstance(found, _Opened):
                    os.close(found.descriptor)
            self._ahead.clear()

    def _looked_far_enough(self) -> bool:
        return not self._open or self._files_ahead >= FILES_AHEAD or len(self._ahead) >= AHEAD

    def finish(self) -> None:
        """Nothing else comes."""
        self._write(Entry(Kind.END))
        self._stream.flush()

    def _write(self, entry: Entry) -> None:
        self._stream.write(encode(entry))

    # --- what there is ---------------------------------------------------------------------------------

    def _walk(self, path: str) -> Generator[Entry | _Opened, None, None]:
        """All of it, in its order. Who takes an ``_Opened`` closes it."""
        folders: list[_Folder] = []
        try:
            yield from self._look(folders, path, top_name(path), path)
            while folders:
                folder = folders[-1]
                name = next(folder.names, None)
                if name is None:
                    os.close(folders.pop().descriptor)
                    yield Entry(Kind.LEAVE, mtime=folder.mtime)
                else:
                    yield from self._look(
                        folders, name, os.fsencode(name), f"{folder.shown}/{name}", folder.descriptor
                    )
        finally:
            for folder in folders:
                os.close(folder.descriptor)

    def _look(
        self, folders: list[_Folder], path: str, name: bytes, shown: str, below: int | None = None
    ) -> Iterator[Entry | _Opened]:
        """At ``path``, which is relative to the folder ``below``."""
        found: Entry | _Opened
        try:
            status = os.stat(path, dir_fd=below, follow_symlinks=False)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                folder, found = _entered(path, name, shown, below)
                if not folders:
                    found = replace(found, target=folder_identity(path))
                folders.append(folder)
            elif kind == stat.S_IFREG:
                found = self._opened(folders, path, name, shown, below)
            elif kind == stat.S_IFLNK:
                target = os.fsencode(os.readlink(path, dir_fd=below))
                found = Entry(Kind.SYMLINK, name, mtime=status.st_mtime_ns, target=target)
            else:
                return self._problem(shown, _NOT_COPIED.get(kind, "of a kind that cannot be copied"))
        except _Unreadable as error:
            return self._problem(shown, str(error))
        except OSError as error:
            return self._problem(shown, error.strerror or str(error))
        yield found

    def _opened(
        self, folders: list[_Folder], path: str, name: bytes, shown: str, below: int | None
    ) -> Entry | _Opened:
        # Not to be held up if it has just been replaced by a pipe.
        descriptor = os.open(path, _READ | os.O_NONBLOCK, dir_fd=below)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _Unreadable("it was replaced while it was looked at")
            number = self._numbers.get((status.st_dev, status.st_ino), 0) if status.st_nlink > 1 else 0
            if number:
                os.close(descriptor)
                return Entry(Kind.HARDLINK, name, number=number)
            if status.st_nlink > 1:
                number = len(self._numbers) + 1
                self._numbers[status.st_dev, status.st_ino] = number
        except BaseException:
            os.close(descriptor)
            raise
        head = Entry(Kind.FILE, name, stat.S_IMODE(status.st_mode), status.st_mtime_ns, number)
        place = b"/".join([*(folder.name for folder in folders), name])
        return _Opened(descriptor, status, head, shown, place)

    # --- what the receiver has of it -------------------------------------------------------------------

    def _ask(self, file: _Opened) -> None:
        if self._answers is None or file.status.st_size < ASK_FROM or len(file.place) > treecopy.MAX_TARGET:
            return
        file.question = next(self._questions)
        self._open[file.question] = file
        source = identity(file.shown, file.status)
        size, mtime = file.status.st_size, file.status.st_mtime_ns
        self._write(Entry(Kind.ASK, source, file.question, mtime, size, file.place))

    def _settle(self, file: _Opened) -> None:
        """Hear until it is clear where ``file`` begins. Raises ``Cut``, ``DecodeError``."""
        assert self._answers is not None, "nobody was asked"
        self._stream.flush()
        while file.start is None:
            answer = read_answer(self._answers)
            about = self._open.get(answer.question)
            if about is None or about.start is not None or answer.size > about.status.st_size:
                raise DecodeError(f"an answer that nobody asked for: {answer}")
            if answer.size and not about.proved:
                self._prove(about, answer.size)
            elif answer.size not in (0, about.proved):
                raise DecodeError(f"more is believed than was proved: {answer}")
            else:
                about.start = answer.size
        del self._open[file.question]

    def _prove(self, file: _Opened, size: int) -> None:
        self._gauge.path = file.shown
        try:
            proof = digest(file.descriptor, size, self._gauge)
        except OSError:
            proof = b"-"  # the rest of it cannot be had either, which is told in its turn
        file.proved = size
        self._write(Entry(Kind.PROVE, proof, file.question))
        self._stream.flush()

    # --- on its way ------------------------------------------------------------------------------------

    def _send_next(self) -> None:
        """What is next, and was looked at."""
        found = self._ahead.popleft()
        if self._survey is not None and (total := self._survey.take()) is not None:
            self._gauge.total = total
            self._write(Entry(Kind.TOTAL, number=total))
        if isinstance(found, Entry):
            self._write(found)
            return
        self._files_ahead -= 1
        try:
            self._send_file(found)
        except _Unreadable as error:
            self._problem(found.shown, str(error))
        finally:
            os.close(found.descriptor)

    def _send_file(self, file: _Opened) -> None:
        """As much as it had when it was opened; of one that says it has nothing, as files of /proc do, all."""
        start, head = 0, file.head
        if file.question:
            self._settle(file)
            start = file.start or 0
            head = replace(head, target=encode_start(file.question, start))
        self._gauge.at(file.shown)
        self._gauge.had(start)
        stays = bool(file.question) and file.status.st_size >= PART_FROM
        self._gauge.part = start if stays else 0
        self._write(head)
        try:
            for piece in _pieces(file.descriptor, file.status, start):
                if isinstance(piece, treecopy.Hole):
                    self._stream.write(treecopy.hole(piece.size))
                    self._gauge.had(piece.size)
                    continue
                self._stream.write(treecopy.piece_head(len(piece)))
                self._stream.write(piece)
                self._gauge.moved(len(piece), stays=stays)
        except _Unreadable:
            self._stream.write(treecopy.BROKEN)
            raise
        self._stream.write(treecopy.WHOLE)


def _entered(path: str, name: bytes, shown: str, below: int | None) -> tuple[_Folder, Entry]:
    descriptor = os.open(path, _READ | os.O_DIRECTORY, dir_fd=below)
    try:
        status = os.fstat(descriptor)
        # What another copy has left there is no part of what is copied.
        names = sorted(entry for entry in os.listdir(descriptor) if not is_part(os.fsencode(entry)))
    except BaseException:
        os.close(descriptor)
        raise
    folder = _Folder(descriptor, iter(names), name, shown.rstrip("/"), status.st_mtime_ns)
    return folder, Entry(Kind.ENTER, name, mode=stat.S_IMODE(status.st_mode))


class _Unreadable(Exception):
    """A file, or the rest of it, cannot be read; the message says why."""


def _pieces(descriptor: int, status: os.stat_result, start: int) -> Iterator[bytes | treecopy.Hole]:
    """What comes after the first ``start`` bytes. Raises ``_Unreadable``."""
    if start and start >= status.st_size:
        return
    try:
        if status.st_blocks * 512 < status.st_size:
            yield from _extents(descriptor, start, status.st_size)
        else:
            if status.st_size:
                os.lseek(descriptor, start, os.SEEK_SET)
            yield from _read(descriptor, status.st_size - start or None)
    except OSError as error:
        raise _Unreadable(error.strerror or str(error)) from None


def _read(descriptor: int, limit: int | None) -> Iterator[bytes]:
    while data := os.read(descriptor, MAX_PIECE if limit is None else min(MAX_PIECE, limit)):
        yield data
        if limit is not None:
            limit -= len(data)
            if not limit:
                return


def _extents(descriptor: int, at: int, size: int) -> Iterator[bytes | treecopy.Hole]:
    """Of a sparse file, or of one whose filesystem compresses it (then there is one extent), from ``at`` on."""
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
