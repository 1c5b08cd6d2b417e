"""What carries the control link of a VM, and when: virtio-serial, or SSH while that is lost. Sans-IO.

The laws: virtio-serial is what a VM has, and SSH never replaces a session on it; nothing of SSH is tried before the
port has been silent for longer than an agent takes to be there again; and neither of the two is changed for the other
over and over. Times are seconds of a clock that only goes forward, and each method is told what it shows.
"""

from __future__ import annotations

import math
from typing import Final

from protocol.api import Transport

#: Without a session for so long, the port is lost. An agent that was killed is back in under 1 s, and in 5 to 8 s in an
#: emulated guest; so this is half as much again. A session on a port that falls silent takes 20 s to notice, before.
LOST_AFTER: Final = 12.0

#: Before SSH is tried again, the first time and at the most. An attempt costs the guest a login.
FIRST_PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 120.0

#: A session that was so long is no part of a series of bad ones.
STEADY: Final = 60.0

#: A port that was lost again within ``STEADY`` of its return is left alone for so long the next time, and at the most:
#: each change ends all connections.
FIRST_PROBATION: Final = 60.0
LONGEST_PROBATION: Final = 960.0


class ControlPath:
    """Is told of sessions and attempts; says when to try SSH, and from when on virtio-serial may have the link."""

    def __init__(self) -> None:
        self.transport = Transport.NONE
        self.changed_at = -math.inf
        """Since when ``transport`` carries it."""
        self.reason = ""
        """Why it is not virtio-serial, as a clause."""
        self.problem = self.hint = ""
        """Why it is not SSH either."""
        self.attempts = 0
        self.watched = False
        """Whether there should be sessions."""
        self._try_at = math.inf
        self._pause = FIRST_PAUSE
        self._probation = 0.0
        self._before = Transport.NONE  # what carried it last
        self._returned = False  # virtio-serial has it again, after SSH

    def watch(self, now: float) -> None:
        """There is a VM whose boot is done: from now on there should be sessions."""
        self.watched = True
        if self.transport is Transport.NONE:
            self._lost(now, self.reason or "the VM's port has not answered")

    def rest(self) -> None:
        """The VM is being stopped: sessions may end."""
        self.watched = False

    def session(self, transport: Transport, now: float) -> None:
        """A session has begun."""
        self._returned = transport is Transport.VIRTIO_SERIAL and self._before is Transport.SSH
        self.transport, self.changed_at = transport, now
        self.problem = self.hint = ""
        self.attempts = 0
        if transport is Transport.VIRTIO_SERIAL:
            self.reason = ""
            self._pause = FIRST_PAUSE

    def session_over(self, reason: str, now: float) -> None:
        """It has ended; ``reason`` is a clause."""
        lasted = now - self.changed_at
        self._before, self.transport = self.transport, Transport.NONE
        if self._before is not Transport.SSH:
            short = self._returned and lasted < STEADY
            self._probation = (
                min(max(FIRST_PROBATION, 2 * self._probation), LONGEST_PROBATION) if short else 0.0
            )
            self._lost(now, reason)
            return
        self.changed_at = self._try_at = now
        if lasted < STEADY:
            self._delay(now)
        else:
            self._pause = FIRST_PAUSE

    def failed(self, problem: str, hint: str, now: float) -> None:
        """SSH was tried, and is no way now."""
        self.problem, self.hint = problem, hint
        self.attempts += 1
        self._delay(now)

    def put_off(self, now: float) -> None:
        """SSH could not be tried, and that says nothing of it: the VM stands still."""
        self._try_at = now + FIRST_PAUSE

    @property
    def try_at(self) -> float:
        """When to try SSH; infinity: not."""
        return self._try_at if self.watched and self.transport is Transport.NONE else math.inf

    @property
    def port_from(self) -> float:
        """From when on virtio-serial may have the link. At once, if nothing else has it."""
        on_ssh = self.transport is Transport.SSH
        return self.changed_at + self._probation if on_ssh and self._probation else -math.inf

    @property
    def hopeless(self) -> bool:
        """Nobody has to wait for a session: neither way works."""
        return self.transport is Transport.NONE and self.attempts > 0

    def _lost(self, now: float, reason: str) -> None:
        self.changed_at, self.reason = now, reason
        self._try_at = now + LOST_AFTER

    def _delay(self, now: float) -> None:
        self._try_at = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
