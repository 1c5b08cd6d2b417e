"""Whether packing what one side sends is worth it, by what it has cost so far, sans-IO; times are seconds.

The law: packing has to be faster than the way it relieves. It is packed while the way is not known to carry more than
half of what the codec takes in, and pieces that do not shrink make it leave out those that follow, a stated number
of bytes. How fast the way is, is what the other side acknowledges while something is under way: a round trip is in
it, so where answers are waited for it looks slower than it is, and there the codec's time is nothing beside the wait.

While it is packed, nobody knows what the way could carry beyond it. So where the codec has taken more than half of the
time, the next sample is sent as it is, to find out: seldom, since on a way of medium speed that costs some of it.
"""

from __future__ import annotations

from typing import Final

LEAST: Final = 1024
"""Bytes that are packed; of less there is little to gain: at 1 MB/s it is on its way for a millisecond, and to pack and
unpack it takes 60 us of processors."""

SHRINKS: Final = 0.9
"""The part that is left of what was worth packing."""

FIRST_SKIP: Final = 128 * 1024
MOST_SKIPPED: Final = 512 * 1024
"""Bytes that are left alone after a piece that did not shrink, and once that has happened again and again: random bytes
cost zlib 4.8 ms in 128 KiB, and this is what goes unpacked of a text that follows."""

SAMPLE: Final = 256 * 1024
"""Acknowledged bytes by which the way is judged."""

ACKNOWLEDGED: Final = 64 * 1024
"""Bytes received after which that is acknowledged."""

PAUSE: Final = 0.01
"""Seconds without anything to send that are none of the way's."""

TRIAL_EVERY: Final = 64 << 20
"""Bytes that are packed between two looks at what the way carries without."""

_SMOOTHING: Final = 1 / 8


class Worth:
    """For one direction of one connection. ``now`` never goes back."""

    def __init__(self) -> None:
        self.way: float | None = None
        """Bytes a second that the way has carried last, as they were on it."""
        self.is_off = False
        """Whether the way is too fast for it."""
        self._skip, self._next_skip = 0, FIRST_SKIP
        self._under_way = self._sampled = 0
        self._since = self._last = 0.0
        self._busy = 0.0  # seconds of the codec's in this sample
        self._until_trial = 0
        self._taken, self._taking = 0.0, 1e-6

    @property
    def speed(self) -> float:
        """Bytes a second that the codec has taken in, of pieces as they were last."""
        return self._taken / self._taking

    def wants(self, size: int) -> bool:
        """Whether to pack a piece of ``size`` bytes."""
        if size < LEAST or self.is_off:
            return False
        if self._skip > 0:
            self._skip -= size
            return False
        return True

    def packed(self, size: int, left: int, seconds: float) -> None:
        """``size`` bytes became ``left``, in ``seconds``."""
        self._busy += seconds
        self._until_trial -= size
        self._taken += size - _SMOOTHING * self._taken
        self._taking += max(seconds, 1e-6) - _SMOOTHING * self._taking
        if left > size * SHRINKS:
            self._skip, self._next_skip = self._next_skip, min(2 * self._next_skip, MOST_SKIPPED)
        else:
            self._next_skip = FIRST_SKIP

    def sent(self, size: int, now: float) -> None:
        """``size`` bytes are on their way."""
        # All is acknowledged that will be: it was idle, unless the codec is what the way waits for.
        if self._under_way < ACKNOWLEDGED and now - self._last > PAUSE:
            self._begin(now)
        self._under_way += size
        self._last = now

    def acknowledged(self, size: int, now: float) -> bool:
        """The other side has ``size`` bytes more; False if they were never sent."""
        if size > self._under_way:
            return False
        self._under_way -= size
        self._sampled += size
        if self._sampled >= SAMPLE:
            self._judge(max(now - self._since, 1e-6))
            self._begin(now)
        return True

    def _begin(self, now: float) -> None:
        self._since, self._sampled, self._busy = now, 0, 0.0

    def _judge(self, seconds: float) -> None:
        self.way = self._sampled / seconds
        if self.is_off:
            self.is_off = 2 * self.way >= self.speed
            self._until_trial = TRIAL_EVERY
        elif 2 * self._busy > seconds and self._until_trial <= 0:
            self.is_off = True
