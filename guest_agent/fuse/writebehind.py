"""Writes that are answered before the host has them (write-behind).

Who writes a file piece by piece would wait for the host's answer to each. So the first write of a burst is waited for,
and those that follow are answered once they are on their way, in order: the host does what comes behind them, and could
tell, after them. The laws:

- **Nothing is answered for that this process could lose.** A write is answered when its frame has left whole, so that
  it arrives even if this process is killed; or, while another one is on its way, when it is where a successor finds it
  (``spool``), and then leaves with the host's next answer. It is asked again, as it was, until it is answered.
- **Nothing is answered for that the host has no room for.** It says with each write how many bytes the guest may answer
  for (``Written.room``), and which those are it knows by its answers. What fails all the same (a quota, a broken disk)
  the next write(2) or fsync(2) of the file is told, once; and the kernel forgets what it has of the file.
- A file's first write is waited for, unless the guest has just made the file, and so is one ``BURST`` seconds after the
  last, or after the host has said that the file has changed: what can be refused is refused there.
- ``MAX_CALLS`` and ``MAX_BYTES`` of one mount are on their way at the most: what a host does in some milliseconds.
- While one of a file is, nothing is believed of it that the host says without being asked.
- Nobody outside hears from a program of the guest what it does after a write before that is on the host (``fence``).

Sans-IO.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from protocol.files import Changed, Written

BURST: Final = 0.02
"""Seconds: a few round trips of an emulated guest."""

MAX_CALLS: Final = 64
MAX_BYTES: Final = 8 << 20

MAX_FILES: Final = 1024
"""Of which it is known when they were last written, and as many of which a write has failed."""

_WAITS: Final = os.O_SYNC | os.O_DSYNC | os.O_DIRECT
"""Flags of open(2) by which a program asks to wait."""


class WriteBehind:
    """Of one mount. ``clock``: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._written: OrderedDict[int, float] = OrderedDict()
        """By node, when the host has last taken a write of it."""
        self._failed: OrderedDict[int, int] = OrderedDict()
        """By node, the errno of what was answered for and is lost."""
        self._under_way: dict[int, int] = {}
        """By node, how many writes are answered for that the host has not answered."""
        self._room = 0
        self._calls = self._bytes = 0

    # --- before a write --------------------------------------------------------------------------------

    def take_error(self, node: int) -> int:
        """The errno of an earlier write that is lost, once; 0: none is."""
        return self._failed.pop(node, 0) if self._failed else 0

    def may(self, node: int, size: int, flags: int) -> bool:
        """Whether a write of ``size`` bytes may be answered before the host has it. ``flags``: open(2)'s."""
        written = self._written.get(node)
        return (
            written is not None
            and self._calls < MAX_CALLS
            and self._bytes + size <= min(MAX_BYTES, self._room)
            and not flags & _WAITS
            and (node in self._under_way or self._clock() - written < BURST)
        )

    # --- one that is answered ahead --------------------------------------------------------------------

    def begin(self, node: int, size: int) -> None:
        """It is on its way, and about to be answered; ``end`` follows."""
        self._calls += 1
        self._bytes += size
        self._under_way[node] = self._under_way.get(node, 0) + 1

    def end(self, node: int, size: int) -> None:
        """The host has answered it."""
        self._calls -= 1
        self._bytes -= size
        if left := self._under_way[node] - 1:
            self._under_way[node] = left
        else:
            del self._under_way[node]

    def lost(self, node: int, error: int) -> None:
        """It has failed."""
        self.wait_for(node)
        self._failed[node] = error
        if len(self._failed) > MAX_FILES:
            self._failed.popitem(last=False)

    # --- every one -------------------------------------------------------------------------------------

    def took(self, node: int, answer: Written) -> None:
        """The host has taken a write, as it was to be."""
        self._room = answer.room
        self.made(node)

    def made(self, node: int) -> None:
        """The guest has made the file, which is open for writing on the host."""
        self._written[node] = self._clock()
        self._written.move_to_end(node)
        if len(self._written) > MAX_FILES:
            self._written.popitem(last=False)

    def among(self, nodes: Sequence[int]) -> set[int]:
        """Those of ``nodes`` of which a write is under way."""
        return self._under_way.keys() & nodes if self._under_way else set()

    # --- what ends it ----------------------------------------------------------------------------------

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        if self._written:
            self.wait_for(*changed.nodes)

    def wait_for(self, *nodes: int) -> None:
        """The next write of these is to be waited for."""
        for node in nodes:
            self._written.pop(node, None)

    def forgotten(self, nodes: Sequence[int]) -> None:
        """The kernel has forgotten them: nobody has them open."""
        self.wait_for(*nodes)
        for node in nodes:
            self._failed.pop(node, None)

    def void(self) -> None:
        """The session has ended: who serves the next one says anew what there is room for."""
        self._room = 0
        self._written.clear()
