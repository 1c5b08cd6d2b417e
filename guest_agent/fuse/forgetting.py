"""Gives lookups back to the host, many at a time.

The kernel forgets a node at each unlink(2), and thousands when memory is short; a call for each would
double what removing a tree costs. Late is harmless: a forgotten node costs the host some memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final, Protocol

from guest_agent.fuse.operation import Timers
from protocol.files import FileCall, Forget

DELAY: Final = 0.05
"""Seconds that the first waits for others."""

MAX_BATCH: Final = 4096
"""Nodes in one call: at most 14 bytes each, 56 KiB of the 256 KiB that a header may have."""


class Teller(Protocol):
    def tell(self, call: FileCall[Any]) -> None: ...


def fresh_uniques() -> Iterator[int]:
    """For calls that serve no request of the kernel's: apart from all of those (which are below 2^62, see
    ``volume``), and from those of a predecessor, in all likelihood."""
    return count((1 << 62) + int.from_bytes(os.urandom(7), "big"))


class Forgets:
    """What the kernel has forgotten of one share and the host has not been told."""

    def __init__(self, host: Teller, share: int, timers: Timers, uniques: Iterator[int]) -> None:
        self._host = host
        self._share = share
        self._timers = timers
        self._uniques = uniques
        self._counts: Counter[int] = Counter()

    def add(self, node: int, lookups: int) -> None:
        if not self._counts:
            self._timers.after(DELAY, self.flush)
        self._counts[node] += lookups

    def add_all(self, nodes: Sequence[int]) -> None:
        """One lookup of each."""
        if not self._counts:
            self._timers.after(DELAY, self.flush)
        self._counts.update(nodes)

    def flush(self) -> None:
        """Tell the host now."""
        nodes, counts = list(self._counts), list(self._counts.values())
        self._counts.clear()
        for start in range(0, len(nodes), MAX_BATCH):
            part = slice(start, start + MAX_BATCH)
            self._host.tell(Forget(self._share, next(self._uniques), 0, nodes[part], counts[part]))
