"""The guest's wall clock, moved as the host says.

The law: it is moved by an amount and never set to a time that was true when a message was sent. What is far off
is put right at once; the rest is made up for without a jump, so that no timer, build or log sees time go back.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import time
from typing import Final

import trio

from protocol.api import AdjustClock, GuestClock
from protocol.errors import ErrorCode, RpcError
from protocol.link import Service

log = logging.getLogger(__name__)

TOLERANCE_NS: Final = 100_000_000
"""A clock that is off by no more is not set: a jump costs more (timers, builds) than 100 ms do."""


class _Timeval(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("microseconds", ctypes.c_long))


class WallClock:
    """CLOCK_REALTIME. To change it needs CAP_SYS_TIME; without it ``PermissionError``."""

    def now_ns(self) -> int:
        return time.time_ns()

    def step(self, by_ns: int) -> None:
        """Set it forward or back; an earlier ``slew`` ends. Raises ``OSError`` (EINVAL) or ``OverflowError`` for a time
        that the kernel does not have, like one before 1970."""
        self.slew(0)
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + by_ns)

    def slew(self, by_ns: int) -> None:
        """Let it gain or lose that, 0.5 ms in each second (adjtime(3)); what was left of an earlier one is void."""
        seconds, microseconds = divmod(by_ns // 1000, 1_000_000)
        delta = _Timeval(seconds, microseconds)
        if _libc().adjtime(ctypes.byref(delta), None) != 0:
            number = ctypes.get_errno()
            raise OSError(number, errno.errorcode.get(number, "adjtime"))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class Clock:
    """Answers ``AdjustClock``."""

    def __init__(self, clock: WallClock | None = None) -> None:
        self._clock = clock or WallClock()

    def register(self, service: Service) -> None:
        service.on_request(AdjustClock, self.adjust)

    async def adjust(self, request: AdjustClock) -> GuestClock:
        """Read where the question is read, since each moment until the answer blurs what it says. Raises ``RpcError``:
        DENIED where the agent may not (it is not root), INVALID for a time that cannot be."""
        try:
            self._move(request.by_ns)
        except PermissionError as error:
            raise RpcError(ErrorCode.DENIED, f"the guest agent may not: {error}") from error
        except (OSError, OverflowError) as error:
            raise RpcError(
                ErrorCode.INVALID, f"the clock cannot be moved by {request.by_ns} ns: {error}"
            ) from error
        now = self._clock.now_ns()
        await trio.lowlevel.checkpoint()
        return GuestClock(now)

    def _move(self, by_ns: int) -> None:
        if abs(by_ns) > TOLERANCE_NS:
            self._clock.step(by_ns)
            log.info("clock.stepped ms=%d", by_ns // 1_000_000)
        elif by_ns:
            self._clock.slew(by_ns)
            log.info("clock.slewed us=%d", by_ns // 1000)
