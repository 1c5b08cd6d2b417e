"""What both sides of a copy say about what is there already, so that a copy which was cut off goes on where it was.

Before a file that is not small the sender asks (``Kind.ASK``) what the receiver has of it: nothing, the beginning,
which an earlier copy has left, or the whole. If there is something, the sender says what the digest of so many bytes
of its own is (``Kind.PROVE``), the receiver takes the digest of its own, and answers how many bytes it believes in:
all of them, or none. The laws: no byte is left out because of a name, a size or a time, but because both sides have
read it; and the receiver never says what is in a file, so that a hostile sender learns nothing from asking.

Questions run ahead of the content, so that many files wait for one round trip and not each for its own. Answers go the
other way: ``u32 question | u64 bytes``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

from protocol.errors import DecodeError
from protocol.treecopy import Cut
from protocol.treegauge import Gauge

#: Bytes from which a file is asked for: what is smaller is sent sooner than it is compared.
ASK_FROM: Final = 16 * 1024
#: Bytes from which what came of a file outlives a copy that was cut off.
PART_FROM: Final = 1024 * 1024

_ANSWER: Final = struct.Struct(">IQ")
_START: Final = re.compile(rb"(\d{1,10}) (\d{1,19})")
_AT: Final = struct.Struct(">Q")
_BLOCK: Final = 256 * 1024
_ZEROS: Final = bytes(_BLOCK)


@dataclass(frozen=True, slots=True)
class Answer:
    """``size`` bytes of what ``question`` was about are here."""

    question: int
    size: int


def encode_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(answer.question, answer.size)


def read_answer(stream: BinaryIO) -> Answer:
    """The next one. Raises ``Cut`` if nobody answers any more."""
    data = stream.read(_ANSWER.size)
    if len(data) < _ANSWER.size:
        raise Cut("the copy was cut off")
    return Answer(*_ANSWER.unpack(data))


def encode_start(question: int, offset: int) -> bytes:
    """What a FILE says that was asked for: by which ``question``, and where its content begins."""
    return b"%d %d" % (question, offset)


def decode_start(target: bytes) -> tuple[int, int]:
    """Raises ``DecodeError``."""
    match = _START.fullmatch(target)
    if match is None:
        raise DecodeError(f"a file that begins {target[:20]!r}")
    return int(match[1]), int(match[2])


def identity(path: str, status: os.stat_result) -> bytes:
    """What a source is taken for the same by, in letters that a file's name may have."""
    text = f"{status.st_size} {status.st_mtime_ns} {os.path.abspath(path)}"
    return hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest().encode()


def folder_identity(path: str) -> bytes:
    """The same of a folder, whose size and time say little."""
    return hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=8).hexdigest().encode()


def digest(descriptor: int, size: int, gauge: Gauge) -> bytes:
    """Of the first ``size`` bytes. Zeros count as if they were not there, so that holes are never read.

    Raises ``OSError``, also for a file that is shorter.
    """
    if os.fstat(descriptor).st_size < size:
        raise OSError(errno.EIO, "it is shorter than it was")
    found = hashlib.blake2b(_AT.pack(size), digest_size=32)
    at = 0
    while at < size:
        data_at = _next_data(descriptor, at, size)
        start = data_at - data_at % _BLOCK
        want = min(_BLOCK, size - start)
        if data_at < size:
            block = os.pread(descriptor, want, start)
            if block != _ZEROS[: len(block)]:
                found.update(_AT.pack(start))
                found.update(block)
        gauge.compared(start + want - at)
        at = start + want
    return found.hexdigest().encode()


def _next_data(descriptor: int, at: int, size: int) -> int:
    try:
        return min(os.lseek(descriptor, at, os.SEEK_DATA), size)
    except OSError as error:
        return size if error.errno == errno.ENXIO else at  # there are only zeros; or nobody knows
