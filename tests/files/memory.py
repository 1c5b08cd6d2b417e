"""The memory that the two agents share, without a VM, and what each of them says of its slots.

The host's end is the real one: it is looked for in the process that stands in for QEMU here. What the guest would
find as a file of its filesystem on the device, ``observed.py`` maps for it out of the same memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from host_agent import bulk_filesystem, bulk_memory
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from protocol.bulk import MAX_RUN, SLOT
from protocol.region import FILE_SIZE, FILES
from tests.files.namespace import UNTIL_WE_END

START: Final = bulk_filesystem.FILE_START
"""Where the guest's file begins in the memory."""

HALF: Final = FILES.slots * SLOT


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a VM: ``instance`` is the folder of its files, ``path`` where the memory can be opened."""

    instance: Path
    path: Path

    def guests_half(self) -> bytes:
        """What the guest has last filled its slots with."""
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), HALF, START + (FILES.first + FILES.slots) * SLOT)

    def hosts_half(self) -> bytes:
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), HALF, START + FILES.first * SLOT)

    def blank(self) -> None:
        """As after a boot."""
        with self.path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes(FILE_SIZE), START)


@contextlib.contextmanager
def memory(directory: Path) -> Iterator[Memory]:
    """New memory, and a process that holds it as QEMU would."""
    paths = InstancePaths(directory / "instance")
    paths.directory.mkdir(0o700)
    with contextlib.ExitStack() as stack:
        with bulk_memory.created(paths) as made:
            descriptor = os.open(made.path, os.O_RDWR)
            try:
                holder = subprocess.Popen([*UNTIL_WE_END, "sleep", "infinity"], pass_fds=[descriptor])
            finally:
                os.close(descriptor)
            stack.callback(holder.wait)
            stack.callback(holder.kill)
        ProcessIdentity.of_child(holder.pid).write(paths.qemu_identity)
        found = bulk_memory.find(paths, holder.pid)
        assert found is not None
        yield Memory(paths.directory, found)


@dataclass(frozen=True, slots=True)
class Use:
    """Of a process' memory. Masks have a bit for each slot: of its own half those that it fills or keeps (``mine``), that
    the peer reads (``lent``) and has read since earlier sessions (``busy``); of the peer's those that it reads
    (``held``) and has yet to give back (``frees``). ``old``: loans of earlier sessions; ``received``: all ever. And how
    many ``requests`` the guest's kernel has made."""

    active: bool
    mine: int
    lent: int
    busy: int
    held: int
    frees: int
    old: int
    received: int
    requests: int = field(compare=False)


def use_of(pid: int, where: Path) -> Use | None:
    """What the process, an ``observed.py`` that was told ``where``, says; None: it has no memory."""
    where.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not where.exists():
        assert time.monotonic() < deadline, f"process {pid} does not say how its memory is used"
        time.sleep(0.002)
    said = json.loads(where.read_bytes())
    return None if said is None else Use(**said)


def at_rest(host: Use | None, guest: Use | None) -> bool:
    """Whether both use the memory, nothing is under way, and each slot is free or will be with the next frame."""
    if host is None or guest is None or not (host.active and guest.active):
        return False
    reads = host.held | guest.held or host.old or guest.old
    # The guest keeps what its next request is read into.
    keeps = host.mine or guest.mine.bit_count() not in (0, MAX_RUN // SLOT)
    told = (host.lent | host.busy) == guest.frees and (guest.lent | guest.busy) == host.frees
    return not reads and not keeps and told
