"""Lines of logs with the moments at which they were written, whatever they come from.

Sans-IO: bytes in, lines out; any split of the bytes gives the same lines. The law: every line has a moment, and those
of one source are in the order in which they were written. One that says none (the rest of a traceback, what systemd
prints on the console) was written when the one before it was. What a guest wrote is text, never a control sequence.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from host_agent.plain_text import PlainText

#: Characters of a line that are kept: what a guest says in one line may have no end.
MAX_LINE = 16_384

#: Bytes of an entry of the journal that is not over yet; beyond that it is not waited for.
MAX_ENTRY = 1 << 20

_WRITTEN = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ")
_BOOTED = re.compile(r"\[ *(\d+\.\d{6})\] ?")


@dataclass(frozen=True, slots=True)
class LogLine:
    """``time``: seconds since the epoch."""

    time: float
    component: str
    text: str


#: The moment that a line says, if it says one, and the line without it.
Stamp = Callable[[str], tuple[float | None, str]]


def local_time(line: str) -> tuple[float | None, str]:
    """A line as ``logging`` writes it here: ``2026-01-31 12:00:00,123 name INFO message``."""
    if (match := _WRITTEN.match(line)) is None:
        return None, line
    try:
        moment = time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return None, line
    return moment + int(match[2]) / 1000, line[match.end() :]


def since(boot: float) -> Stamp:
    """A line as a kernel prints it that booted at ``boot``: ``[   12.345678] message``."""

    def stamp(line: str) -> tuple[float | None, str]:
        match = _BOOTED.match(line)
        return (None, line) if match is None else (boot + float(match[1]), line[match.end() :])

    return stamp


def unknown(line: str) -> tuple[float | None, str]:
    """A line that says no moment."""
    return None, line


def last_stamp(log: bytes) -> float | None:
    """The last moment in a console log, seconds since the kernel's start."""
    found = _BOOTED.findall(log.decode(errors="replace"))
    return float(found[-1]) if found else None


class Lines:
    """The lines of one file. ``otherwise`` is the moment of those before any that says one."""

    def __init__(self, component: str, stamp: Stamp, otherwise: float) -> None:
        self._component = component
        self._stamp = stamp
        self._otherwise = otherwise
        self._moment: float | None = None
        self._text = PlainText()
        self._rest = ""

    def receive_data(self, data: bytes, now: float | None = None) -> list[LogLine]:
        """The lines that ``data`` ends. ``now`` is when they were written, where they are read as they are."""
        *whole, self._rest = (self._rest + self._text.receive_data(data)).split("\n")
        if len(self._rest) > MAX_LINE:
            whole, self._rest = [*whole, self._rest], ""
        return [self._line(text, now) for text in whole if text.strip()]

    def end(self) -> list[LogLine]:
        """The last line, if nothing ends it."""
        return self.receive_data(b"\n") if self._rest else []

    def _line(self, text: str, now: float | None) -> LogLine:
        moment, text = self._stamp(text[:MAX_LINE])
        if now is not None and (moment is None or self._stamp is not local_time):
            moment = now
        if moment is not None:
            # A clock that was set back, or a guest that lies, does not change the order.
            self._moment = moment if self._moment is None else max(self._moment, moment)
        return LogLine(self._otherwise if self._moment is None else self._moment, self._component, text)


def by_time(lines: Iterable[LogLine]) -> list[LogLine]:
    """Of several sources; those of one stay in their order."""
    return sorted(lines, key=lambda line: line.time)


class JournalLines:
    """Lines of ``journalctl --output=json`` (systemd.journal-fields(7)), each an object."""

    def __init__(self, component_of: Callable[[str], str]) -> None:
        self._component_of = component_of
        self._rest = b""
        self._moment = 0.0
        self.cursor = ""
        """Where it goes on after what has come."""

    def receive_data(self, data: bytes) -> list[LogLine]:
        """The lines of the entries that ``data`` ends; what is no entry is left out."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_ENTRY:
            self._rest = b""
        return [line for entry in whole for line in self._lines(entry)]

    def _lines(self, entry: bytes) -> Iterator[LogLine]:
        try:
            fields = json.loads(entry)
            moment = int(fields["__REALTIME_TIMESTAMP"]) / 1e6
            cursor = str(fields["__CURSOR"])
        except (ValueError, TypeError, LookupError, RecursionError):
            return
        self.cursor, self._moment = cursor, max(self._moment, moment)
        component = self._component_of(_text(fields.get("UNIT")) or _text(fields.get("_SYSTEMD_UNIT")))
        who = _text(fields.get("SYSLOG_IDENTIFIER"))
        # A sequence that is left open ends with its line, here as everywhere.
        for text in PlainText().receive_data(_text(fields.get("MESSAGE")).encode()).split("\n"):
            if text.strip():
                said = f"{who}: {text}" if who else text
                yield LogLine(self._moment, component, said[:MAX_LINE])


def _text(value: Any) -> str:
    """A field: text, or bytes where it is not UTF-8, or one of several."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode(errors="replace")
    if isinstance(value, list) and value and all(isinstance(each, int) and 0 <= each < 256 for each in value):
        return bytes(value).decode(errors="backslashreplace")
    return _text(value[0]) if isinstance(value, list) and value and isinstance(value[0], str) else ""
