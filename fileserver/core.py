"""What the operations on one share have in common: the way to its files, and how they are shown to a guest."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

from fileserver import linux, signatures
from fileserver.budget import Budget
from fileserver.datafiles import DataFiles
from fileserver.keepsakes import ShareKeepsakes
from fileserver.linux import Status, failure
from fileserver.manner import is_new
from fileserver.nodes import Link, Node, Recorder
from fileserver.owner import Owner
from fileserver.promises import Promise, Promises
from fileserver.reach import Reach, Use
from fileserver.retractions import Name, Retraction, above
from fileserver.seals import Seals
from fileserver.sharing import Sharing
from fileserver.snapshots import Snapshots
from fileserver.watches import Watches
from protocol.bulk import Run
from protocol.files import MAX_NAME, ROOT, Entry


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is sent back: a result of ``protocol.files``, and raw bytes; with what may be promised of it, if nothing
    happens before that is sent."""

    value: object | None
    payload: bytes | bytearray | Run = b""
    promise: Promise | None = None


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
        share: int = 0,
        watches: Watches | None = None,
        retract: Callable[[Retraction], None] = lambda retraction: None,
        inherit: bool = False,
    ) -> None:
        self.read_only = read_only
        self.seals = seals
        budget = budget or Budget()
        self.reach = Reach(recorder, next_node, seals, budget, max_descriptors, keepsakes)
        if watches is not None:
            self.reach.registry.unwatch = partial(watches.forget, share)
        self.promises = Promises(share, watches, self.reach.registry.table.by_name)
        self.files = DataFiles(self.reach, budget, read_only=read_only)
        self.sharing = None if watches is None else Sharing(self.files, watches, self.doubt)
        self._retract = retract
        self.reach.on_other_root = self._other_root
        self.reach.on_outdated = self._outdated
        self.snapshots = Snapshots()
        self.is_root = os.geteuid() == 0
        self._inherit = inherit and self.is_root
        self.owner: Owner | None = None
        """None: the guest's user has the same ids as we."""

    def directory(self, number: int, *names: bytes) -> Use:
        """A directory in which the guest may look at or change ``names``. Raises EACCES if it is sealed, ESTALE if
        it is not in the share any more."""
        for name in names:
            check_name(name)
        return self._unsealed(self.reach.acquire_directory(number))

    def changing(self, number: int) -> Use:
        """A file whose attributes the guest may change: not a directory that is sealed."""
        return self._unsealed(self.reach.acquire(number))

    def _unsealed(self, node: Node) -> Use:
        if node.sealed:
            self.reach.release(node)
            raise failure(errno.EACCES)
        return Use(node, self.reach.release)

    def inode(self, device: int, ino: int) -> int:
        """The inode number that the guest is shown: the host's own on the root's device, else one that is
        different for every device."""
        return ino if device == self.reach.root_device else ino ^ _device_bits(device)

    def attr(self, status: Status) -> bytes:
        owner = None if self.owner is None else self.owner.shown(status.uid, status.gid)
        return status.attr(self.inode(status.device, status.ino), owner)

    def doubt(self, node: Node) -> None:
        """The guest may have been promised something of the file that does not hold."""
        retraction = Retraction()
        retraction.file(node, above(node))
        self._retract(retraction)

    def renew(self, node: Node) -> None:
        """The guest has changed attributes of the file by another name than that which its agent may know it by."""
        self._retract(Retraction(attributes=[node.number]))

    def _other_root(self, names: Iterable[tuple[bytes, Node]]) -> None:
        """The root is another directory, or none; ``names`` the guest knows of the one before."""
        self.promises.changed(None, self.reach.peek(ROOT))
        told = [Name(ROOT, name, node) for name, node in names]
        with suppress(OSError), self.reach.use(ROOT) as root:
            told += [Name(ROOT, name, None) for name in os.listdir(linux.magic_link(root.descriptor))]
        self._retract(Retraction(told, [], [(ROOT, 0)]))

    def _outdated(self, names: Iterable[tuple[Link, Node]]) -> None:
        """When it is heard of the change, nothing will be known by these names. The guest's kernel may know them."""
        self._retract(Retraction([Name(parent, name, node) for (parent, name), node in names]))

    def see_writers(self, node: Node) -> None:
        """Before an answer about ``node``, which is acquired: are there any yet?"""
        if self.sharing is not None and self.sharing.is_due(node):
            with suppress(OSError):  # it stays what it was
                self.sharing.look_again(node)

    def entry(self, node: Node, status: Status, promise: Promise | None = None) -> Outcome:
        """``status`` is what was read after ``promise`` was sampled."""
        stale = signatures.is_stale(node, status, self.promises.heard(node))
        return Outcome(Entry(node.number, self.attr(status), stale), promise=promise)

    def hand_over(self, descriptor: int) -> None:
        """A file that was just made gets the root's owner, if files here do. Any descriptor of it."""
        if not self._inherit:
            return
        with self.reach.use(ROOT) as root:
            heir = linux.fstatx(root.descriptor)
        made = linux.fstatx(descriptor)
        if (made.uid, made.gid) != (heir.uid, heir.gid) and is_new(made, os.geteuid()):
            os.chown(linux.magic_link(descriptor), heir.uid, heir.gid)

    def hand_over_entry(self, directory: Node, name: bytes) -> None:
        """The same, by the name that it was given. Whoever has taken that since then has what they have."""
        if self._inherit:
            descriptor = self.reach.open_entry(directory, name)
            try:
                self.hand_over(descriptor)
            finally:
                os.close(descriptor)

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
