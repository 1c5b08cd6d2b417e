"""Processes that outlive whoever started them: who they are, when they end, and killing only them.

The law here: a pid alone names nobody, since it is given to another process once its own has ended. A
process is its pid and its birth, and no signal goes to a pid whose birth is not the one remembered. On
Linux the check and the signal are both about one pidfd, so there is no moment between them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from host_agent.files import write_atomically

# Where the kernel cannot tell us (macOS without kqueue plumbing), the end is seen this much late, seconds.
POLL_INTERVAL = 0.2


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process for all time: ``birth`` differs for every process that ever had this ``pid``."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The process that has ``pid`` now; None when there is none or it has ended (a zombie)."""
        birth = _birth(pid)
        return None if birth is None else cls(pid, birth)

    @classmethod
    def of_child(cls, pid: int) -> ProcessIdentity:
        """A child of this process that has not been reaped; it may have ended already."""
        birth = _birth(pid, ended_too=True)
        assert birth is not None, "an unreaped child has an entry in the process table"
        return cls(pid, birth)

    @classmethod
    def read(cls, file: Path) -> ProcessIdentity | None:
        """The process recorded in ``file``, if it still runs. A record that cannot be read is none."""
        try:
            content = json.loads(file.read_bytes())
            identity = cls(int(content["pid"]), str(content["birth"]))
        except (OSError, ValueError, OverflowError, TypeError, KeyError):
            return None
        return identity if identity.alive() else None

    def write(self, file: Path) -> None:
        """Record this process in ``file``. Raises OSError."""
        write_atomically(file, json.dumps({"pid": self.pid, "birth": self.birth}).encode())

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return _birth(self.pid) == self.birth

    def send_signal(self, number: signal.Signals) -> bool:
        """Signal this process; False when it has already ended, whoever has its pid now."""
        try:
            with _pidfd(self.pid) as pidfd:
                if not self.alive():
                    return False
                if pidfd is None:
                    os.kill(self.pid, number)
                else:
                    signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        return True

    async def wait(self) -> None:
        """Return when this process has ended. It stays unreaped if it is a child of ours."""
        try:
            with _pidfd(self.pid) as pidfd:
                if pidfd is not None and self.alive():
                    await trio.lowlevel.wait_readable(pidfd)
                while self.alive():
                    await trio.sleep(POLL_INTERVAL)
        except ProcessLookupError:
            pass
        await trio.lowlevel.checkpoint()


@contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """A descriptor of the process (pidfd_open(2), Linux 5.3), None where there are none.

    Raises ProcessLookupError when no process has this pid.
    """
    if sys.platform != "linux":
        yield None
        return
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _birth(pid: int, *, ended_too: bool = False) -> str | None:
    return (_linux_birth if sys.platform == "linux" else _psutil_birth)(pid, ended_too)


def _has_threads(pid: int) -> bool:
    """Whether a process whose first thread has ended still has others: one may be in the kernel, writing to a disk."""
    try:
        return any(thread != str(pid) for thread in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return False


def _linux_birth(pid: int, ended_too: bool) -> str | None:
    """Start time in ticks since this boot, and which boot (proc(5), /proc/PID/stat field 22).

    psutil's create_time is this plus the wall clock's idea of when the machine booted, which moves
    whenever the clock is set; a process must not lose its identity to NTP.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command in field 2 may hold spaces and parentheses; what follows the last one is regular.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X") and not ended_too and not _has_threads(pid):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{int(fields[19])}"


def _psutil_birth(pid: int, ended_too: bool) -> str | None:
    try:
        process = psutil.Process(pid)
        if not ended_too and process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return repr(process.create_time())
    except psutil.NoSuchProcess:
        return None


def describe_exit(program: str, status: int | None, last_words: str = "") -> str:
    """How a process ended, in a clause. ``status`` as subprocess has it, None where nobody knows."""
    if status is None:
        what = f"{program} ended"
    elif status == 0:
        what = f"{program} ended normally"
    elif status < 0:
        what = f"{program} was killed by signal {-status} ({signal_name(-status)})"
    else:
        what = f"{program} exited with status {status}"
    return f"{what}: {last_words}" if last_words else what


def signal_name(number: int) -> str:
    """SIGKILL for 9; a real-time signal is only its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
