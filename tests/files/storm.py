"""A process that changes files and looks at them, at random, and writes down all that it did and saw, with the times.

    python3 -B storm.py CONFIGURATION

``CONFIGURATION`` is a ``Configuration`` as JSON. Several run at once, on the host and beside the mount; ``coherence`` judges
afterwards. A *slot* is a name, ``DIRECTORY/NUMBER``, which is a file, a symlink, a directory with a file ``id``, or
nothing. Whoever changes one holds a lock on it, in a file that is nobody's share, and writes down what came of it by a look
at the *host's* files. A change is one system call, so that nothing is between two states but what a write(2) passes through.

All content tells its version: every 16 bytes of a file are its number, of which there is never another.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import random
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

RECORD = 16
SENTINEL = "sentinel"
AGREED_WITHIN = 10.0
"""Seconds for a guest to see what nobody changes any more, before it changes it itself."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Configuration:
    """``top``: where it works; ``truth``: the same files on the host; ``locks``: a file to lock in. ``number`` is its own,
    ``pause`` the mean seconds between two acts, ``changing`` the part of them that change something, ``sentinels`` whether it
    writes those. ``fence``: what tells when that is on the host (``fence.wait_landed``)."""

    top: str
    truth: str
    locks: str
    log: str
    number: int
    seed: int
    seconds: float
    directories: int
    slots: int
    pause: float
    changing: float
    looking: bool
    sentinels: bool = False
    fence: str = ""


# --- looking -----------------------------------------------------------------------------------------

KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
BY_ERRNO = {errno.EISDIR: "directory", errno.ELOOP: "symlink"}


def attributes(path: str) -> dict[str, Any]:
    """What stat(2) tells; ``what`` it is, or an errno's name."""
    try:
        status = os.lstat(path)
    except OSError as error:
        return {"what": errno.errorcode[error.errno or 0]}
    fields = {
        "what": KINDS[stat.S_IFMT(status.st_mode)],
        "ino": status.st_ino,
        "mode": status.st_mode,
        "nlink": status.st_nlink,
        "mtime": status.st_mtime_ns,
        "ctime": status.st_ctime_ns,
    }
    if not stat.S_ISDIR(status.st_mode):
        fields["size"] = status.st_size
    return fields


def content(path: str) -> dict[str, Any]:
    """The versions in it, each once, and its ``length``; what it is instead, if no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return {"what": BY_ERRNO.get(error.errno or 0) or errno.errorcode[error.errno or 0]}
    try:
        data = os.read(descriptor, 1 << 20)
    except OSError as error:
        return {"what": BY_ERRNO.get(error.errno or 0) or errno.errorcode[error.errno or 0]}
    finally:
        os.close(descriptor)
    records = {data[start : start + RECORD] for start in range(0, len(data), RECORD)}
    return {
        "what": "file",
        "length": len(data),
        "version": sorted(int(record) for record in records if record.strip(b"\0")),
    }


def target(path: str) -> dict[str, Any]:
    try:
        return {"what": "symlink", "target": os.readlink(path)}
    except OSError as error:
        if error.errno == errno.EINVAL:
            return {}
        return {"what": errno.errorcode[error.errno or 0]}


def inner(path: str) -> dict[str, Any]:
    """The version of the file in a directory; an errno's name if there is none."""
    found = content(os.path.join(path, "id"))
    if found["what"] != "file":
        return {"inner": "none" if found["what"] in ("ENOENT", "ENOTDIR") else found["what"]}
    return {"inner": found["version"][0] if found["version"] else "empty"}


def truth(path: str) -> dict[str, Any]:
    """All of it; at one moment only if nobody changes it meanwhile, and whoever looks knows."""
    state = {**attributes(path), **inner(path)}
    if state["what"] == "file":
        state["version"] = content(path).get("version", [])
    elif state["what"] == "symlink":
        state |= target(path)
    return state


# --- changing ----------------------------------------------------------------------------------------


def exchange(one: str, other: str) -> None:
    """renameat2(2) with RENAME_EXCHANGE."""
    if _libc.renameat2(-100, one.encode(), -100, other.encode(), 2) != 0:
        raise OSError(ctypes.get_errno(), "renameat2", one)


def pwrite(path: str, data: bytes, offset: int = 0, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flags)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


class Actor:
    """One process of the storm."""

    def __init__(self, configuration: Configuration) -> None:
        self._own = configuration
        self._random = random.Random(configuration.seed)
        self._locks = os.open(configuration.locks, os.O_RDWR)
        self._count = 0
        self._log: list[list[Any]] = []
        self._kept: list[int] = []
        from fence import wait_landed  # beside this file, which is run by path

        self._wait_landed = wait_landed

    def run(self) -> None:
        end = time.monotonic() + self._own.seconds
        next_sentinel = 0.0
        while (now := time.monotonic()) < end:
            if self._own.sentinels and now > next_sentinel:
                next_sentinel = now + 0.02
                self.write_sentinel(self._random.randrange(self._own.directories))
            if self._random.random() < self._own.changing:
                self.change_something()
            elif self._own.looking:
                self.look_at_something()
            time.sleep(self._random.expovariate(1 / self._own.pause))
        with open(self._own.log, "w") as file:
            json.dump(self._log, file)

    # --- what there is -----------------------------------------------------------------------------

    def _version(self) -> int:
        self._count += 1
        return self._own.number * 10**9 + int(self._own.seed % 1000) * 10**6 + self._count

    def _data(self, version: int, records: int = 0) -> bytes:
        return b"%016d" % version * (records or self._random.choice((1, 3, 100, 257, 600)))

    def _slot(self) -> str:
        return f"{self._random.randrange(self._own.directories)}/{self._random.randrange(self._own.slots)}"

    def _guest(self, slot: str) -> str:
        return os.path.join(self._own.top, slot)

    def _host(self, slot: str) -> str:
        return os.path.join(self._own.truth, slot)

    @contextlib.contextmanager
    def _locked(self, *slots: str) -> Iterator[bool]:
        """Whether nobody else has one of them."""
        taken = []
        try:
            for slot in slots:
                directory, _, number = slot.partition("/")
                index = int(directory) * (self._own.slots + 1) + (
                    self._own.slots if number == SENTINEL else int(number)
                )
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
                taken.append(index)
            yield True
        except BlockingIOError:
            yield False
        finally:
            for index in taken:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, index)

    # --- looking -----------------------------------------------------------------------------------

    def look_at_something(self) -> None:
        slot = self._slot()
        directory = slot.partition("/")[0]
        looks: list[tuple[float, str, Callable[[str], dict[str, Any]]]] = [
            (4, slot, attributes),
            (3, slot, content),
            (0.5, slot, target),
            (1, slot, inner),
            (1, directory, attributes),
            (1, f"{directory}/{SENTINEL}", content),
            (1, directory, self._listing),
        ]
        [(_, name, look)] = self._random.choices(looks, [weight for weight, _, _ in looks])
        begin = time.monotonic_ns()
        fields = look(self._guest(name))
        self._log.append(["looked", name, begin, time.monotonic_ns(), fields])
        if self._random.random() < 0.02:
            self._keep_open(slot)

    @staticmethod
    def _listing(path: str) -> dict[str, Any]:
        return {"names": os.listdir(path)}

    def _keep_open(self, slot: str) -> None:
        with contextlib.suppress(OSError):
            self._kept.append(os.open(self._guest(slot), os.O_RDONLY | os.O_NOFOLLOW))
        if len(self._kept) > 8:
            os.close(self._kept.pop(0))

    # --- changing ----------------------------------------------------------------------------------

    def write_sentinel(self, directory: int) -> None:
        slot = f"{directory}/{SENTINEL}"
        with self._locked(slot):
            self._change([slot], lambda: pwrite(self._guest(slot), b"%016d" % self._version()))

    def change_something(self) -> None:
        slot, other = self._slot(), self._slot()
        with self._locked(slot) as ours:
            if not ours or not self._agrees(slot):
                return
            acts = self._acts(slot)
            if slot != other and self._random.random() < 0.3:
                with self._locked(other) as both:
                    if both and self._agrees(other):
                        acts = self._acts_on_two(slot, other) or acts
                        self._random.choice(acts)()
                        return
            self._random.choice(acts)()

    def _agrees(self, slot: str) -> bool:
        """Wait until we see what the slot is, which nobody changes now: what is done to it shall be done to that."""
        if self._own.top == self._own.truth:
            return True
        end = time.monotonic() + AGREED_WITHIN
        while (seen := truth(self._guest(slot))) != (real := truth(self._host(slot))):
            if time.monotonic() > end:
                self._log.append(
                    ["wrong", slot, f"it is {real}, and {AGREED_WITHIN:g} s later seen as {seen}"]
                )
                return False
            time.sleep(0.001)
        return True

    def _change(self, slots: list[str], act: Callable[[], object]) -> None:
        """One system call, and what came of it."""
        begin = time.monotonic_ns()
        try:
            act()
        except OSError as error:
            self._log.append(
                ["wrong", slots[0], f"{error!r} {slots} {[truth(self._host(slot)) for slot in slots]}"]
            )
        self._wait_landed(self._own.fence)
        end = time.monotonic_ns()
        for slot in slots:
            self._log.append(["changed", slot, begin, end, truth(self._host(slot))])
        for directory in {slot.partition("/")[0] for slot in slots}:
            self._log.append(["changed", directory, begin, end, attributes(self._host(directory))])

    def _acts(self, slot: str) -> list[Callable[[], None]]:
        path = self._guest(slot)
        what = attributes(self._host(slot))["what"]

        def one(act: Callable[..., object], *arguments: Any) -> Callable[[], None]:
            return lambda: self._change([slot], lambda: act(*arguments))

        def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
            def act() -> None:
                first()
                second()

            return act

        version = self._version()
        if what == "ENOENT":
            return [
                both(one(self._make, path), one(pwrite, path, self._data(version))),
                both(
                    one(os.mkdir, path),
                    both(one(self._make, f"{path}/id"), one(pwrite, f"{path}/id", self._data(version, 1))),
                ),
                one(os.symlink, f"to-{version}", path),
                self._replaced(slot, version),
            ]
        if what == "directory":
            update = one(pwrite, f"{path}/id", self._data(version, 1))
            return [update, update, both(one(os.unlink, f"{path}/id"), one(os.rmdir, path))]
        if what == "symlink":
            return [
                one(os.unlink, path),
                self._replaced(slot, version),
                self._replaced_by_link(slot, version),
            ]
        size = RECORD * self._random.randrange(700)
        when = self._random.randrange(10**18, 17 * 10**17)
        return [
            one(pwrite, path, self._data(version)),
            one(pwrite, path, self._data(version), 0, os.O_APPEND),
            one(os.truncate, path, size),
            one(os.chmod, path, 0o600 | self._random.randrange(0o77)),
            lambda: self._change([slot], lambda: os.utime(path, ns=(when, when))),
            one(os.unlink, path),
            self._replaced(slot, version),
            self._replaced_by_link(slot, version),
        ]

    def _acts_on_two(self, slot: str, other: str) -> list[Callable[[], None]]:
        one, two = self._guest(slot), self._guest(other)
        ours, theirs = (attributes(self._host(name))["what"] for name in (slot, other))
        acts: list[Callable[[], None]] = []
        if ours != "ENOENT" and (theirs == "ENOENT" or "directory" not in (ours, theirs)):
            acts.append(lambda: self._change([slot, other], lambda: os.rename(one, two)))
        if "ENOENT" not in (ours, theirs):
            acts.append(lambda: self._change([slot, other], lambda: exchange(one, two)))
        return acts

    @staticmethod
    def _make(path: str) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))

    def _draft(self, slot: str) -> str:
        """A name for what replaces another: beside it, or, on the host, outside of the share."""
        outside = self._own.top == self._own.truth and self._random.random() < 0.5
        where = os.path.dirname(self._own.locks) if outside else os.path.dirname(self._guest(slot))
        return os.path.join(where, f"draft{self._own.number}")

    def _replaced(self, slot: str, version: int) -> Callable[[], None]:
        def act() -> None:
            draft = self._draft(slot)
            self._make(draft)
            pwrite(draft, self._data(version))
            self._change([slot], lambda: os.rename(draft, self._guest(slot)))

        return act

    def _replaced_by_link(self, slot: str, version: int) -> Callable[[], None]:
        def act() -> None:
            draft = self._draft(slot)
            os.symlink(f"to-{version}", draft)
            self._change([slot], lambda: os.rename(draft, self._guest(slot)))

        return act


def main() -> None:
    Actor(Configuration(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
