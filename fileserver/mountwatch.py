"""What voids promises though no file has changed: mounts that come and go, and the sleep of this machine.

The laws:
- The kernel tells of a mount once (poll(2) of ``/proc/self/mountinfo``), and whoever asks first has heard it; so that
  descriptor is in no epoll set that is in another one, like the lane's, but has a thread that waits for it.
- What is heard is handled in trio's thread.
- A filesystem that was unmounted and mounted again in no time looks as it did before, even its number is the same. So
  when there was news, and nothing is new, any mount may be another one.

Sleep is what CLOCK_BOOTTIME counts and CLOCK_MONOTONIC does not. A timer that is cancelled when the clock is set
(timerfd_create(2)) also fires when the machine wakes up, so nothing is asked from time to time.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from fileserver.linux import failure
from protocol.lane import READABLE, Lane

logger = logging.getLogger(__name__)

MOUNTINFO: Final = Path("/proc/self/mountinfo")

ASLEEP: Final = 0.1
"""Seconds of sleep that count: what lies between two readings of the clocks is less."""

_CLOCK_REALTIME: Final = 0
_TFD_TIMER_ABSTIME: Final = 1
_TFD_TIMER_CANCEL_ON_SET: Final = 2
_ITIMERSPEC: Final = struct.Struct("@4l")  # interval and expiry, seconds and ns
_NEVER: Final = 1 << 30

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """A line of mountinfo (proc(5)): the mount's id, its device, its root in that, and where it is."""

    number: int
    device: bytes
    root: bytes
    point: bytes


def parse(mountinfo: bytes) -> list[Mount]:
    """What a process can see mounted. Lines that are not as they should be are left out."""
    mounts = []
    for line in mountinfo.splitlines():
        fields = line.split(b" ")
        with suppress(ValueError, IndexError):
            mounts.append(Mount(int(fields[0]), fields[2], _unescaped(fields[3]), _unescaped(fields[4])))
    return mounts


def _unescaped(path: bytes) -> bytes:
    """Blanks, tabs, newlines and backslashes are three octal digits behind a backslash."""
    first, *parts = path.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts)


def concerns(points: Iterable[bytes], folder: bytes) -> bool:
    """Whether one of these mount points is in a folder, or is the folder. Absolute paths without symlinks."""
    inside = folder.rstrip(b"/") + b"/"
    return any((point + b"/").startswith(inside) for point in points)


class MountWatch:
    """Tells of mounts, and of sleep, until ``close``."""

    def __init__(
        self,
        lane: Lane,
        on_mounts: Callable[[frozenset[bytes]], None],
        on_sleep: Callable[[float], None],
    ) -> None:
        """``on_mounts`` is called with the mount points at which something else is mounted than before, ``on_sleep``
        with seconds, in trio's thread. Neither may wait, or raise. (Trio's thread.)"""
        self._lane = lane
        self._on_mounts, self._on_sleep = on_mounts, on_sleep
        self._slept = _asleep()
        self._timer = _timer()
        lane.watch(self._timer, READABLE, self._on_clock_set)
        self._heard = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        lane.watch(self._heard, READABLE, self._on_heard)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._news: deque[frozenset[bytes]] = deque()
        self._file = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._mounts = _read(self._file)  # what changes after the opening is told
        self._thread = threading.Thread(target=self._wait, name="mountinfo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell no more. The lane must not be closed yet."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        for descriptor in (self._timer, self._heard):
            self._lane.forget(descriptor)
        for descriptor in (self._timer, self._heard, self._end, self._file):
            os.close(descriptor)

    # --- mounts ------------------------------------------------------------------------------------

    def is_below(self, folder: bytes) -> bool:
        """Whether anything is mounted below a folder, as far as was heard. An absolute path without symlinks."""
        return concerns((mount.point for mount in self._mounts if mount.point != folder), folder)

    def _wait(self) -> None:
        """In a thread: until the end."""
        poll = select.poll()
        poll.register(self._file, select.POLLPRI)
        poll.register(self._end, select.POLLIN)
        while not any(descriptor == self._end for descriptor, _ in poll.poll()):
            self._look()

    def _look(self) -> None:
        before, self._mounts = self._mounts, _read(self._file)
        self._news.append(frozenset(mount.point for mount in before ^ self._mounts or before))
        os.eventfd_write(self._heard, 1)

    def _on_heard(self, ready: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._heard)
        points: set[bytes] = set()
        while self._news:
            points |= self._news.popleft()
        if points:
            self._on_mounts(frozenset(points))

    # --- sleep -------------------------------------------------------------------------------------

    def _on_clock_set(self, ready: int) -> None:
        with suppress(OSError):  # ECANCELED
            os.read(self._timer, 8)
        before, self._slept = self._slept, _asleep()
        if self._slept - before > ASLEEP:
            self._on_sleep(self._slept - before)


def _read(descriptor: int) -> frozenset[Mount]:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return frozenset(parse(file.read()))


def _asleep() -> float:
    """Seconds that this machine has slept since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def _timer() -> int:
    """A timer that expires when the clock is set, or the machine wakes up, and then again."""
    descriptor = int(_libc.timerfd_create(_CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor < 0:
        raise failure(ctypes.get_errno())
    expiry = _ITIMERSPEC.pack(0, 0, int(time.time()) + _NEVER, 0)
    if _libc.timerfd_settime(descriptor, _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET, expiry, None):
        error = ctypes.get_errno()
        os.close(descriptor)
        raise failure(error)
    return descriptor
