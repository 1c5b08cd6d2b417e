"""The guest's end of the memory that it shares with its host: mapped, and described so that the host finds it.

It is one file of a filesystem on /dev/pmem0, which the initrd mounts with DAX. The law: it is offered only if
its bytes stand where the kernel says they do (linux/fiemap.h) and stay there. No memory is no error: payloads travel
in frames then, and the reason is logged.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Final

from protocol.bulk import MARK_SIZE, Bulk
from protocol.messages import BulkOffer, Hello
from protocol.region import FILE_SIZE, Plane, Region
from protocol.session import Role

log = logging.getLogger(__name__)

FILE: Final = Path("/run/agentctl/bulk/slots")

MAX_EXTENTS: Final = 64
"""More pieces than the host takes; the file that it makes is one."""

_FS_IOC_FIEMAP: Final = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_FIEMAP: Final = struct.Struct("=QQIIII")  # start, length, flags, mapped extents, room for extents, reserved
_EXTENT: Final = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_FLAG_SYNC: Final = 0x1
_FLAG_LAST: Final = 0x1
_FLAG_MERGED: Final = 0x1000
_HARMLESS: Final = _FLAG_LAST | _FLAG_MERGED
"""Any other flag says that the bytes are not there yet (unwritten, delayed), not plain (inline, encoded) or not only
this file's (shared)."""


class NotMappable(Exception):
    """The file's bytes are not simply on the device; the message is a clause."""


def open_region(path: Path = FILE) -> tuple[Region, list[int]] | None:
    """The memory shared with the host, and where in its device it is: [offset, length, ...] in the file's order.

    None if there is none that can be used.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        log.info("bulk.none path=%s", path)
        return None
    except OSError as error:
        log.warning("bulk.unusable error=%r", error)
        return None
    try:
        if (size := os.fstat(descriptor).st_size) != FILE_SIZE:
            raise NotMappable(f"it has {size} bytes instead of {FILE_SIZE}")
        extents = extents_of(descriptor, FILE_SIZE)
        region = Region(mmap.mmap(descriptor, FILE_SIZE, flags=mmap.MAP_SHARED))
    except (OSError, NotMappable) as error:
        log.warning("bulk.unusable error=%s", error)
        return None
    finally:
        os.close(descriptor)
    log.info("bulk.mapped extents=%s", extents)
    return region, extents


def extents_of(descriptor: int, size: int) -> list[int]:
    """Where the bytes of a file of ``size`` are on its device: [offset, length, ...], in bytes, without a hole.

    Raises ``NotMappable``, or ``OSError`` (EOPNOTSUPP where files are not on a device).
    """
    request = bytearray(_FIEMAP.size + MAX_EXTENTS * _EXTENT.size)
    _FIEMAP.pack_into(request, 0, 0, size, _FLAG_SYNC, 0, MAX_EXTENTS, 0)
    fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, request)
    return parse_extents(bytes(request), size)


def parse_extents(answer: bytes, size: int) -> list[int]:
    """``struct fiemap`` with its extents as the kernel filled it in, as ``extents_of``. Raises ``NotMappable``."""
    count = _FIEMAP.unpack_from(answer)[3]
    extents: list[int] = []
    covered = 0
    for logical, physical, length, flags in _EXTENT.iter_unpack(
        answer[_FIEMAP.size :][: count * _EXTENT.size]
    ):
        if logical != covered:
            raise NotMappable(f"it has a hole at {covered}")
        if flags & ~_HARMLESS:
            raise NotMappable(f"an extent has the flags {flags:#x}")
        extents += [physical, length]
        covered += length
    if covered != size:
        raise NotMappable(f"its extents have {covered} bytes of {size}")
    return extents


class GuestPlane:
    """A plane's memory, and its offer to one host after another. ``region``: as ``open_region`` gave it."""

    def __init__(self, name: Plane, found: tuple[Region, list[int]] | None) -> None:
        self.bulk = Bulk()
        self._found = found
        self._name = name
        if found is not None:
            self.bulk.attach(*found[0].halves(name, Role.GUEST))

    def populate(self) -> None:
        """Have the memory at hand: an agent that is killed while /dev/fuse copies a request to a page which must be
        fetched first costs that request's caller EIO (fuse_copy_fill in fs/fuse/dev.c: a page is not waited for by
        who is to be killed). One whose pages are there is copied to the end, and sent again to the next agent."""
        if self._found is not None:
            self._found[0].populate(self._name)

    def offered(self, hello: Hello) -> Hello:
        """``hello`` for a new session, with the offer. The mark is written now, so no older memory has it."""
        if self._found is None:
            return hello
        region, extents = self._found
        mark = os.urandom(MARK_SIZE)
        region.mark(self._name)[:MARK_SIZE] = mark
        return replace(hello, bulk=BulkOffer(extents, mark, self.bulk.busy()))
