"""A process that writes and reads large blocks below the current directory, and writes down what has returned.

    python3 blocks.py INDEX LOGDIRECTORY

Each block is known by its number; what is read is compared at once. It ends as ``worker.py`` does.
"""

from __future__ import annotations

import mmap
import os
import random
import sys

BLOCK = 1 << 20
PLACES = 6
APPENDED = 200_000
SIZES = (BLOCK, BLOCK, 4 * 128 * 1024, 130_001, 3000, 1000)


def block(index: str, number: int, size: int = BLOCK) -> bytes:
    return random.Random(f"{index} {number}").randbytes(size)


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def place_of(number: int) -> int:
    """Each has blocks of all sizes over each other."""
    return number // 2 % PLACES * BLOCK


def main(index: str, logs: str) -> None:
    log = os.open(os.path.join(logs, index), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    written = os.open(f"written{index}", os.O_RDWR | os.O_CREAT, 0o644)
    appended = os.open("appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    mapped = os.open(f"mapped{index}", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(mapped, BLOCK)
    view = mmap.mmap(mapped, BLOCK)
    model = bytearray()
    number = 0
    while not os.path.exists(os.path.join(logs, "stop")):
        data, place = block(index, number, size_of(number)), place_of(number)
        assert os.pwrite(written, data, place) == len(data)
        model += bytes(max(0, place + len(data) - len(model)))
        model[place : place + len(data)] = data
        os.write(log, b"write %d\n" % number)
        assert os.write(appended, block(index, number, APPENDED)) == APPENDED
        os.write(log, b"append %d\n" % number)
        view[:] = block(index, number)
        view.flush()
        os.write(log, b"map %d\n" % number)
        for descriptor, expected in ((written, model), (mapped, view[:])):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, len(expected), BLOCK):
                assert os.pread(descriptor, BLOCK, start) == expected[start : start + BLOCK], (number, start)
        os.write(log, b"read %d\n" % number)
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
