"""The receiver's answers to what a sender asks: how much of a file is here already (``treeresume``).

The law: nothing is believed that has not been read, by both sides; and who asks hears of no file outside of the
destination, nor what is in any.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Final

from protocol.errors import DecodeError
from protocol.treecopy import Cut, Entry
from protocol.treegauge import Gauge
from protocol.treeparts import Part, Parts
from protocol.treeresume import PART_FROM, Answer, digest, encode_answer

#: Questions that wait for their file at the most; each may hold a descriptor.
MAX_QUESTIONS: Final = 256

#: A folder of the destination by its path, as long as it is used.
OpenFolder = Callable[[tuple[bytes, ...]], AbstractContextManager[int]]


@dataclass(slots=True)
class Asked:
    """A file that is going to come: ``size`` bytes of ``source``. ``there`` is how many of them are here, as it seems.

    They are in ``part``, or else the ``whole`` file is.
    """

    path: tuple[bytes, ...]
    size: int
    source: bytes
    there: int = 0
    part: Part | None = None
    whole: bool = False
    believed: int = 0


class Answers:
    """What was asked and has not come yet. ``stream`` is None if nobody hears."""

    def __init__(self, stream: BinaryIO | None, folder: OpenFolder, parts: Parts, gauge: Gauge) -> None:
        self._stream = stream
        self._folder = folder
        self._parts = parts
        self._gauge = gauge
        self._asked: dict[int, Asked] = {}

    def ask(self, entry: Entry, path: tuple[bytes, ...]) -> None:
        """Raises ``DecodeError``, ``Cut``."""
        if self._stream is None or len(self._asked) >= MAX_QUESTIONS or entry.mode in self._asked or not path:
            raise DecodeError("a question that nobody expects")
        asked = self._asked[entry.mode] = Asked(path, entry.number, entry.name)
        with contextlib.suppress(OSError), self._folder(path[:-1]) as folder:
            if _is_like(folder, path[-1], entry):
                asked.there, asked.whole = asked.size, True
            elif asked.size >= PART_FROM:
                asked.part = self._parts.find(folder, path[-1], asked.source)
        if asked.part is not None:
            asked.there = min(asked.part.size, asked.size)
        self._say(Answer(entry.mode, asked.there))

    def prove(self, entry: Entry) -> None:
        """Raises ``DecodeError``, ``Cut``."""
        asked = self._asked.get(entry.mode)
        if asked is None or asked.believed:
            raise DecodeError("a proof of what nobody said")
        with contextlib.suppress(OSError):
            if self._digest(asked) == entry.name:
                asked.believed = asked.there
        self._say(Answer(entry.mode, asked.believed))

    def take(self, question: int, offset: int) -> Asked:
        """What was asked; its file comes now, without the first ``offset`` bytes. Raises ``DecodeError``."""
        asked = self._asked.get(question)
        if asked is None or offset not in (0, asked.believed):
            raise DecodeError(f"a file from byte {offset} on, which is not here")
        return self._asked.pop(question)

    def forget(self, question: int) -> None:
        """Its file came, and had no place."""
        asked = self._asked.pop(question, None)
        if asked is not None and asked.part is not None:
            asked.part.close()

    def close(self) -> None:
        """Whatever was asked does not come."""
        for question in list(self._asked):
            self.forget(question)

    def _digest(self, asked: Asked) -> bytes:
        """Of what is here. Raises ``OSError``."""
        if asked.part is not None:
            return digest(asked.part.descriptor, asked.there, self._gauge)
        with self._folder(asked.path[:-1]) as folder:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(asked.path[-1], flags, dir_fd=folder)
        try:
            return digest(descriptor, asked.there, self._gauge)
        finally:
            os.close(descriptor)

    def _say(self, answer: Answer) -> None:
        assert self._stream is not None, "nobody may ask"
        try:
            self._stream.write(encode_answer(answer))
            self._stream.flush()
        except BrokenPipeError:
            raise Cut("the copy was cut off") from None


def _is_like(folder: int, name: bytes, entry: Entry) -> bool:
    """Whether it may be the same, and may stay: a file of ours that has no other name."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    looks = (status.st_size, status.st_mtime_ns) == (entry.number, entry.mtime)
    ours = status.st_uid == os.geteuid() and status.st_nlink == 1
    return looks and ours and stat.S_ISREG(status.st_mode)
