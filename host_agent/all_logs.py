"""``agentctl logs`` of all components: lines of this machine's files and of the VM's journal, by the time they were
written.

The law: what can be had is shown; a VM that does not answer is a note, and its journal comes once it does. While it is
followed, lines are sorted within ``BATCH`` seconds: nothing waits longer, and what comes later stands later.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import trio

from host_agent import log_sources, state
from host_agent.client import RESTART_TIME, connected
from host_agent.errors import ExitCode, UserError
from host_agent.groups import leaves
from host_agent.log_lines import (
    JournalLines,
    Lines,
    LogLine,
    Stamp,
    by_time,
    last_stamp,
    local_time,
    since,
    unknown,
)
from host_agent.logfiles import successor_of
from host_agent.paths import InstancePaths
from protocol import execio
from protocol.api import Exec, GetStatus
from protocol.errors import AgentctlProtocolError
from protocol.link import Link

#: How long lines are collected before they are sorted and shown, seconds.
BATCH = 0.25

#: How long the VM may take to give its last lines, seconds: a look costs an emulated one 2 s.
JOURNAL_TIME = 20.0

#: Before a VM that did not answer is asked again, seconds.
JOURNAL_AGAIN = 1.0

#: Bytes of the end of a file that are looked at; a log has at most 4 MiB.
MAX_READ = 8 << 20

#: How it shows that the guest or the host agent is not there. It may come together with a cancellation.
_AWAY = (UserError, AgentctlProtocolError, trio.BrokenResourceError)

Write = Callable[[Iterable[LogLine]], None]

#: How the lines of a file say when they were written, told from its path and content.
StampOf = Callable[[Path, bytes], Stamp]


@dataclass(frozen=True, slots=True)
class Shown:
    """How much: the last ``lines``, and with ``follow`` what is written from then on."""

    lines: int
    follow: bool


class Tail:
    """The end of a file that grows, that may be replaced, and that need not be there yet."""

    def __init__(self, component: str, path: Path, stamp_of: StampOf) -> None:
        self._component = component
        self._path = path
        self._stamp_of = stamp_of
        self._file: BinaryIO | None = None
        self._lines: Lines | None = None

    def last(self, count: int) -> list[LogLine]:
        """The last ``count`` lines that are there."""
        self._open()
        if self._file is None or self._lines is None:
            return []
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(max(0, size - MAX_READ))
        found = deque(self._lines.receive_data(self._file.read()), maxlen=count)
        return list(found)

    def rest(self) -> list[LogLine]:
        """A last line that nothing has ended yet."""
        return [] if self._lines is None else self._lines.end()

    def more(self) -> list[LogLine]:
        """What was written since."""
        if self._file is None or self._lines is None:
            self._open()
            if self._file is None or self._lines is None:
                return []
        successor = successor_of(self._file, self._path)
        found = self._lines.receive_data(self._file.read(), time.time())
        if successor is not None:
            self._file.close()
            self._file = successor
            found += [*self._lines.end(), *self._lines.receive_data(successor.read(), time.time())]
        return found

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def is_there(self) -> bool:
        """Whether there was a file."""
        return self._file is not None

    def _open(self) -> None:
        try:
            self._file = self._path.open("rb")
        except FileNotFoundError:
            return
        written = os.fstat(self._file.fileno()).st_mtime
        stamp = self._stamp_of(self._path, self._file.read(MAX_READ))
        self._file.seek(0)
        self._lines = Lines(self._component, stamp, written)


def tails(paths: InstancePaths) -> list[Tail]:
    """One for each file of an instance."""

    def of_kernel(console: Path, content: bytes) -> Stamp:
        return since(_boot_time(paths, console, content))

    stamps: dict[str, StampOf] = {"console": of_kernel, "qemu": lambda path, content: unknown}
    return [
        Tail(component, file(paths), stamps.get(component, _usual))
        for component, file in log_sources.FILES.items()
    ]


def _usual(path: Path, content: bytes) -> Stamp:
    return local_time


def _boot_time(paths: InstancePaths, console: Path, content: bytes) -> float:
    """When the kernel that writes to ``console`` was started: with its QEMU, which is written down as it starts.

    Of one that has ended: so that what it said last was when the file was written to last.
    """
    try:
        return paths.qemu_identity.stat().st_mtime
    except OSError:
        return console.stat().st_mtime - (last_stamp(content) or 0.0)


async def show(paths: InstancePaths, shown: Shown, write: Write, note: Callable[[str], None]) -> None:
    """Write the last lines, then, if they are followed, more until cancelled.

    Raises ``UserError`` if there are no logs yet.
    """
    files = tails(paths)
    journal = JournalLines(log_sources.component_of)
    try:
        found = [line for tail in files for line in tail.last(shown.lines)]
        if not any(tail.is_there for tail in files):
            message, hint = "there are no logs yet", "the instance has not been started: agentctl up"
            raise UserError(message, hint, ExitCode.NOT_RUNNING)
        if not shown.follow:
            found += [line for tail in files for line in tail.rest()]
        if paths.attached.exists():
            note("what the agents over there wrote down: agentctl logs --component guest")
        elif state.is_locked(paths.lock):
            found += await _last_of_journal(paths, journal, shown.lines, note)
        write(by_time(found)[-shown.lines :] if shown.lines else [])
        if shown.follow:
            await _follow(paths, files, journal, write)
    finally:
        for tail in files:
            tail.close()


async def _follow(paths: InstancePaths, files: list[Tail], journal: JournalLines, write: Write) -> None:
    news: list[LogLine] = []
    async with trio.open_nursery() as nursery:
        if not paths.attached.exists():
            nursery.start_soon(_follow_journal, paths, journal, news)
        while True:
            await trio.sleep(BATCH)
            batch = [*news, *(line for tail in files for line in tail.more())]
            news.clear()
            if batch:
                write(by_time(batch))


# --- the VM's --------------------------------------------------------------------------------------


def _command(*options: str) -> list[str]:
    fields = "--output-fields=MESSAGE,SYSLOG_IDENTIFIER,UNIT,_SYSTEMD_UNIT"
    return [*log_sources.journal(*log_sources.UNITS), "--output=json", fields, *options]


async def _last_of_journal(
    paths: InstancePaths, journal: JournalLines, lines: int, note: Callable[[str], None]
) -> list[LogLine]:
    found: list[LogLine] = []
    reason = f"no answer within {JOURNAL_TIME:.0f} s"
    with trio.move_on_after(JOURNAL_TIME) as waiting:
        try:
            async with connected(paths, patience=RESTART_TIME) as link:
                # Else the question would wait for it: who looks at the logs of a boot wants them now.
                if not (await link.request(GetStatus())).guest_connected:
                    raise UserError("the guest agent is not connected")
                await _read_journal(link, journal, [f"--lines={lines}"], found.extend)
        except* _AWAY as group:
            reason = str(leaves(group)[0])
            waiting.cancel()
    if waiting.cancel_called:
        note(f"what the VM wrote down is not here: {reason}")
    return found


async def _follow_journal(paths: InstancePaths, journal: JournalLines, news: list[LogLine]) -> None:
    """For ever, from one guest and host agent to the next."""
    while True:
        if state.is_locked(paths.lock):
            # After a reboot the journal is another one: journalctl finds no such place in it, and begins at the next.
            place = f"--after-cursor={journal.cursor}" if journal.cursor else "--lines=all"
            try:
                async with connected(paths, patience=RESTART_TIME) as link:
                    await _read_journal(link, journal, ["--follow", place], news.extend)
            except* _AWAY:
                pass  # the files say why
        await trio.sleep(JOURNAL_AGAIN)


async def _read_journal(
    link: Link, journal: JournalLines, options: list[str], found: Callable[[list[LogLine]], None]
) -> None:
    """Read until journalctl ends. Raises ``OpenRefused``, ``LinkError``, ``trio.BrokenResourceError``."""
    async with await link.open(Exec(argv=_command(*options), user="root")) as stream:
        await stream.send_all(execio.encode(execio.StdinEof()))
        decoder = execio.Decoder()
        while data := await stream.receive_some():
            for packet in decoder.receive_data(bytes(data)):
                match packet:
                    case execio.Stdout(content):
                        found(journal.receive_data(content))
                    case execio.Exit():
                        return
