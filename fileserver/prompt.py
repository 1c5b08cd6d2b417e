"""Calls that are done at once, in trio's thread, instead of by a thread of their share.

To hand a call to a thread and its answer back costs twice what a small call does. The laws:
- Only what asks little of the host's kernel is done so (``KINDS``, ``MAX_PAYLOAD``): no fsync(2), no listings, nothing
  that frees the blocks of a file, and nothing that waits for a program of the host (``workers.waiting``).
- A share that hangs holds up nobody else. So it is on a local disk, with nothing mounted below it, and no other share
  is on another disk; or it is in memory. All others have their threads.
- While a thread does something for the share, so do threads for the rest of it: what a call may have to wait for could
  be held by one that waits for the disk.
- A disk that is slow now is left to the threads: after a call that waited and took ``SLOW`` or longer, for ``PAUSE``
  times as long. So slow disks have a twentieth of trio's time at the most.
"""

from __future__ import annotations

import resource
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from fileserver.devices import is_memory, tells
from protocol.files import (
    SET_SIZE,
    Create,
    FileCall,
    GetAttributes,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    ReadLink,
    RemoveDirectory,
    Rename,
    SetAttributes,
    Unlink,
    Write,
)

ShareT = TypeVar("ShareT", bound=Hashable)

KINDS: Final[frozenset[type]] = frozenset(
    {
        Create,
        GetAttributes,
        Lookup,
        MakeDirectory,
        MakeLink,
        MakeNode,
        MakeSymlink,
        ReadLink,
        RemoveDirectory,
        Rename,
        SetAttributes,
        Unlink,  # the blocks go when the guest forgets the file
        Write,
    }
)

MAX_PAYLOAD: Final = 64 << 10
"""Bytes that are written at once: 10 us of copying."""

SLOW: Final = 0.005
"""Seconds. A small call takes 0.1 ms; as much as this it takes if it waits for a disk, or if there is no processor for
it, which no thread would change."""

PAUSE: Final = 20


@dataclass(frozen=True, slots=True, eq=False)
class Disk:
    """What a shared folder is on: st_dev, and f_type of statfs(2). Each time that is looked at makes another one,
    so the same object is the same folder."""

    device: int
    filesystem: int

    @property
    def is_memory(self) -> bool:
        return is_memory(self.filesystem)


def waits() -> int:
    """How often the calling thread has waited for something, but for a processor (getrusage(2)); costs 0.5 us."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def is_small(call: FileCall[object], payload: bytes | memoryview) -> bool:
    """Whether the call asks so little that it may be done at once."""
    kind = type(call)
    if kind not in KINDS or len(payload) > MAX_PAYLOAD:
        return False
    return not (isinstance(call, SetAttributes) and call.valid & SET_SIZE)


def harmless(disks: Mapping[ShareT, Disk | None]) -> set[ShareT]:
    """The shares that hold up nobody else when they hang. None: nobody knows what such a share is on."""
    places = {
        None if disk is None else disk.device for disk in disks.values() if not (disk and disk.is_memory)
    }
    return {
        share
        for share, disk in disks.items()
        if disk is not None and tells(disk.filesystem) and (disk.is_memory or len(places) == 1)
    }
