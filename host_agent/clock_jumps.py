"""When this machine's own clock has jumped: it was set, or the machine has slept.

The law: nothing is polled where the kernel tells. A timer of Linux's is cancelled when the wall clock is set against
the monotonic one (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET), which a resume does, too, since the monotonic
clock stands still while the machine sleeps. Elsewhere the two are compared each second.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Final

import trio

logger = logging.getLogger(__name__)

#: How far the two clocks may drift apart within a second before it is a jump, ns. NTP slews by 0.5 ms a second.
DRIFT_NS: Final = 50_000_000

INTERVAL: Final = 1.0

# linux/timerfd.h, linux/timex.h
_TFD_TIMER_ABSTIME: Final = 1
_TFD_TIMER_CANCEL_ON_SET: Final = 2

#: When the timer would end by itself: in 2200.
_FAR: Final = 7_258_118_400


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class _Timer:
    """A descriptor that can be read once the clock has jumped. Raises ``OSError`` where there is none."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError("no timer that tells")
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_CLOEXEC | os.O_NONBLOCK  # TFD_CLOEXEC, TFD_NONBLOCK
        self._descriptor = self._checked(self._libc.timerfd_create(time.CLOCK_REALTIME, flags))
        try:
            self.set()
        except OSError:
            self.close()
            raise

    def set(self) -> None:
        """From now on it tells of the next jump."""
        value = _Itimerspec(_Timespec(0, 0), _Timespec(_FAR, 0))
        flags = _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET
        self._checked(self._libc.timerfd_settime(self._descriptor, flags, ctypes.byref(value), None))

    async def wait(self) -> None:
        """Until the clock has jumped since ``set``."""
        await trio.lowlevel.wait_readable(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _checked(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


async def watch(jumped: Callable[[], None]) -> None:
    """Call ``jumped`` after each jump, until cancelled."""
    try:
        timer = _Timer()
    except OSError as error:
        logger.info("the clock is looked at each second: %s", error)
        await compare(jumped)
        return
    with closing(timer):
        while True:
            await timer.wait()
            # Before it is told: the next jump may come while somebody still thinks about this one.
            timer.set()
            jumped()


async def compare(jumped: Callable[[], None]) -> None:
    """The same by looking at the clocks."""
    before = _apart()
    while True:
        await trio.sleep(INTERVAL)
        now = _apart()
        if abs(now - before) > DRIFT_NS:
            jumped()
        before = now


def _apart() -> int:
    """How far the wall clock is ahead of the monotonic one, ns."""
    return time.time_ns() - time.monotonic_ns()
