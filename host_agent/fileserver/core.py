"""What the operations on one share have in common: the way to its files, and how they are shown to a guest."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from host_agent.fileserver import signatures
from host_agent.fileserver.budget import Budget
from host_agent.fileserver.datafiles import DataFiles
from host_agent.fileserver.keepsakes import ShareKeepsakes
from host_agent.fileserver.linux import Status, failure
from host_agent.fileserver.nodes import Node, Recorder
from host_agent.fileserver.reach import Reach
from host_agent.fileserver.seals import Seals
from host_agent.fileserver.snapshots import Snapshots
from protocol.bulk import Run
from protocol.files import MAX_NAME, Entry


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is sent back: a result of ``protocol.files``, and raw bytes."""

    value: object | None
    payload: bytes | Run = b""


def check_name(name: bytes) -> None:
    """One component, and nothing that leads elsewhere. Raises ENAMETOOLONG, EINVAL."""
    if len(name) > MAX_NAME:
        raise failure(errno.ENAMETOOLONG)
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise failure(errno.EINVAL)


@lru_cache(maxsize=1024)
def _device_bits(device: int) -> int:
    digest = hashlib.blake2b(device.to_bytes(8, "little"), digest_size=2).digest()
    return int.from_bytes(digest, "little") << 48


class Core:
    """One share's files."""

    def __init__(
        self,
        *,
        read_only: bool,
        seals: Seals,
        recorder: Recorder,
        next_node: Callable[[], int] | None,
        max_descriptors: int | None,
        keepsakes: ShareKeepsakes | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.read_only = read_only
        self.seals = seals
        budget = budget or Budget()
        self.reach = Reach(recorder, next_node, seals, budget, max_descriptors, keepsakes)
        self.files = DataFiles(self.reach, budget, read_only=read_only)
        self.snapshots = Snapshots()
        self.is_root = os.geteuid() == 0

    @contextmanager
    def directory(self, number: int, *names: bytes) -> Iterator[Node]:
        """A directory in which the guest may look at or change ``names``. Raises EACCES if it is sealed, ESTALE if
        it is not in the share any more."""
        for name in names:
            check_name(name)
        node = self.reach.acquire_directory(number)
        try:
            if node.sealed:
                raise failure(errno.EACCES)
            yield node
        finally:
            self.reach.release(node)

    @contextmanager
    def changing(self, number: int) -> Iterator[Node]:
        """A file whose attributes the guest may change: not a directory that is sealed."""
        with self.reach.use(number) as node:
            if node.sealed:
                raise failure(errno.EACCES)
            yield node

    def inode(self, device: int, ino: int) -> int:
        """The inode number that the guest is shown: the host's own on the root's device, else one that is
        different for every device."""
        return ino if device == self.reach.root_device else ino ^ _device_bits(device)

    def attr(self, status: Status) -> bytes:
        return status.attr(self.inode(status.device, status.ino))

    def entry(self, node: Node, status: Status) -> Outcome:
        return Outcome(Entry(node.number, self.attr(status), signatures.is_stale(node, status)))

    def kill_privilege(self, descriptor: int, status: Status) -> bool:
        """Drop setuid and, of an executable, setgid. The kernel does that by itself unless we are root."""
        bits = stat.S_ISUID | (stat.S_ISGID if status.mode & stat.S_IXGRP else 0)
        if not status.mode & bits or not stat.S_ISREG(status.mode):
            return False
        os.chmod(b"/proc/self/fd/%d" % descriptor, stat.S_IMODE(status.mode) & ~bits)
        return True

    def seal(self) -> None:
        """Find what is to be hidden."""
        if self.seals.look():
            self.reach.reseal()

    def forget(self, number: int, count: int) -> None:
        self.reach.forget(number, count)
