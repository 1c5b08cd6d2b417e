"""What a guest's serial console says about its boot: how far it is, that it panicked, that it hangs.

The law here: sans-IO. Bytes and the time (seconds of any monotonic clock) go in, events come out, and
any split of the bytes gives the same events. A boot hangs only by the limits of its stage: nothing new
for ``quiet`` seconds, or the stage not over after ``total`` (systemd prints a line a second while it
waits for a job for ever, so output alone is not progress). Nothing is remembered without a bound.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from provision.machine import Accelerator


class BootStage(Enum):
    """How far a boot has come, in order."""

    FIRMWARE = "firmware"  # nothing on the console yet
    KERNEL = "kernel"
    INITRD = "initrd"
    ROOT = "root"  # the root file system is mounted
    INIT = "init"  # systemd runs units
    AGENT = "agent"  # the guest agent has been started; what is missing is its connection


_ORDER = list(BootStage)

# The kernel prints its own name first; the others are said by the initrd and by a unit of the guest.
_KERNEL_MARK = "Linux version "
_STAGE_MARK = re.compile(r"agentctl-stage: (initrd|root|init|agent)\b")

# panic() prints the first, whatever the reason; the second is printed when the first was cut off.
_PANIC = re.compile(r"(Kernel panic - not syncing.*|---\[ end Kernel panic.*)")

# kernel/reboot.c, the last line before it asks the machine for either.
_FAREWELL = re.compile(r"reboot: (Restarting system|Power down)")

_TIMESTAMP = re.compile(r"^\[ *\d+\.\d+\](\[ *[TC]\d+\])? ")
_ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]")

# A line longer than this is cut into several; the kernel's own are at most 1 KiB.
MAX_LINE = 4096
TAIL_LINES = 20


class Farewell(Enum):
    """What a kernel ended its run for, by its own last words."""

    REBOOT = "Restarting system"
    POWER_OFF = "Power down"


@dataclass(frozen=True, slots=True)
class StageLimit:
    """How long a stage may last and how long it may print nothing, in seconds."""

    quiet: float
    total: float


# Many times what a boot takes on a hypervisor: restarting a machine that is merely slow costs more than
# reporting late one that hangs.
LIMITS: Mapping[BootStage, StageLimit] = {
    BootStage.FIRMWARE: StageLimit(quiet=6, total=6),
    BootStage.KERNEL: StageLimit(quiet=6, total=20),
    BootStage.INITRD: StageLimit(quiet=10, total=30),
    BootStage.ROOT: StageLimit(quiet=15, total=30),
    BootStage.INIT: StageLimit(quiet=30, total=60),
    BootStage.AGENT: StageLimit(quiet=15, total=30),
}

# TCG runs a kernel at a tenth of the speed or less: its first line alone takes 1.4 s on an idle machine.
SLOWNESS: Mapping[Accelerator, float] = {Accelerator.KVM: 1, Accelerator.HVF: 1, Accelerator.TCG: 10}


def limits_for(accelerator: Accelerator) -> dict[BootStage, StageLimit]:
    """The limits of each stage on this accelerator."""
    factor = SLOWNESS[accelerator]
    return {stage: StageLimit(limit.quiet * factor, limit.total * factor) for stage, limit in LIMITS.items()}


@dataclass(frozen=True, slots=True)
class StageReached:
    """The boot is at ``stage``, ``seconds`` after its start."""

    stage: BootStage
    seconds: float


@dataclass(frozen=True, slots=True)
class Panicked:
    """The kernel gave up; ``text`` is its line, without the timestamp."""

    text: str

    @property
    def reason(self) -> str:
        """A clause for the user."""
        return f"the guest's kernel panicked: {self.text}"


@dataclass(frozen=True, slots=True)
class Stalled:
    """``stage`` is over its limit: ``seconds`` without a sign of progress, or in the stage at all."""

    stage: BootStage
    seconds: float
    silent: bool

    @property
    def reason(self) -> str:
        """A clause for the user."""
        how = "said nothing" if self.silent else "got no further"
        return f"the guest {how} for {self.seconds:.0f} s in stage {self.stage.value}"


ConsoleEvent = StageReached | Panicked | Stalled


class ConsoleWatcher:
    """Watches one boot. Feed it ``receive_data``, call ``check`` when ``deadline`` has come."""

    def __init__(self, limits: Mapping[BootStage, StageLimit], now: float) -> None:
        self._limits = limits
        self._started = self._stage_since = self._progress_at = now
        self._buffer = bytearray()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._ended = False
        self._panicked = False
        self.stage = BootStage.FIRMWARE

    @property
    def tail(self) -> list[str]:
        """The last lines printed, oldest first, with an unfinished one at the end."""
        rest = _text(bytes(self._buffer))
        return [*self._tail, rest][-TAIL_LINES:] if rest else list(self._tail)

    @property
    def deadline(self) -> float:
        """When the boot has stalled unless something happens; infinite once it is over."""
        if self._ended:
            return float("inf")
        limit = self._limits[self.stage]
        return min(self._progress_at + limit.quiet, self._stage_since + limit.total)

    def receive_data(self, data: bytes, now: float) -> list[ConsoleEvent]:
        """The events in ``data``, a piece of the console's output."""
        if data:
            self._progress_at = now
        self._buffer += data
        events: list[ConsoleEvent] = []
        while (line := self._take_line()) is not None:
            events += self._line(_text(line), now)
        return events

    def progress(self, now: float) -> None:
        """A sign of life other than output, such as the guest opening a port."""
        self._progress_at = now

    def booted(self) -> None:
        """The guest is connected: from now on only a panic is an event."""
        self._ended = True

    def check(self, now: float) -> Stalled | None:
        """The stall, if the deadline has passed. It is told once."""
        if now < self.deadline:
            return None
        self._ended = True
        quiet_for = now - self._progress_at
        if quiet_for >= self._limits[self.stage].quiet:
            return Stalled(self.stage, quiet_for, silent=True)
        return Stalled(self.stage, now - self._stage_since, silent=False)

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", 0, MAX_LINE)
        if end < 0 and len(self._buffer) < MAX_LINE:
            return None
        line = bytes(self._buffer[: end if end >= 0 else MAX_LINE])
        del self._buffer[: end + 1 if end >= 0 else MAX_LINE]
        return line

    def _line(self, line: str, now: float) -> list[ConsoleEvent]:
        if line:
            self._tail.append(line)
        if (panic := _PANIC.search(line)) and not self._panicked:
            self._panicked = self._ended = True
            return [Panicked(panic[1])]
        stage = _stage_of(line)
        if stage is None or _ORDER.index(stage) <= _ORDER.index(self.stage):
            return []
        self.stage, self._stage_since = stage, now
        return [StageReached(stage, now - self._started)]


def find_panic(log: bytes) -> str:
    """The panic in a piece of console log, without its timestamp; empty if there is none."""
    match = _PANIC.search(log.decode(errors="replace"))
    return _text(match[1].encode()) if match else ""


def find_farewell(log: bytes) -> Farewell | None:
    """The last words in a piece of console log; None if the kernel did not get to say them."""
    words = _FAREWELL.findall(log.decode(errors="replace"))
    return Farewell(words[-1]) if words else None


def _stage_of(line: str) -> BootStage | None:
    if mark := _STAGE_MARK.search(line):
        return BootStage(mark[1])
    return BootStage.KERNEL if _TIMESTAMP.sub("", line, count=1).startswith(_KERNEL_MARK) else None


def _text(line: bytes) -> str:
    """A console line as people read it: no colours, no control characters."""
    return _ESCAPE.sub(b"", line).decode(errors="replace").rstrip()
