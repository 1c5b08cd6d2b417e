"""Random operations on one file, each checked against a model of it; after the idea of Apple's fsx.

    python3 fsx.py DIRECTORY [--host DIRECTORY [--fence FILE]] [--operations COUNT] [--seed NUMBER]

``--host`` names the same directory as the other side has it. Then the file is also changed there, in
between, and read back there: what a write, truncate or unmapped store left behind must be on the other
side when the call has returned, or, with ``--fence``, when that says so. A change over there is seen here soon; and once it is, by fstat(2) and
read(2), it is also seen through a mapping that was there before, and stays.

A failure prints the seed and the last operations, and ends with status 1.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import faulthandler
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from fence import wait_landed  # run by path: beside this file

LARGEST = 192 * 1024
"""Bytes of the file: enough for several readahead windows and for writes of many pages."""

PAGE = 4096
WHOLE_EVERY = 100
"""Operations between two comparisons of the whole file."""

KEPT = 60
"""Operations that a failing run prints."""

SOON = 2.0
"""Seconds within which a change on the other side is seen. (It takes some ms; the machine may be busy.)"""

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
LIBC = ctypes.CDLL(None, use_errno=True)


class Mismatch(Exception):
    """The file is not what the model says."""


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def difference(seen: bytes, expected: bytes) -> str:
    if len(seen) != len(expected):
        return f"{len(seen)} bytes instead of {len(expected)}"
    wrong = [index for index in range(len(seen)) if seen[index] != expected[index]]
    at = wrong[0]
    return (
        f"{len(wrong)} bytes differ, in {at}..{wrong[-1]}; at {at}: "
        f"{seen[at : at + 16].hex()} instead of {expected[at : at + 16].hex()}"
    )


class Tester:
    """The file, its model, and every operation on both."""

    def __init__(self, directory: str, host: str | None, fence: str, seed: int, log: int) -> None:
        self.dice = random.Random(seed)
        self.directory, self.host, self.fence = directory, host, fence
        self.name = f"fsx-{seed}"
        self.model = bytearray()
        self.linked = True
        self.count = 0
        self.log = log
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0, ""  # seconds, and the operation
        self.fd = -1
        self.view: mmap.mmap | None = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path())  # what a failing run with this seed left
        self.open(os.O_CREAT | os.O_EXCL)

    # --- where it is -------------------------------------------------------------------------------

    def path(self, suffix: str = "") -> str:
        return os.path.join(self.directory, self.name + suffix)

    def host_path(self, suffix: str = "") -> str:
        """Of the file over there, once all is there that was done here."""
        assert self.host is not None
        wait_landed(self.fence)
        return os.path.join(self.host, self.name + suffix)

    def open(self, flags: int = 0) -> None:
        self.fd = os.open(self.path(), os.O_RDWR | flags, 0o644)

    def close(self) -> None:
        self.drop_view()
        os.close(self.fd)
        self.fd = -1

    def drop_view(self) -> None:
        if self.view is not None:
            self.view.close()
            self.view = None

    def somewhere(self, longest: int = 20_000) -> tuple[int, int]:
        """A range inside of the largest file."""
        offset = self.dice.randrange(LARGEST)
        return offset, self.dice.randrange(1, min(longest, LARGEST - offset) + 1)

    def inside(self, longest: int = 40_000) -> tuple[int, int]:
        """A range inside of the file, which is not empty."""
        offset = self.dice.randrange(len(self.model))
        return offset, self.dice.randrange(1, min(longest, len(self.model) - offset) + 1)

    def bytes(self, size: int) -> bytes:
        return self.dice.randbytes(8) * (size // 8) + self.dice.randbytes(size % 8)

    def note(self, text: str) -> None:
        os.write(self.log, f"{self.count:7} {text}\n".encode())

    # --- the model ---------------------------------------------------------------------------------

    def put(self, offset: int, data: bytes) -> None:
        self.extend(offset)
        self.model[offset : offset + len(data)] = data

    def extend(self, size: int) -> None:
        self.model.extend(bytes(max(0, size - len(self.model))))

    def resize(self, size: int) -> None:
        del self.model[size:]
        self.extend(size)

    def expect(self, what: str, seen: bytes, expected: bytes | bytearray) -> None:
        if seen != expected:
            raise Mismatch(f"{what}: {difference(seen, bytes(expected))}")

    def expect_size(self, what: str, size: int) -> None:
        if size != len(self.model):
            raise Mismatch(f"{what}: the size is {size} instead of {len(self.model)}")

    # --- operations of this side -------------------------------------------------------------------

    def read(self) -> None:
        offset, size = self.somewhere(100_000)
        self.note(f"read {offset} +{size}")
        self.expect("read", os.pread(self.fd, size, offset), self.model[offset : offset + size])

    def write(self) -> None:
        offset, size = self.somewhere()
        self.note(f"write {offset} +{size}")
        data = self.bytes(size)
        if os.pwrite(self.fd, data, offset) != size:
            raise Mismatch("write: a part was not taken")
        self.put(offset, data)
        self.check_there(offset, size)

    def append(self) -> None:
        size = self.dice.randrange(1, 5000)
        if not self.linked or len(self.model) + size > LARGEST:
            return
        self.note(f"append +{size} at {len(self.model)}")
        fd = os.open(self.path(), os.O_WRONLY | os.O_APPEND)
        offset, data = len(self.model), self.bytes(size)
        os.write(fd, data)
        os.close(fd)
        self.put(offset, data)
        self.check_there(offset, size)

    def truncate(self) -> None:
        size = self.dice.randrange(LARGEST)
        by_name = self.linked and self.dice.random() < 0.5
        self.note(f"truncate {len(self.model)} -> {size}{' by name' if by_name else ''}")
        if by_name:
            os.truncate(self.path(), size)
        else:
            os.ftruncate(self.fd, size)
        self.resize(size)
        self.check_there(size, 0)

    def map_read(self) -> None:
        if not self.model:
            return
        offset, size = self.inside()
        self.note(f"map read {offset} +{size}")
        if not self.covered(offset + size):
            self.drop_view()
            self.view = mmap.mmap(self.fd, len(self.model))
        assert self.view is not None
        self.expect("map read", self.view[offset : offset + size], self.model[offset : offset + size])

    def covered(self, end: int) -> bool:
        """Whether the mapping, made when the file had perhaps another size, reaches that far."""
        return self.view is not None and end <= len(self.view)

    def map_write(self) -> None:
        if not self.model:
            return
        offset, size = self.inside()
        kept, synced = self.dice.random() < 0.3, self.dice.random() < 0.5
        self.note(f"map write {offset} +{size}{' kept' if kept else ''}{' synced' if synced else ''}")
        data = self.bytes(size)
        if kept and self.covered(offset + size):
            assert self.view is not None
            self.view[offset : offset + size] = data
            self.view.flush(offset // PAGE * PAGE, size + offset % PAGE)
        else:
            with mmap.mmap(self.fd, len(self.model)) as view:
                view[offset : offset + size] = data
                if synced:
                    view.flush()
        self.put(offset, data)
        self.check_there(offset, size)

    def allocate(self) -> None:
        offset, size = self.somewhere(60_000)
        keep = self.dice.random() < 0.5
        self.note(f"allocate {offset} +{size}{' keeping size' if keep else ''}")
        fallocate(self.fd, KEEP_SIZE if keep else 0, offset, size)
        if not keep:
            self.extend(offset + size)
        self.check_there(offset, size)

    def punch(self) -> None:
        offset, size = self.somewhere(60_000)
        self.note(f"punch {offset} +{size}")
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, size)
        self.zero_model(offset, size)
        self.check_there(offset, size)

    def zero(self) -> None:
        offset, size = self.somewhere(60_000)
        keep = self.dice.random() < 0.5
        self.note(f"zero {offset} +{size}{' keeping size' if keep else ''}")
        try:
            fallocate(self.fd, ZERO_RANGE | (KEEP_SIZE if keep else 0), offset, size)
        except OSError:
            return  # tmpfs has none; what changes nothing is found by the next comparison
        if not keep:
            self.extend(offset + size)
        self.zero_model(offset, size)
        self.check_there(offset, size)

    def zero_model(self, offset: int, size: int) -> None:
        end = min(offset + size, len(self.model))
        if offset < end:
            self.model[offset:end] = bytes(end - offset)

    def copy(self) -> None:
        if len(self.model) < 2:
            return
        offset, size = self.inside()
        target = self.dice.randrange(LARGEST - size)
        if target < offset + size and offset < target + size:
            return  # overlapping: EINVAL
        self.note(f"copy {offset} +{size} to {target}")
        done = 0
        while done < size:
            done += os.copy_file_range(self.fd, self.fd, size - done, offset + done, target + done)
        self.put(target, bytes(self.model[offset : offset + size]))
        self.check_there(target, size)

    def sync(self) -> None:
        data_only = self.dice.random() < 0.5
        self.note("fdatasync" if data_only else "fsync")
        (os.fdatasync if data_only else os.fsync)(self.fd)

    def status(self) -> None:
        self.note("fstat")
        self.expect_size("fstat", os.fstat(self.fd).st_size)
        if self.linked:
            self.expect_size("stat", os.stat(self.path()).st_size)

    def reopen(self) -> None:
        truncating = self.dice.random() < 0.1
        self.note(
            "close, open" + (" truncating" if truncating else "") + ("" if self.linked else " a new file")
        )
        self.close()
        if not self.linked:
            self.linked = True
            self.model.clear()
            self.open(os.O_CREAT | os.O_EXCL)
        elif truncating:
            self.model.clear()
            self.open(os.O_TRUNC)
        else:
            self.open()

    def rename(self) -> None:
        if not self.linked:
            return
        self.note("rename there and back")
        os.rename(self.path(), self.path("-moved"))
        self.expect_size("stat of the new name", os.stat(self.path("-moved")).st_size)
        os.rename(self.path("-moved"), self.path())

    def replace(self) -> None:
        """An editor's save: a new file, renamed over the old one, which stays open for a read."""
        if not self.linked:
            return
        data = self.bytes(self.dice.randrange(LARGEST))
        self.note(f"replace by {len(data)} bytes")
        with open(self.path("-new"), "wb") as new:
            new.write(data)
        os.rename(self.path("-new"), self.path())
        self.expect("the replaced file", os.pread(self.fd, LARGEST, 0), self.model)
        self.close()
        self.model[:] = data
        self.open()
        self.check_there(0, len(data))

    def unlink(self) -> None:
        if not self.linked:
            return
        self.note("unlink, still open")
        os.unlink(self.path())
        self.linked = False

    # --- the other side ----------------------------------------------------------------------------

    def check_there(self, offset: int, size: int) -> None:
        """What this side was told is done is there, now."""
        if self.host is None or not self.linked or self.dice.random() < 0.5:
            return
        with open(self.host_path(), "rb") as file:
            self.expect_size("there", os.fstat(file.fileno()).st_size)
            there = os.pread(file.fileno(), size, offset)
        self.expect("there", there, self.model[offset : offset + size])

    @contextlib.contextmanager
    def changing_there(self) -> Iterator[int]:
        fd = os.open(self.host_path(), os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)

    def write_there(self) -> None:
        if self.host is None or not self.linked:
            return
        offset, size = self.somewhere()
        self.note(f"THERE write {offset} +{size}")
        data = self.bytes(size)
        with self.changing_there() as fd:
            os.pwrite(fd, data, offset)
        self.put(offset, data)
        self.see_there(offset, size)

    def truncate_there(self) -> None:
        if self.host is None or not self.linked:
            return
        size = self.dice.randrange(LARGEST)
        self.note(f"THERE truncate {len(self.model)} -> {size}")
        with self.changing_there() as fd:
            os.ftruncate(fd, size)
        self.resize(size)
        self.see_there(max(0, size - 5000), 10_000)

    def append_there(self) -> None:
        size = self.dice.randrange(1, 3000)
        if self.host is None or not self.linked or len(self.model) + size > LARGEST:
            return
        self.note(f"THERE append +{size} at {len(self.model)}, then here")
        offset, data = len(self.model), self.bytes(size)
        with self.changing_there() as fd:
            os.pwrite(fd, data, offset)
        self.put(offset, data)
        # Nothing was asked in between: this append must find the end where it is now.
        self.append()
        self.see_there(offset, size)

    def replace_there(self) -> None:
        if self.host is None or not self.linked:
            return
        data = self.bytes(self.dice.randrange(1, LARGEST))
        self.note(f"THERE replace by {len(data)} bytes")
        with open(self.host_path("-new"), "wb") as new:
            new.write(data)
        os.rename(self.host_path("-new"), self.host_path())
        self.expect("the file replaced there", os.pread(self.fd, LARGEST, 0), self.model)
        self.close()
        self.model[:] = data
        until = time.monotonic() + SOON
        while os.stat(self.path()).st_ino != os.stat(self.host_path()).st_ino:
            if time.monotonic() > until:
                raise Mismatch("the name still stands for the file that was replaced there")
        self.open()
        self.see_there(0, len(data))

    def see_there(self, offset: int, size: int) -> None:
        """A change there is seen here, and from then on everywhere."""
        end = max(offset, min(offset + size, len(self.model)))
        changed = self.model[offset:end]
        until = time.monotonic() + SOON
        while (seen := os.fstat(self.fd).st_size) != len(self.model) or self.pread(offset, end) != changed:
            if time.monotonic() > until:
                self.expect_size("fstat after a change there", seen)
                self.expect("read after a change there", self.pread(offset, end), changed)
        if self.view is not None and self.covered(end) and self.dice.random() < 0.5:
            self.expect("the mapping after a change there", self.view[offset:end], changed)
        self.expect("read once more after a change there", self.pread(offset, end), changed)
        self.expect_size("fstat once more after a change there", os.fstat(self.fd).st_size)

    def pread(self, start: int, end: int) -> bytes:
        return os.pread(self.fd, end - start, start)

    # --- all of it ---------------------------------------------------------------------------------

    def whole(self) -> None:
        self.expect("the whole file", os.pread(self.fd, 2 * LARGEST, 0), self.model)
        if self.host is not None and self.linked:
            with open(self.host_path(), "rb") as file:
                self.expect("the whole file there", file.read(), self.model)

    def run(self, operations: int) -> None:
        weights: dict[Callable[[], None], int] = {
            self.read: 20, self.write: 16, self.append: 6, self.truncate: 8, self.map_read: 12, self.map_write: 10,
            self.allocate: 3, self.punch: 4, self.zero: 2, self.copy: 3, self.sync: 1, self.status: 4,
            self.reopen: 4, self.rename: 1, self.replace: 1, self.unlink: 1,
            self.write_there: 6, self.truncate_there: 3, self.append_there: 3, self.replace_there: 1,
        }  # fmt: skip
        chosen = self.dice.choices(list(weights), list(weights.values()), k=operations)
        for self.count, operation in enumerate(chosen):
            begun = time.perf_counter()
            operation()
            self.slowest = max(self.slowest, (time.perf_counter() - begun, operation.__name__))
            self.counts[operation.__name__] += 1
            if self.count % WHOLE_EVERY == 0:
                self.whole()
        self.whole()
        self.close()
        if self.linked:
            os.unlink(self.path())


def run(directory: str, host: str | None, fence: str, seed: int, operations: int, log: int) -> int:
    try:
        tester = Tester(directory, host, fence, seed, log)
        tester.run(operations)
    except (Mismatch, OSError) as error:
        print(f"FAILED: {type(error).__name__}: {error}")
        return 1
    slowest = "the slowest {:.3f} s ({})".format(*tester.slowest)
    print(f"ok: {operations} operations, {slowest}, {dict(tester.counts)}")
    return 0


def run_apart(*arguments: Any) -> int:
    """``run`` in a process of its own, which a page that is missing from a mapping may end (SIGBUS)."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.enable()
        status = run(*arguments)
        sys.stdout.flush()
        os._exit(status)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        print(f"FAILED: {signal.Signals(-status).name}")
    return status


def main(arguments: list[str]) -> int:
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    seed = int(options.pop("--seed", str(random.SystemRandom().randrange(1 << 32))))
    operations = int(options.pop("--operations", "20000"))
    host, fence = options.pop("--host", None), options.pop("--fence", "")
    if options:
        print(__doc__, file=sys.stderr)
        return 2
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryFile() as log:
        if run_apart(arguments[0], host, fence, seed, operations, log.fileno()) == 0:
            return 0
        log.seek(0)
        print(b"".join(log.readlines()[-KEPT:]).decode() + f"again with --seed {seed}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
