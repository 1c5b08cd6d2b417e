"""The host's end of a plane's memory: found when a guest offers its own, and used if it is the same.

The law: what a guest says decides only whether payloads go through the memory of its own VM or inline. Whether they
are the same bytes is proven by a mark that it has just written there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from host_agent import bulk_memory
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from protocol.bulk import MARK_SIZE, Bulk
from protocol.region import Plane, Region
from protocol.session import Role

logger = logging.getLogger(__name__)


class HostPlane:
    """``find`` says where the memory can be opened, if there is any."""

    def __init__(self, name: Plane, find: Callable[[], Path | None]) -> None:
        self.bulk = Bulk()
        self.bulk.accept = self._accept
        self._name = name
        self._find = find
        self._region: Region | None = None
        self._mapped: object = None

    def _accept(self, extents: list[int], mark: bytes) -> bool:
        """Whether the memory that a guest offers is to be had here."""
        try:
            region = self._map(extents)
        except (OSError, ValueError) as error:
            logger.warning("%s: payloads go inline: %s", self._name, error)
            return False
        if region is None:
            return False
        if len(mark) != MARK_SIZE or region.mark(self._name)[:MARK_SIZE] != mark:
            logger.warning("%s: payloads go inline: the guest's memory is another than ours", self._name)
            return False
        return True

    def _map(self, extents: list[int]) -> Region | None:
        """The region, mapped anew if it is not the one before. Raises ``OSError`` and ``ValueError``."""
        if (path := self._find()) is None:
            return None
        status = os.stat(path)
        which = (status.st_dev, status.st_ino, tuple(extents))
        if self._region is None or which != self._mapped:
            if self.bulk.in_use:
                raise ValueError("what an earlier VM has sent is still being worked on")
            region = bulk_memory.map_region(path, extents)
            self.bulk.attach(*region.halves(self._name, Role.HOST))
            self._region, self._mapped = region, which
        return self._region


def plane(name: Plane, paths: InstancePaths) -> Bulk:
    """That of the VM that runs in ``paths`` at the time."""
    return HostPlane(name, lambda: _find(paths)).bulk


def _find(paths: InstancePaths) -> Path | None:
    qemu = ProcessIdentity.read(paths.qemu_identity)
    return None if qemu is None else bulk_memory.find(paths, qemu.pid)
