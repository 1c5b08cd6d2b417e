"""Packed bytes from one process to another that reads all of them in order, as a copy's records are.

One way, so nobody greets and nothing is acknowledged: both are told to begin with, it is zstd, and it is packed
whatever the way is, since that takes in more than SSH carries. The law: what a reader gets is what was written, or
``DecodeError``.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from protocol.compression import codecs
from protocol.errors import DecodeError, RemoteProtocolError
from protocol.packing import Packing

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

CODEC: Final = "zstd"

BUFFER: Final = 64 * 1024
"""Bytes that are packed at a time, as most pieces of a copy are."""


def is_there() -> bool:
    """Whether this machine can read and write such."""
    return CODEC in codecs()


def writer(descriptor: int, *, closefd: bool = True) -> BinaryIO:
    """A file that packs what is written to it, when it is flushed at the latest."""
    return cast(BinaryIO, io.BufferedWriter(_Writer(descriptor, closefd), BUFFER))


def reader(descriptor: int, *, closefd: bool = True) -> BinaryIO:
    """A file that has what was written to ``writer``. Reading raises ``DecodeError`` for anything else."""
    return cast(BinaryIO, io.BufferedReader(_Reader(descriptor, closefd), BUFFER))


class _Writer(io.RawIOBase):
    def __init__(self, descriptor: int, closefd: bool) -> None:
        self._file = open(descriptor, "wb", 0, closefd=closefd)  # noqa: SIM115
        self._packing = Packing.one_way(CODEC)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        given = bytes(data)
        with memoryview(self._packing.encode(given)) as view:
            sent = 0
            while sent < len(view):
                sent += self._file.write(view[sent:]) or 0
        return len(given)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Reader(io.RawIOBase):
    def __init__(self, descriptor: int, closefd: bool) -> None:
        self._file = open(descriptor, "rb", 0, closefd=closefd)  # noqa: SIM115
        self._packing = Packing.one_way(CODEC)
        self._here = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._here:
            if not (data := self._file.read(BUFFER)):
                return 0
            try:
                self._here = memoryview(self._packing.receive(data))
            except RemoteProtocolError as error:
                raise DecodeError(str(error)) from error
        with memoryview(buffer).cast("B") as room:
            size = min(len(room), len(self._here))
            room[:size] = self._here[:size]
        self._here = self._here[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
