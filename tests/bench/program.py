"""What every benchmark's program does: its working directory, its signals, what it says it runs on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.bench.instance import SOURCES, InstanceFailed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(message: str) -> None:
    """Progress, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def directory(chosen: Path | None) -> Iterator[Path]:
    """The working directory, by default in the user's cache. One run at a time: raises ``InstanceFailed``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentctl-bench"
    path = (chosen or default).absolute()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (path / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InstanceFailed(f"another run is at work in {path}") from None
        yield path


def end_on_signals() -> None:
    """From now on a signal raises ``KeyboardInterrupt``."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End, once: what is then cleared up has limits of time, and another ^C must not cut it short."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def host(qemu: Path | None = None) -> dict[str, str]:
    """This machine, and the versions of what is compared on it."""
    found = {
        "host": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cpus",
        "agentctl": _version(),
    }
    if qemu:
        found["qemu"] = first_line(str(qemu), "--version")
    return found


def _version() -> str:
    # The checkout may be another user's: its code is run here as well.
    trusted = ("-c", f"safe.directory={SOURCES}", "-C", str(SOURCES))
    return first_line("git", *trusted, "describe", "--always", "--dirty")


def first_line(*command: str) -> str:
    """Of what ``command`` prints (ssh says its version on stderr); "unknown" if it cannot be had."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if done.returncode != 0:
        return "unknown"
    return (done.stdout or done.stderr).partition("\n")[0].strip() or "unknown"
