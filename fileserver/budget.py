"""How many descriptors the shares of this process may keep open, together.

A process that has as many open as it may can do nothing more: not even look whether a share's root is still there. The
laws:
- Every share may keep its part, and the parts of all together leave room for what is open for a moment only.
- Where there are none left nevertheless, all shares give some back, not only the one that met it: it may have none.
"""

from __future__ import annotations

import logging
import resource
import threading
from typing import Final, Protocol

logger = logging.getLogger(__name__)

MOST_NODES: Final = 16384
"""Descriptors of a share by which its files are found: beyond this, a walk costs no more than the table's memory."""

FEWEST: Final = 16
"""Of each kind, for every share."""


def raise_limit() -> None:
    """Have as many as this process may; before there is a ``Budget``, which goes by that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # macOS calls a limit "infinity" that it does not grant
            logger.warning("only %d descriptors: %s", soft, error)


class Member(Protocol):
    """What keeps descriptors. Both are called by any thread, without a lock of the member's."""

    def shed(self) -> None:
        """Give half of them back."""

    def trim(self) -> None:
        """There is one more member: keep no more than its part."""


class Budget:
    """Half of ``limit`` (default: RLIMIT_NOFILE) is for the nodes, those with a name and those without one; an eighth
    for data, an eighth for locks, and the last quarter for what is open while a call is done, sockets and the journal.
    The members have equal parts of each, but none gets more than half of it, so that the second takes nothing away."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit or resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._lock = threading.Lock()
        self._members: list[Member] = []

    def _part(self, of: int) -> int:
        return max(FEWEST, self._limit // of // max(2, len(self._members)))

    @property
    def nodes(self) -> int:
        """Of one share: by which files with a name are held; and as many that hold files without one."""
        return min(MOST_NODES, self._part(4))

    @property
    def data(self) -> int:
        """Of one share: open for data."""
        return self._part(8)

    @property
    def locks(self) -> int:
        """Of one share: open for a lock on the host."""
        return self._part(8)

    def join(self, member: Member) -> None:
        with self._lock:
            others = list(self._members)
            self._members.append(member)
        for other in others:
            other.trim()

    def leave(self, member: Member) -> None:
        with self._lock:
            if member in self._members:
                self._members.remove(member)

    def shed(self) -> None:
        """The process has run out of descriptors."""
        with self._lock:
            members = list(self._members)
        for member in members:
            member.shed()
