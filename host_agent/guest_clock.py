"""The guest's clock is this machine's: looked at now and then, and at once when either may have jumped.

The law: the guest is told by how much it is off, and how far off it is is known to half of the round trip that asked.
What may only be the message's delay is left alone, and an answer that comes late, from a VM that was stopped
or a machine that slept in between, makes nothing wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from protocol.api import AdjustClock, GuestClock
from protocol.errors import AgentctlProtocolError, ErrorCode, RpcError
from protocol.link import Link

logger = logging.getLogger(__name__)

#: How often the guest is asked, seconds. A VM's clock runs by the host's; what NTP corrects here is 0.5 ms a second
#: at the most, so the guest is never off by more than it tolerates by itself.
INTERVAL = 60.0

#: Between two attempts of which the first had no answer, seconds: a VM that was stopped may need a moment.
RETRY = 1.0

#: How long one answer may take, seconds.
ANSWER_TIME = 5.0

#: A round trip that is good enough to judge by, ns, and how many are tried for one. It takes 0.3 ms with KVM and 4 ms
#: in an emulated VM.
GOOD_NS = 10_000_000
TRIES = 5

#: A guest that is off by no more is left alone, ns.
FINE_NS = 2_000_000

#: What the guest does not make up for but jumps over, ns; that is told. So says ``AdjustClock``.
JUMP_NS = 100_000_000

#: A jump is looked at again, so often at the most: the host's clock may be set once more meanwhile.
ROUNDS = 3

#: How far the wall clock may be from the monotonic one over a round trip before it was set in between, ns.
_SET_NS = 1_000_000

#: What the kernel's clock can show at the most: the year 2262.
_LAST_NS = 1 << 63


@dataclass(frozen=True, slots=True)
class Reading:
    """The guest's clock is ``ahead_ns`` of the host's, give or take ``within_ns``."""

    ahead_ns: int
    within_ns: int

    @property
    def fine(self) -> bool:
        """Nothing that can be known is wrong."""
        return abs(self.ahead_ns) <= max(self.within_ns, FINE_NS)


@dataclass(frozen=True, slots=True)
class Moment:
    """The host's clocks at once, ns."""

    wall: int
    monotonic: int

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time_ns(), time.monotonic_ns())


def reading(asked: Moment, answered: Moment, guest_ns: int) -> Reading | None:
    """What an answer says that the guest gave at some moment between the two; None if the host's clock was set."""
    took = answered.monotonic - asked.monotonic
    if abs(answered.wall - asked.wall - took) > _SET_NS:
        return None
    return Reading(guest_ns - (answered.wall - took // 2), took // 2)


class ClockKeeper:
    """Keeps the guest's clock right. ``now`` is asked for the host's clocks, ``say`` told of jumps (kind, message)."""

    def __init__(
        self,
        link: Callable[[], Link | None],
        say: Callable[[str, str], None],
        now: Callable[[], Moment] = Moment.now,
    ) -> None:
        self._link = link
        self._say = say
        self._now = now
        self._asked = trio.Event()

    def look(self) -> None:
        """Look at the clock now: it may be wrong, or there is a new session."""
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._asked = trio.Event()
            link = self._link()
            settled = link is None or await self._settled(link)
            with trio.move_on_after(INTERVAL if settled else RETRY):
                await self._asked.wait()

    async def _settled(self, link: Link) -> bool:
        """Whether the clock is right now, or there is no use in asking again soon."""
        try:
            await self._correct(link)
        except RpcError as error:
            logger.info("the guest's clock could not be looked at: %s", error)
            return error.code is not ErrorCode.TIMEOUT
        except AgentctlProtocolError as error:
            logger.info("the guest's clock could not be looked at: %s", error)
        return True  # the next session begins with a look

    async def _correct(self, link: Link) -> None:
        for _ in range(ROUNDS):
            found = await self._measure(link)
            if found is None or found.fine:
                return
            await link.request(AdjustClock(-found.ahead_ns), timeout=ANSWER_TIME)
            if abs(found.ahead_ns) <= JUMP_NS:
                logger.info("the guest's clock was %.1f ms ahead", found.ahead_ns / 1e6)
                return
            seconds = abs(found.ahead_ns) / 1e9
            where = "ahead" if found.ahead_ns > 0 else "behind"
            self._say("clock", f"the VM's clock was {seconds:.1f} s {where}; it was set right")

    async def _measure(self, link: Link) -> Reading | None:
        """The best of some readings; None if the host's clock was set each time."""
        best: Reading | None = None
        for _ in range(TRIES):
            asked = self._now()
            answer: GuestClock = await link.request(AdjustClock(), timeout=ANSWER_TIME)
            if not 0 <= answer.now_ns < _LAST_NS:
                # A guest may say anything; the difference must be a number that can be sent.
                raise RpcError(ErrorCode.PROTOCOL, f"{answer.now_ns} is no time")
            found = reading(asked, self._now(), answer.now_ns)
            if found is not None and (best is None or found.within_ns < best.within_ns):
                best = found
            if best is not None and best.within_ns * 2 <= GOOD_NS:
                break
        return best
