"""What a row is, and the few calls that Python has no name for.

A row is a function of no arguments. It runs in an empty directory of its own, as the current one, with
umask 022, and returns what it saw, in values JSON can say; an ``OSError`` that leaves it is the outcome
too, as the name of its errno. The law: an outcome holds nothing that differs between two runs on one
filesystem (no inode numbers, no times, no sizes of directories), so that outcomes can be compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = Callable[[], object]

ROWS: dict[str, Row] = {}
"""Every row by its name, in the order in which they run."""

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
NOBODY = 65534


def row(function: Row) -> Row:
    """Register ``function`` under its own name, with spaces."""
    add(function.__name__.replace("_", " "), function)
    return function


def add(name: str, function: Row) -> None:
    if name in ROWS:
        raise ValueError(f"two rows are called {name!r}")
    ROWS[name] = function


def rows(title: str, cases: Iterable[tuple[Any, ...]]) -> Callable[[Callable[..., object]], None]:
    """Register a row for each case: a name, then the arguments."""

    def register(function: Callable[..., object]) -> None:
        for name, *arguments in cases:
            add(f"{title}: {name}", lambda arguments=arguments: function(*arguments))

    return register


def name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, f"errno {error.errno}")


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What ``function`` returns, or the name of its errno."""
    try:
        return function(*arguments, **options)
    except OSError as error:
        return name_of(error)


def checked(result: int) -> int:
    """The result of a C function that returns -1 and sets errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(source: str, target: str, flags: int) -> None:
    checked(LIBC.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags))


def link_descriptor(fd: int, target: str) -> None:
    """Give the file behind ``fd`` a name (open(2), O_TMPFILE)."""
    source = f"/proc/self/fd/{fd}".encode()
    checked(LIBC.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(target), AT_SYMLINK_FOLLOW))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    checked(LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def write_file(path: str | bytes, data: bytes = b"", mode: int = 0o644) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode) as fd:
        assert os.write(fd, data) == len(data)


def read_file(path: str | bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def text(path: str | bytes) -> str:
    return read_file(path).decode("latin-1")


@contextlib.contextmanager
def opened(path: str | bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def in_child(function: Callable[[], object], *, user: int | None = None) -> object:
    """What ``function`` returns or fails with in a process of its own, as ``user`` if one is named."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(receiver)
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            os.write(sender, repr(attempt(function)).encode())
            status = 0
        os._exit(status)
    os.close(sender)
    said = b""
    while data := os.read(receiver, 4096):
        said += data
    os.close(receiver)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return eval(said) if said else f"exit {os.waitstatus_to_exitcode(status)}"


class Helper:
    """A process that runs ``function(step)`` and can be met at its steps: ``step()`` there waits for ``go()``."""

    def __init__(self, function: Callable[[Callable[[], None]], object]) -> None:
        self._said, sender = os.pipe()
        receiver, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._said)
            os.close(self._go)

            def step() -> None:
                os.write(sender, b".")
                if not os.read(receiver, 1):
                    os._exit(0)

            status = 1
            with contextlib.suppress(BaseException):
                function(step)
                status = 0
            os._exit(status)
        os.close(sender)
        os.close(receiver)

    def __enter__(self) -> Helper:
        return self

    def wait(self) -> None:
        """Until it is at its next step, or over."""
        os.read(self._said, 1)

    def go(self) -> None:
        os.write(self._go, b".")

    def end(self, *, kill: bool = False) -> int:
        """Let it run to its end; returns its exit status."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._go)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def __exit__(self, *exception: object) -> None:
        if self.pid:
            self.end(kill=True)
        os.close(self._said)
