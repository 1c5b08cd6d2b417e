"""The view's upper directories: what is above the places that the guest tells of.

Pure. The law: the guest is not believed. A place's path is made of names, nothing of it leads elsewhere, none lies in
another one, and their number is bounded; what is not so is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from protocol.files import MAX_NAME, Share

MAX_PLACES: Final = 4096

MAX_PATHS: Final = 192 << 10
"""Bytes of all paths together: what the view shows is told in one message, as it came in one."""

MAX_DEPTH: Final = 16
"""Components of a place's path; images have registries, and paths in them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tree of the guest's: its number, and the components of its path here."""

    number: int
    path: tuple[bytes, ...]
    read_only: bool


@dataclass(slots=True)
class Directory:
    """One that is only here: its entries by name, in the order in which they were told of."""

    entries: dict[bytes, Directory | Place] = field(default_factory=dict)


class Tree:
    """All places. Replaced as a whole."""

    def __init__(self, shares: Iterable[Share] = ()) -> None:
        self.root = Directory()
        self.places: list[Place] = []
        numbers: set[int] = set()
        room = MAX_PATHS
        for share in shares:
            path = components(share.path)
            if path is None or share.id in numbers or share.id <= 0 or len(self.places) == MAX_PLACES:
                continue
            room -= sum(map(len, path)) + len(path)
            place = Place(share.id, path, share.read_only)
            if room >= 0 and self._enter(place):
                numbers.add(share.id)
                self.places.append(place)

    def _enter(self, place: Place) -> bool:
        """False where it would hide another, or lie in one."""
        way: list[tuple[Directory, bytes, Directory]] = []
        here = self.root
        for name in place.path[:-1]:
            below = here.entries.get(name)
            if isinstance(below, Place):
                return False
            if below is None:
                below = Directory()
                way.append((here, name, below))
            here = below
        if place.path[-1] in here.entries:
            return False
        here.entries[place.path[-1]] = place
        for directory, name, below in way:
            directory.entries[name] = below
        return True

    def find(self, path: bytes) -> tuple[Directory | Place, tuple[bytes, ...]] | None:
        """What ``path`` (absolute) is in, and the components that are left, which only a place has; None if nothing."""
        here: Directory | Place = self.root
        names = [name for name in path.split(b"/") if name]
        for at, name in enumerate(names):
            if isinstance(here, Place):
                return here, tuple(names[at:])
            below = here.entries.get(name)
            if below is None:
                return None
            here = below
        return here, ()


def components(path: str) -> tuple[bytes, ...] | None:
    """Of a path that the guest gave; None if it is none."""
    encoded = path.encode(errors="surrogateescape")
    if not encoded.startswith(b"/"):
        return None
    names = tuple(encoded[1:].split(b"/"))
    return names if len(names) <= MAX_DEPTH and all(map(is_name, names)) else None


def is_name(name: bytes) -> bool:
    """Whether it is one component, and leads nowhere else."""
    return 0 < len(name) <= MAX_NAME and name not in (b".", b"..") and b"/" not in name and b"\0" not in name
