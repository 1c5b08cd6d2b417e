"""Showing the end of a log file, and what is written to it from then on.

The law: what is in a log, a guest may have put there. A terminal is never sent anything but text; a pipe or
a file gets the log byte for byte.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from host_agent.errors import ExitCode, UserError
from host_agent.plain_text import PlainText as PlainText

#: How often a followed file is looked at, seconds: quick enough to feel live, too rare to be felt.
POLL_INTERVAL = 0.2

_Write = Callable[[bytes], object]


def show(path: Path, lines: int, *, follow: bool) -> None:
    """Write the last ``lines`` of ``path`` to stdout, and go on for ever with ``follow``.

    A file that is replaced (a new boot starts a new console log) is followed on in its successor.
    Raises ``UserError`` if there is no such file yet.
    """
    try:
        file: BinaryIO = path.open("rb")
    except FileNotFoundError:
        raise UserError(
            f"there is no {path.name} yet",
            "the instance has not been started: agentctl up",
            ExitCode.NOT_RUNNING,
        ) from None
    write = _writer()
    try:
        # Read to the end exactly once: what is written meanwhile is either shown here or followed below.
        for line in deque(file, maxlen=lines):
            write(line)
        sys.stdout.buffer.flush()
        while follow:
            successor = successor_of(file, path)
            _copy(file, write)
            if successor is not None:
                file.close()
                file = successor
                continue
            time.sleep(POLL_INTERVAL)
    finally:
        file.close()


def _writer() -> _Write:
    """What writes a piece of a log to stdout."""
    output = sys.stdout.buffer
    if not sys.stdout.isatty():
        return output.write
    plain = PlainText()
    # In the terminal's own encoding: UTF-8 has bytes that are control characters to a terminal of Latin-1.
    encoding = sys.stdout.encoding
    return lambda data: output.write(plain.receive_data(data).encode(encoding, "backslashreplace"))


def _copy(file: BinaryIO, write: _Write) -> None:
    while data := file.read(65536):
        write(data)
        sys.stdout.buffer.flush()


def successor_of(file: BinaryIO, path: Path) -> BinaryIO | None:
    """The file that took the place of ``file``, or the same one if it was cut to begin again."""
    try:
        new = path.open("rb")
    except FileNotFoundError:
        return None
    now = os.fstat(new.fileno())
    if os.path.samestat(now, os.fstat(file.fileno())) and now.st_size >= file.tell():
        new.close()
        return None
    return new
