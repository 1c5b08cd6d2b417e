"""What can be done to the guest's disks while they are in use: the filesystem grows, free space is given back.

The law: nothing here can lose a byte. resize2fs(8) is only ever told to fill its disk, which never makes a
filesystem smaller, and FITRIM is about blocks that the filesystem itself says are free.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from pathlib import Path
from typing import Final

import trio

from protocol.api import DiskGrown, DisksTrimmed, GrowDisk, TrimDisks
from protocol.errors import ErrorCode, RpcError
from protocol.link import Service

log = logging.getLogger(__name__)

MOUNT: Final = Path("/var/lib/agentctl")
DEVICE: Final = Path("/dev/disk/by-id/virtio-agentctl-data")

FITRIM: Final = 0xC0185879
"""``_IOWR('X', 121, struct fstrim_range)`` of linux/fs.h."""

_RANGE: Final = struct.Struct("=QQQ")
_EVERYTHING: Final = (1 << 64) - 1

PATIENCE: Final = 10.0
"""Seconds until the kernel has heard of the disk's new size, which takes an interrupt and a work item."""

_LOOK: Final = 0.05


class DataDisk:
    """Answers ``GrowDisk`` and ``TrimDisks``. ``mounts``: those to trim, of which some may be no mounts here."""

    def __init__(
        self, device: Path = DEVICE, mount: Path = MOUNT, others: tuple[Path, ...] = (Path("/"),)
    ) -> None:
        self._device = device
        self._mount = mount
        self._others = others
        self._busy = trio.Lock()

    def register(self, service: Service) -> None:
        service.on_request(GrowDisk, self.grow)
        service.on_request(TrimDisks, self.trim)

    async def grow(self, request: GrowDisk) -> DiskGrown:
        """Raises ``RpcError`` when there is no such disk, it does not become that large, or resize2fs fails."""
        async with self._busy:
            self._require_mount()
            await self._until_it_has(request.size)
            done = await trio.run_process(
                ["resize2fs", str(self._device)], capture_stdout=True, capture_stderr=True, check=False
            )
            if done.returncode != 0:
                words = done.stderr.decode(errors="replace").strip().splitlines()
                raise RpcError(
                    ErrorCode.INTERNAL, f"resize2fs failed: {words[-1] if words else done.returncode}"
                )
            room = os.statvfs(self._mount)
            log.info("disk.grown bytes=%d", room.f_blocks * room.f_frsize)
            return DiskGrown(room.f_blocks * room.f_frsize)

    async def trim(self, request: TrimDisks) -> DisksTrimmed:
        """Raises ``RpcError`` when the data disk is not there or cannot be trimmed."""
        async with self._busy:
            self._require_mount()
            try:
                # In a thread, and to its end: the kernel looks through all groups of blocks.
                trimmed = await trio.to_thread.run_sync(self._trim_all)
            except OSError as error:
                raise RpcError(ErrorCode.INTERNAL, f"the disk cannot be trimmed: {error}") from error
            log.info("disk.trimmed bytes=%d", trimmed)
            return DisksTrimmed(trimmed)

    def _trim_all(self) -> int:
        """The data disk first, whose errors are raised; the others are only of this boot."""
        trimmed = trim(self._mount)
        for path in self._others:
            try:
                trimmed += trim(path)
            except OSError as error:
                log.warning("disk.trim path=%s error=%r", path, error)
        return trimmed

    def _require_mount(self) -> None:
        if not self._mount.is_mount():
            raise RpcError(
                ErrorCode.UNREACHABLE, "the data disk is not mounted", "see: agentctl logs --component guest"
            )

    async def _until_it_has(self, size: int) -> None:
        with trio.move_on_after(PATIENCE):
            while capacity(self._device) < size:
                await trio.sleep(_LOOK)
            return
        raise RpcError(ErrorCode.INTERNAL, f"the disk has {capacity(self._device)} bytes, and not {size}")


def capacity(device: Path) -> int:
    """Bytes of a block device, or of a file. Raises ``OSError``."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def trim(mount: Path) -> int:
    """Discard the free space of the filesystem at ``mount``; how many bytes it said. Raises ``OSError``."""
    argument = bytearray(_RANGE.pack(0, _EVERYTHING, 0))
    descriptor = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, FITRIM, argument, True)
    finally:
        os.close(descriptor)
    trimmed: int = _RANGE.unpack(argument)[1]
    return trimmed
