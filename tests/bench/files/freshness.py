"""How long it takes until an edit on the host is seen in the guest.

The laws:
- What counts is the time from the end of the host's write(2), or rename(2), to the end of the first read(2) in the guest
  that has it. Every other edit is in place, every other replaces the file, as editors do.
- The file was read just before, so that whatever keeps it has it; and the next edit comes at a time that nobody can
  foresee.
- Two machines have two clocks. By how much they differ is measured before and after, by the quickest of many questions
  for the time; how far that may be wrong is part of the result.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench import processes
from tests.bench.files.driver import START_TIMEOUT, DriverLost, Lines
from tests.bench.files.report import Freshness
from tests.bench.files.watcher import Watch

FILES = 20
QUESTIONS = 60
MOST_PAUSE = 0.02
"""Seconds between two edits, at the most."""

EDIT_TIMEOUT = 30.0
ANSWER_TIMEOUT = 20.0


@dataclass(frozen=True, slots=True)
class Clock:
    """The other machine's is ``ahead`` by so many seconds, give or take ``doubt``."""

    ahead: float
    doubt: float


def compare_clocks(ask: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> Clock:
    """``ask`` has the other's time."""
    best = Clock(0.0, math.inf)
    for _ in range(QUESTIONS):
        before = clock()
        theirs = ask()
        after = clock()
        if (after - before) / 2 < best.doubt:
            best = Clock(theirs - (before + after) / 2, (after - before) / 2)
    return best


def between(one: Clock, other: Clock) -> Clock:
    """What held meanwhile, if it was this before and that after."""
    ahead = (one.ahead + other.ahead) / 2
    return Clock(ahead, max(one.doubt, other.doubt) + abs(one.ahead - other.ahead) / 2)


def percentile(values: list[float], part: float) -> float:
    """The least of ``values`` that is not exceeded by ``part`` of them."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


class Watcher:
    """The process beside the mount, ``start``ed here."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start

    def __enter__(self) -> Watcher:
        self._process = self._start()
        self._lines = Lines(self._process)
        return self

    def __exit__(self, *exception: object) -> None:
        processes.end(self._process)

    def time(self, timeout: float = ANSWER_TIMEOUT) -> float:
        """There, now."""
        self._lines.say(dataclasses.asdict(Watch()))
        return float(self._lines.hear(timeout)["clock"])

    def compare_clocks(self) -> Clock:
        self.time(START_TIMEOUT)
        return compare_clocks(self.time)

    def watch(self, path: str, content: str) -> None:
        """Begin; raises ``DriverLost``."""
        self._lines.say(dataclasses.asdict(Watch(path, content, EDIT_TIMEOUT)))
        self._lines.hear(ANSWER_TIMEOUT)

    def arrival(self) -> float:
        """When it was seen, by that clock; raises ``DriverLost``."""
        answer = self._lines.hear(EDIT_TIMEOUT + ANSWER_TIMEOUT)
        if "error" in answer:
            raise DriverLost(str(answer["error"]))
        return float(answer["clock"])


def edit(path: Path, content: str, *, replace: bool) -> float:
    """Returns when it was done."""
    if replace:
        draft = path.with_name("draft")
        draft.write_text(content)
        os.rename(draft, path)
        return time.monotonic()
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content.encode(), 0)
        return time.monotonic()
    finally:
        os.close(descriptor)


def measure(peer: str, host: Path, guest: str, watcher: Watcher, edits: int, limit: float) -> Freshness:
    """Of ``edits``, or as many as there is time for in ``limit`` seconds, in the folder that is ``host`` here and ``guest``
    there."""
    host.mkdir(exist_ok=True)
    for number in range(FILES):
        (host / f"{number:02}").write_text("first 0000")
    delays: list[float] = []
    deadline = time.monotonic() + limit
    try:
        before = watcher.compare_clocks()
        while len(delays) < edits and time.monotonic() < deadline:
            number = len(delays)
            name, content = f"{number % FILES:02}", f"edit {number:05}"
            watcher.watch(f"{guest}/{name}", content)
            time.sleep(random.uniform(0, MOST_PAUSE))
            done = edit(host / name, content, replace=number // FILES % 2 == 1)
            delays.append(watcher.arrival() - done)
        clock = between(before, watcher.compare_clocks())
    except (DriverLost, BrokenPipeError) as error:
        return Freshness(peer, len(delays), error=str(error))
    delays = [delay - clock.ahead for delay in delays]
    return Freshness(
        peer, len(delays), percentile(delays, 0.5), percentile(delays, 0.99), max(delays), clock.doubt
    )
