"""From a path to a number: which names of the guest's are known, for how long, and what they mean.

libfuse tells us paths, the guest wants the nodes that it gave out. Pure but for the clock.

The laws:
- A name is good for ``NAME_TIME``, as long as the kernel believes us; then it is looked up again.
- A node is held by the names and the open files that need it. When it is held by none its lookups are given back.
- What was known of a guest's process ends with that (``forget_all``).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

NAME_TIME: Final = 1.0
"""Seconds. libfuse's own default for what the kernel may keep."""

MAX_NAMES: Final = 32_768
"""Each has 400 bytes here and a descriptor of the guest's, which closes those it has no room for."""

MAX_LISTED: Final = 16_384
"""Attributes that came with a listing, for the lookups that follow it at once."""


class Key(NamedTuple):
    """A name in a directory of a place."""

    place: int
    directory: int
    name: bytes


class _Name(NamedTuple):
    node: int
    until: float


class _Held:
    __slots__ = ("lookups", "uses")

    def __init__(self) -> None:
        self.lookups = self.uses = 0


class Lookups:
    """What one mount knows. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_names: int = MAX_NAMES) -> None:
        self._clock = clock
        self._max_names = max_names
        self._names: OrderedDict[Key, _Name] = OrderedDict()
        self._held: dict[tuple[int, int], _Held] = {}
        self._attributes: OrderedDict[Key, tuple[bytes, float]] = OrderedDict()
        self._keys: dict[tuple[int, int], Key] = {}
        self._released: dict[int, dict[int, int]] = {}

    # --- names ---------------------------------------------------------------------------------------

    def find(self, key: Key) -> int | None:
        """The node of a name that is good yet."""
        found = self._names.get(key)
        if found is None or found.until < self._clock():
            return None
        self._names.move_to_end(key)
        return found.node

    def enter(self, key: Key, node: int, attr: bytes) -> None:
        """The guest has said so, and counted a lookup."""
        held = self._held.setdefault((key.place, node), _Held())
        held.lookups += 1
        held.uses += 1
        self._drop_name(key)
        self._names[key] = _Name(node, self._clock() + NAME_TIME)
        self._keys[key.place, node] = key
        self.remember(key, attr)
        while len(self._names) > self._max_names:
            self._drop_name(next(iter(self._names)))

    def gone(self, key: Key) -> None:
        """The name is something else now, or nothing."""
        self._drop_name(key)
        self._attributes.pop(key, None)

    def _drop_name(self, key: Key) -> None:
        if (old := self._names.pop(key, None)) is not None:
            self.release(key.place, old.node)

    # --- nodes ---------------------------------------------------------------------------------------

    def hold(self, place: int, node: int) -> None:
        """An open file needs it."""
        if (held := self._held.get((place, node))) is not None:
            held.uses += 1

    def release(self, place: int, node: int) -> None:
        held = self._held.get((place, node))
        if held is None:  # of a guest's process that has ended
            return
        held.uses -= 1
        if held.uses == 0:
            del self._held[place, node]
            self._keys.pop((place, node), None)
            of_place = self._released.setdefault(place, {})
            of_place[node] = of_place.get(node, 0) + held.lookups

    @property
    def released(self) -> int:
        """How many nodes are to be given back."""
        return sum(map(len, self._released.values()))

    def take_released(self) -> dict[int, dict[int, int]]:
        """Of each place the nodes to be given back, and their lookups. They are told of once."""
        released, self._released = self._released, {}
        return released

    def forget_place(self, place: int) -> None:
        """It is not there any more."""
        for key in [key for key in self._names if key.place == place]:
            self.gone(key)
        self._released.pop(place, None)

    def forget_all(self) -> None:
        """The numbers mean nothing any more."""
        for table in (self._names, self._held, self._attributes, self._keys, self._released):
            table.clear()

    # --- attributes ----------------------------------------------------------------------------------

    def remember(self, key: Key, attr: bytes) -> None:
        """They are of now; for the lookup that follows."""
        self._attributes.pop(key, None)
        self._attributes[key] = attr, self._clock() + NAME_TIME
        if len(self._attributes) > MAX_LISTED:
            self._attributes.popitem(last=False)

    def recall(self, key: Key) -> bytes | None:
        found = self._attributes.get(key)
        if found is None:
            return None
        attr, until = found
        if until < self._clock():
            del self._attributes[key]
            return None
        return attr

    def attributes_of(self, place: int, node: int) -> bytes | None:
        """What is remembered of a file, by the name that it was last found by."""
        key = self._keys.get((place, node))
        return None if key is None else self.recall(key)

    def changed(self, place: int, node: int) -> None:
        """We have changed the file."""
        if (key := self._keys.get((place, node))) is not None:
            self._attributes.pop(key, None)
