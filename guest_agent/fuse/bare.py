"""Directories of which the kernel keeps names only, and whose pages to take from it, so that it asks anew. Sans-IO.

Who lists a directory that was read before (by find(1), by a shell that completes a name) reads from the kernel's pages,
and nothing is heard of that. Of pages with names only each file is then looked up, one message each (``ls -l``, rsync,
du), where a page of READDIRPLUS brings two dozen with all that is wanted. They cannot be made better, only dropped.

So a few names that are looked up in such a directory, one after the other, are taken for somebody who looks at all
files: for this directory it is too late (but for what is behind its first piece), and the pages of those that come next
are dropped. Who then reads one of them was foreseen, and twice as many are dropped from then on; who looks up names in
it without reading it (git status has them in its index) was not, and half as many. A drop in vain costs the next find
two or three messages, so a program that looks at a few files here and there costs next to nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

FEW: Final = 3
"""Lookups in a directory that make a walk. One with fewer names costs no more lookups than pages."""

FEWEST: Final = 1
USUAL: Final = 8
MOST: Final = 64
"""Directories whose pages are dropped for each one that somebody comes to."""

MAX_KEPT: Final = 65_536
"""Directories that are remembered, 150 bytes each..."""
MAX_DROPPED: Final = 256
"""...and of those that were dropped, where nobody has come yet."""


class BarePages:
    def __init__(self) -> None:
        self._kept: OrderedDict[int, int] = OrderedDict()
        """By directory, how many more lookups make a walk."""
        self._dropped: OrderedDict[int, None] = OrderedDict()
        self._expected = 0
        """Of which somebody has said that he will read it."""
        self.room = USUAL
        """How many to drop next."""

    def keep(self, node: int, unknown: int) -> None:
        """The kernel has all names of a directory. ``unknown``: of how many it has no more than that."""
        self._dropped.pop(node, None)
        if unknown < FEW:
            self._kept.pop(node, None)
            return
        self._kept[node] = FEW
        self._kept.move_to_end(node)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def forget(self, nodes: Iterable[int]) -> None:
        """Of these the kernel keeps nothing any more."""
        for node in nodes:
            self._kept.pop(node, None)
            self._dropped.pop(node, None)
            if node == self._expected:
                self._expected = 0

    def looked_up(self, node: int) -> bool:
        """A name of the directory is looked up: whether that makes a walk, which goes on to others."""
        if (left := self._kept.get(node)) is None:
            if node in self._dropped:
                del self._dropped[node]
                self.room = max(self.room // 2, FEWEST)
            return False
        if left > 1:
            self._kept[node] = left - 1
            return False
        del self._kept[node]
        return True

    def expect(self, node: int) -> None:
        """Somebody says that he will read the directory, if names are kept of it, and look at all of its files."""
        if self._kept.pop(node, None) is not None:
            self._expected = node

    def is_foreseen(self, node: int) -> bool:
        """Whether somebody who reads the directory now was."""
        return node in self._dropped or node == self._expected

    def came(self, node: int) -> bool:
        """He reads it: whether he is taken to go on to others."""
        if node == self._expected:
            self._expected = 0
            return False
        del self._dropped[node]
        self.room = min(2 * self.room, MOST)
        return True

    def drop(self, nodes: Iterable[int], most: int = MOST) -> list[int]:
        """Of directories that somebody may come to next, in that order, those whose pages are to be dropped."""
        taken: list[int] = []
        for node in nodes:
            if len(taken) >= min(self.room, most):
                break
            if node in self._kept:
                del self._kept[node]
                self._dropped[node] = None
                taken.append(node)
        while len(self._dropped) > MAX_DROPPED:
            self._dropped.popitem(last=False)
        return taken
