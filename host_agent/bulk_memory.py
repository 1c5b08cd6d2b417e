"""The memory that host and VM share for payloads: made for each boot, found again, and mapped.

The law: it lives as long as QEMU does, whoever else is killed, and nothing of it is left when QEMU has gone. So on
Linux it has no name (memfd_create(2)): QEMU opens it among the descriptors of who made it, keeps it open, and whoever
comes later finds it among QEMU's. A file in /dev/shm would be removed by systemd-logind when its user logs out
(RemoveIPC=), one in $XDG_RUNTIME_DIR with that; and both are often too small, 64 MiB in a container. Elsewhere it is
a file in the instance's folder.

What the guest says of the memory is only ever used after ``placement`` has checked it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

from host_agent import bulk_filesystem
from host_agent.paths import InstancePaths
from protocol.region import FILE_SIZE, Region
from provision.machine import MIB, BulkMemory

SIZE: Final = 64 * MIB
"""Bytes of the device: the region, and room before it so that it begins at a huge page."""

NOT_WANTED: Final = "asked for with --no-bulk"

MAX_EXTENTS: Final = 64
"""Pieces in which a guest may describe one that is contiguous; it needs one."""

_NAME: Final = "agentctl-bulk"
_LINK: Final = f"/memfd:{_NAME} (deleted)"
"""How /proc shows a descriptor of it (proc_pid_fd(5))."""

_PAGE: Final = 4096
_DEVICE: Final = "virtio-pmem-pci"
_DEVICE_HELP_TIME: Final = 10.0


class NoBulkMemory(Exception):
    """There is none, and payloads travel in frames; the message is a clause for the user."""


async def check_device(qemu: Path) -> None:
    """Raise ``NoBulkMemory`` if this QEMU was built without the device that the memory is put into the VM with."""
    done = None
    with trio.move_on_after(_DEVICE_HELP_TIME):
        done = await trio.run_process(
            [qemu, "-device", f"{_DEVICE},help"],
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    # Its exit status is 0 in either case.
    if done is None or b"memdev=" not in done.stdout:
        raise NoBulkMemory(f"{qemu.name} has no {_DEVICE}")


@contextmanager
def created(paths: InstancePaths) -> Iterator[BulkMemory]:
    """New memory, all of it there, with the filesystem that the guest mounts, for a QEMU to be started with.

    QEMU must have opened it when the block is left. Raises ``NoBulkMemory``.
    """
    try:
        descriptor = _create(paths)
        try:
            _fill(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise NoBulkMemory(f"no {SIZE // MIB} MiB of memory for it: {error.strerror or error}") from None
    try:
        yield BulkMemory(_path_of(descriptor, paths), SIZE)
    finally:
        os.close(descriptor)


def find(paths: InstancePaths, qemu: int) -> Path | None:
    """Where to open the memory of the running QEMU that has the pid ``qemu``; None if it has none."""
    if sys.platform != "linux":
        return paths.bulk_memory if paths.bulk_memory.exists() else None
    try:
        descriptors = list(Path(f"/proc/{qemu}/fd").iterdir())
    except OSError:
        return None
    return next((path for path in descriptors if _link(path) == _LINK), None)


def map_region(path: Path, extents: Sequence[int]) -> Region:
    """Map the guest's file in the memory at ``path``; it says that it is at ``extents``.

    Raises ``ValueError`` with a sentence if that cannot be, ``OSError`` if there is no memory (any more).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        start = placement(extents, os.fstat(descriptor).st_size)
        return Region(mmap.mmap(descriptor, FILE_SIZE, flags=mmap.MAP_SHARED, offset=start))
    finally:
        os.close(descriptor)


def placement(extents: Sequence[int], size: int) -> int:
    """Where the file begins in a device of ``size`` bytes: [offset, length, ...] must be one piece of it, whole.

    Slots and runs of them are contiguous in both mappings only so. Raises ``ValueError`` with a sentence.
    """
    if not extents or len(extents) % 2 or len(extents) > 2 * MAX_EXTENTS:
        raise ValueError(f"The guest describes its shared file with {len(extents)} numbers.")
    if any(number < 0 or number % _PAGE for number in extents) or extents[0] % mmap.ALLOCATIONGRANULARITY:
        raise ValueError("The guest's shared file does not consist of pages.")
    start = end = extents[0]
    for offset, length in zip(extents[::2], extents[1::2], strict=True):
        if offset != end or not length:
            raise ValueError("The guest's shared file is not in one piece.")
        end += length
    if end - start != FILE_SIZE:
        raise ValueError(f"The guest's shared file has {end - start} bytes instead of {FILE_SIZE}.")
    if end > size:
        raise ValueError("The guest's shared file ends behind its device.")
    return start


def _create(paths: InstancePaths) -> int:
    if sys.platform != "linux":
        # One that an earlier VM left may still be mapped by somebody.
        paths.bulk_memory.unlink(missing_ok=True)
        return os.open(paths.bulk_memory, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(descriptor, 0o600)
    return descriptor


def _fill(descriptor: int) -> None:
    """Take all of the memory now: a page that cannot be had later is a SIGBUS."""
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, SIZE)
    else:
        for offset in range(0, SIZE, MIB):
            os.pwrite(descriptor, bytes(MIB), offset)
    for offset, content in bulk_filesystem.blocks(SIZE, FILE_SIZE):
        os.pwrite(descriptor, content, offset)
    if sys.platform == "linux":
        # What is mapped cannot go away, whoever can open it.
        fcntl.fcntl(
            descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )


def _path_of(descriptor: int, paths: InstancePaths) -> Path:
    if sys.platform != "linux":
        return paths.bulk_memory
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # closed in between
