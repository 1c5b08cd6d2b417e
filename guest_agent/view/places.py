"""What there is to see: volumes, containers' root filesystems, images, homes, each a place with a path in the view.

Pure. The laws:
- A path in the view is made of components that can be names of files; what cannot is not shown.
- No place lies in another one: of two that would, the one that was found first is there.
- Read-write is what people keep their data in: volumes, homes, and the root filesystem of a container that runs, which
  is what ``docker cp`` writes to. Layers that several containers stand on are read-only.

What dockerd says has the form of its API (Docker Engine API, ContainerList and the like); podman's is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from protocol.files import MAX_NAME

MAX_PLACES: Final = 512
"""Of each there is a thread here, and 300 bytes in a message; a machine with more volumes than that shows the first."""

MAX_PATH: Final = 400
"""Bytes of a path in the view: all of them fit into one message."""

RUNNING: Final = frozenset({"running", "paused", "restarting"})
"""States in which a container's root filesystem is mounted."""


@dataclass(frozen=True, slots=True)
class Place:
    """``path`` is that in the view, which begins with a slash. ``source`` is the directory here, or ``layers`` are
    those that are to be seen as one, the uppermost first. ``inherit``: what is made there belongs to the owner of the
    root. ``hidden`` are directories that are shown empty."""

    path: str
    source: str = ""
    layers: tuple[str, ...] = ()
    read_only: bool = True
    inherit: bool = False
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """Where a container or an image has its files: ``merged`` while it is mounted."""

    merged: str = ""
    stacked: tuple[str, ...] = ()


def path_of(*words: str) -> str | None:
    """The path in the view; None if something of it is no name. A word may have several components."""
    components = [component for word in words for component in word.split("/")]
    if not all(is_name(component) for component in components):
        return None
    path = "/" + "/".join(components)
    return path if len(path.encode(errors="surrogateescape")) <= MAX_PATH else None


def is_name(word: str) -> bool:
    """Whether a file can be called that."""
    encoded = word.encode(errors="surrogateescape")
    return 0 < len(encoded) <= MAX_NAME and word not in (".", "..") and "/" not in word and "\0" not in word


def arranged(places: Iterable[Place]) -> list[Place]:
    """Those that are shown, in their order: none in another one, and no more than ``MAX_PLACES``."""
    taken: set[str] = set()
    above: set[str] = set()
    chosen: list[Place] = []
    for place in places:
        ways = list(_ways(place.path))
        if place.path in taken or place.path in above or any(way in taken for way in ways):
            continue
        taken.add(place.path)
        above.update(ways)
        chosen.append(place)
        if len(chosen) == MAX_PLACES:
            break
    return chosen


def _ways(path: str) -> Iterator[str]:
    """What is above it, but for the root."""
    while path := path.rpartition("/")[0]:
        yield path


# --- what dockerd says -----------------------------------------------------------------------------------


def volumes(listed: Any) -> list[Place]:
    """Of VolumeList's answer. Raises what a wrong answer makes Python raise (``MALFORMED``)."""
    places = []
    for volume in listed.get("Volumes") or ():
        path = path_of("volumes", volume["Name"])
        if path is not None and volume.get("Mountpoint"):
            places.append(Place(path, volume["Mountpoint"], read_only=False, inherit=True))
    return places


MALFORMED: Final = (ValueError, TypeError, LookupError, AttributeError)


def layers(inspected: Mapping[str, Any]) -> Layers:
    """Of ContainerInspect's or ImageInspect's answer; empty if they are not directories here."""
    driver = inspected.get("GraphDriver") or {}
    data = driver.get("Data") or {}
    upper = data.get("UpperDir") or ""
    if not str(driver.get("Name", "")).startswith(("overlay", "fuse-overlayfs")) or not upper:
        return Layers()
    lower = [layer for layer in (data.get("LowerDir") or "").split(":") if layer]
    return Layers(str(data.get("MergedDir") or ""), (upper, *lower))


def container(listed: Mapping[str, Any], found: Layers, mounted: str) -> Place | None:
    """One of ContainerList's; ``mounted`` is where its root filesystem is mounted now, "" if it is nowhere."""
    names = listed.get("Names") or [listed["Id"][:12]]
    path = path_of("containers", names[0].removeprefix("/"))
    if path is None:
        return None
    if mounted:
        return Place(path, mounted, read_only=False, inherit=True)
    return _stacked(path, found)


def image(tag: str, found: Layers) -> Place | None:
    """An image by one of its names, of which a registry, a path and a tag are components and the end of one."""
    path = path_of("images", tag)
    return None if path is None else _stacked(path, found)


def _stacked(path: str, found: Layers) -> Place | None:
    match found.stacked:
        case ():
            return None
        case (only,):
            return Place(path, only)
        case several:
            return Place(path, layers=several)
