"""The second half of a stat(2) of which nothing is promised.

The kernel looks the name up, holds what it is told of attributes for out of date, and asks for them at once. What the
same thread asks within a tick of its LOOKUP (4 ms) is part of the same system call, so the answer that this got is
right: it was read after the call had begun. It is given once, and not if anything was changed or heard of meanwhile,
whatever it was about.

It halves the messages of ``ls -l`` and ``git status`` where nothing can be promised: on a network filesystem of the
host, or beyond the number of files that its kernel watches.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from protocol.files import Changed

TICK: Final = 0.004
"""Seconds, as for a directory's attributes."""

MAX_LOOKED: Final = 256
"""Nodes; beyond as many in one tick the oldest are asked for."""


class Looked:
    """What LOOKUP has said, by node."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: OrderedDict[int, tuple[int, float, bytes]] = OrderedDict()
        self.changes = 0
        """How often something was changed or heard of; to be passed to ``remember`` as of when it was asked."""

    def remember(self, thread: int, node: int, attr: bytes, changes: int) -> None:
        """``thread`` is about to be told ``attr`` of ``node``. 0 is nobody that is known."""
        if thread and changes == self.changes:
            self._said[node] = thread, self._clock() + TICK, attr
            self._said.move_to_end(node)
            if len(self._said) > MAX_LOOKED:
                self._said.popitem(last=False)

    def take(self, thread: int, node: int) -> bytes | None:
        """What is still right of the node for this thread, once."""
        said = self._said.pop(node, None)
        if said is None or said[0] != thread or self._clock() > said[1]:
            return None
        return said[2]

    def changed(self, changed: Changed) -> None:
        self.void()

    def drop(self, *nodes: int) -> None:
        self.void()

    def void(self) -> None:
        """Something is not what it was."""
        self.changes += 1
        self._said.clear()
