"""``end``: nothing of a session is left, whatever state it was in. To end it again changes nothing.

The law: what holds a lock is ended, in good order if it still can; both locks are held before anything is removed, so
nothing is taken from under who lives. A mount is removed if nobody serves it: those of other sessions stay.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Final

from guest_agent.fuse import mounting
from guest_agent.fuse.mountinfo import Mount, mounted_shares, read_mounts
from guest_agent.fuse.mounting import MountError
from guest_agent.remote.rundir import PLANES, Place, Process, RunDir, RunDirError

GENTLE: Final = 15.0
"""Seconds for a daemon to end by itself: its processes have 3 s to do so, mounts are taken off at once."""

FORCED: Final = 10.0
"""Seconds for the kernel to end a killed one."""

BEGIN_TIME: Final = 1.0
"""Seconds for those to let go who look whether the session is being ended."""

LOOK_AGAIN: Final = 0.05

LOOK_TIME: Final = 3.0
"""Seconds for mounts to answer: one that does not is served, though its host may be absent."""


class CannotEnd(Exception):
    """The message is a sentence."""


def end(session: str) -> None:
    """Raises ``CannotEnd``."""
    try:
        rundir = RunDir.of(session)
        if rundir.path.is_dir():
            with ExitStack() as locks:
                if (ending := _begin(rundir)) is not None:
                    locks.callback(os.close, ending)
                _ask_to_end([rundir.plane(plane) for plane in PLANES])
                for plane in PLANES:
                    locks.callback(os.close, _end_plane(rundir.plane(plane)))
                remove_dead_mounts()
                rundir.remove()
        else:
            remove_dead_mounts()
    except RunDirError as error:
        raise CannotEnd(str(error)) from error
    except FileNotFoundError:
        pass  # somebody else was faster
    except OSError as error:
        raise CannotEnd(f"{rundir.path} cannot be removed: {error.strerror}") from error


def _begin(rundir: RunDir) -> int | None:
    """The lock that keeps others from starting daemons; None if another end has it, which then does that."""
    begun = time.monotonic()
    while (lock := rundir.ending.take_lock()) is None and time.monotonic() - begun < BEGIN_TIME:
        time.sleep(LOOK_AGAIN)
    return lock


def _ask_to_end(places: list[Place]) -> None:
    """All at once, so that they do not take their time one after another."""
    for place in places:
        if (lock := place.take_lock()) is not None:
            os.close(lock)
        elif (process := place.holder()) is not None:
            process.signal(signal.SIGTERM)


def _end_plane(place: Place) -> int:
    """The lock, once nobody has it. Raises ``CannotEnd``."""
    begun = time.monotonic()
    asked: Process | None = None
    while (lock := place.take_lock()) is None:
        waited = time.monotonic() - begun
        if waited > GENTLE + FORCED:
            raise CannotEnd(f"the {place.plane} agent cannot be ended; who it is stands in {place.lock}")
        # Another may have come into its place: who connects begins anew.
        if (process := place.holder()) is not None and (process != asked or waited > GENTLE):
            process.signal(signal.SIGKILL if waited > GENTLE else signal.SIGTERM)
            asked = process
        time.sleep(LOOK_AGAIN)
    return lock


def remove_dead_mounts() -> None:
    """Take off the mounts of ours that nobody serves any more: their agent was killed."""
    for mount in _dead(mounted_shares(read_mounts())):
        try:
            mounting.unmount(mount.path, force=True)
        except (MountError, OSError) as error:  # another user's, or somebody else was faster
            print(error, file=sys.stderr)


def _dead(mounts: list[Mount]) -> list[Mount]:
    """Who touches a mount may have to wait for its host: children do, all at once."""
    looking = [(mount, _look_at(mount.path)) for mount in mounts]
    deadline = time.monotonic() + LOOK_TIME
    dead = []
    for mount, child in looking:
        try:
            code = child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        if code == errno.ENOTCONN:
            dead.append(mount)
    return dead


_LOOK: Final = """
import os, sys
try:
    os.stat(sys.argv[1])
except OSError as error:
    os._exit(error.errno)
"""


def _look_at(path: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LOOK, path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
