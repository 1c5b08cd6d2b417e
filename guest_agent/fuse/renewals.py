"""Names that were something else a moment ago, and what they are now, as the host has told it (``Renewed``).

Each counts a lookup on the host, which is the kernel's once it has asked for the name, and is given back if the name,
or what it stands for, changes before. Sans-IO.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

from protocol.files import Changed

MAX_HELD: Final = 64
"""Names; the oldest go."""


class Known(NamedTuple):
    """What a name stands for, and its attributes; all of it promised."""

    node: int
    attr: bytes


class Renewals:
    """Of one mount. ``give_back`` takes the nodes of which one lookup each is not used."""

    def __init__(self, give_back: Callable[[Sequence[int]], None]) -> None:
        self._give_back = give_back
        self._names: OrderedDict[tuple[int, bytes], Known] = OrderedDict()

    def add(self, directory: int, name: bytes, known: Known) -> None:
        """The host has counted a lookup."""
        self._drop((directory, name))
        self._names[directory, name] = known
        if len(self._names) > MAX_HELD:
            self._drop(next(iter(self._names)))

    def take(self, directory: int, name: bytes) -> Known | None:
        """For the kernel, which then has the lookup."""
        return self._names.pop((directory, name), None) if self._names else None

    def changed(self, changed: Changed) -> None:
        """The host says so. What is in a directory that has changed may be something else by now, and the directory
        itself, by its own name, has other attributes."""
        if self._names:
            directories = {*changed.parents, *changed.directories}
            self._drop_all(directories, {*directories, *changed.nodes, *changed.attributes_only})

    def drop(self, *nodes: int) -> None:
        """The guest has changed what names stand for."""
        if self._names:
            self._drop_all((), nodes)

    def void(self) -> None:
        """Nothing is promised any more, or the guest has changed names, of which these may be others."""
        for key in list(self._names):
            self._drop(key)

    def _drop_all(self, directories: Collection[int], nodes: Collection[int]) -> None:
        for key, known in list(self._names.items()):
            if key[0] in directories or known.node in nodes:
                self._drop(key)

    def _drop(self, key: tuple[int, bytes]) -> None:
        if (known := self._names.pop(key, None)) is not None:
            self._give_back((known.node,))
