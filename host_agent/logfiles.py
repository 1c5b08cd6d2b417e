"""Showing the end of a log file, and what is written to it from then on.

The law: what is in a log, a guest may have put there. A terminal is never sent anything but text; a pipe or
a file gets the log byte for byte.
"""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import BinaryIO

from host_agent.errors import ExitCode, UserError

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
            successor = _successor(file, path)
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


def _successor(file: BinaryIO, path: Path) -> BinaryIO | None:
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


class _State(Enum):
    """Where in a control sequence the next character is."""

    TEXT = auto()
    ESCAPE = auto()  # after ESC
    SEQUENCE = auto()  # after CSI: parameters until a letter
    STRING = auto()  # after OSC, DCS and the like: a title or worse, until ST or BEL


# ECMA-48, 5.3 (C1) and 8.3: what begins a sequence, as ESC and a letter and as one character.
_CSI, _CSI_C1 = "[", "\x9b"
_STRINGS, _STRINGS_C1 = "]PX^_", "\x9d\x90\x98\x9e\x9f"
_STRING_ENDS = "\x07\x9c"


class PlainText:
    """Sans-IO: a log's bytes in, its text out; any split of the bytes gives the same text.

    Control sequences go without a trace, since a boot is full of colours, and so do other control characters
    but newlines and tabs. What else is not printable, such as a bidirectional override, is shown as its
    escape. A newline ends every sequence: one that is left open hides the rest of its line and no more.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._state = _State.TEXT

    def receive_data(self, data: bytes) -> str:
        """The text that ``data`` adds."""
        return "".join(map(self._character, self._decoder.decode(data)))

    def _character(self, character: str) -> str:
        if character == "\n":
            self._state = _State.TEXT
            return character
        if character == "\x1b":
            self._state = _State.ESCAPE
            return ""
        if self._state is not _State.TEXT and self._is_in_sequence(character):
            return ""
        return self._text(character)

    def _is_in_sequence(self, character: str) -> bool:
        """Whether the sequence takes ``character``; one that cannot be part of it ends it and is text."""
        match self._state:
            case _State.STRING:
                if character in _STRING_ENDS:
                    self._state = _State.TEXT
                return True
            case _State.ESCAPE if character == _CSI:
                self._state = _State.SEQUENCE
                return True
            case _State.ESCAPE if character in _STRINGS:
                self._state = _State.STRING
                return True
            case _State.ESCAPE:
                more, last = " " <= character <= "/", "0" <= character <= "~"
            case _:
                more, last = " " <= character <= "?", "@" <= character <= "~"
        if not more:
            self._state = _State.TEXT
        return more or last

    def _text(self, character: str) -> str:
        if character.isprintable() or character == "\t":
            return character
        if character == _CSI_C1:
            self._state = _State.SEQUENCE
        elif character in _STRINGS_C1:
            self._state = _State.STRING
        if character < "\x20" or "\x7f" <= character <= "\x9f":
            return ""
        return character.encode("unicode_escape").decode()
