"""How much room the host's filesystem has, kept for a moment.

find(1), and whatever walks a tree with fts(3), asks statfs(2) once for what kind of filesystem it is on, and df(1) for
what is free. Of a host that is far away each waits for an answer that changes all the time and is old when it comes.

The law: what is given is at most ``KEPT`` seconds older than it would be, and nothing of before the guest's last own
change, or one that the host has told of: who removes a file and asks what is free is told of that. Sans-IO.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from protocol.files import Changed

KEPT: Final = 1.0


class Room:
    """Of one mount."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answer = b""
        self._until = 0.0
        self.changes = 0
        """How often something has changed; to be passed to ``keep`` as of when it was asked."""

    def keep(self, answer: bytes, changes: int) -> None:
        if changes == self.changes:
            self._answer, self._until = answer, self._clock() + KEPT

    def known(self) -> bytes | None:
        """The answer to a STATFS; None: the host must be asked."""
        return self._answer if self._answer and self._clock() < self._until else None

    def changed(self, changed: Changed) -> None:
        self.void()

    def drop(self, *nodes: int) -> None:
        self.void()

    def void(self) -> None:
        """Something was changed, or heard of."""
        self.changes += 1
        self._answer = b""
