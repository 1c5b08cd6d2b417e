"""How far away the host is, and how much is therefore to be under way.

In a VM an answer takes a fraction of a millisecond, and what comes ahead of a program only has to keep pace with it.
Over SSH it may take 100 ms, in which nothing else happens; so as much more is asked ahead as the answer takes longer.

The law: what counts is the least of the last ``SAMPLES`` round trips, for a busy host, a large answer or a disk is no
long way. One call is timed at a time. Sans-IO.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

USUAL: Final = 0.005
"""Seconds of a round trip for which the numbers of what is asked ahead were chosen: those of a slow VM."""

SAMPLES: Final = 8


class Distance:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._timed: object = None
        self._sent = 0.0
        self.round_trip = 0.0
        """Seconds; 0 before the first."""

    @property
    def is_far(self) -> bool:
        """Whether waiting for an answer costs more than what is asked for in vain."""
        return self.round_trip > USUAL

    def scaled(self, count: int, most: int) -> int:
        """``count`` where the host is near, and in proportion more where it is not, up to ``most``."""
        return min(most, int(count * self.round_trip / USUAL)) if self.is_far else count

    def sent(self, call: object) -> None:
        if self._timed is None:
            self._timed, self._sent = call, self._clock()

    def answered(self, call: object) -> None:
        if self._timed is call:
            self._timed = None
            self._samples.append(self._clock() - self._sent)
            self.round_trip = min(self._samples)

    def begin(self) -> None:
        """A session begins, perhaps over another way; what was sent in the last one is not answered any more."""
        self._timed = None
        self._samples.clear()
