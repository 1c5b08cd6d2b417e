"""How far a copy is, as one line: pure, of a gauge, the time and the width of the terminal."""

from __future__ import annotations

from collections import deque
from typing import Final

from host_agent import sizes
from protocol.treegauge import Gauge

#: Seconds whose rate is told: long enough to be calm, short enough to be of now.
WINDOW: Final = 5.0
#: A rate is not told of less.
_LEAST: Final = 0.5


class Meter:
    """Looks at a gauge now and then; ``now`` in seconds of any clock."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._read = 0
        self._compared_at = -1

    def line(self, gauge: Gauge, now: float, width: int) -> str:
        """No wider than ``width``: what does not fit is left out of the middle of the path."""
        if self._seen and gauge.size < self._seen[-1][1]:  # another attempt
            self._seen.clear()
        self._seen.append((now, gauge.size))
        while now - self._seen[0][0] > WINDOW and len(self._seen) > 2:
            self._seen.popleft()
        if gauge.read != self._read:
            self._read, self._compared_at = gauge.read, gauge.done
        return _fitted(", ".join(self._facts(gauge, now)), gauge.path, width)

    def _facts(self, gauge: Gauge, now: float) -> list[str]:
        facts = [f"{gauge.files} files"] if gauge.files > 1 else []
        total = max(gauge.total or 0, gauge.done)
        if gauge.total:
            facts += [f"{sizes.show(gauge.done)} of {sizes.show(total)}", f"{gauge.done * 100 // total}%"]
        else:
            facts.append(sizes.show(gauge.done))
        if gauge.done == self._compared_at:  # the other side may still be at it
            facts.append("comparing what is there")
        elif rate := self._rate(now):
            facts.append(f"{sizes.show(rate)}/s")
            if gauge.total and total > gauge.done:
                facts.append(f"{lasting((total - gauge.done) / rate)} left")
        return facts

    def _rate(self, now: float) -> float:
        """Bytes a second; 0 while nobody knows."""
        first, last = self._seen[0], self._seen[-1]
        seconds = now - first[0]
        return (last[1] - first[1]) / seconds if seconds >= _LEAST else 0.0


def lasting(seconds: float) -> str:
    """``8 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 6000 else "days"


def _fitted(facts: str, path: str, width: int) -> str:
    room = width - len(facts) - 2
    if len(path) <= room:
        return f"{facts}: {path}"
    if room < 12:
        return facts[:width]
    head = (room - 3) // 3
    return f"{facts}: {path[:head]}...{path[len(path) - (room - 3 - head) :]}"
