"""From the number of a file to the file: descriptors kept open, and the way back where one was closed.

The laws:
- A file is held by an O_PATH descriptor. Those least recently used are closed when there are too many; one that is
  in use never is.
- A file whose descriptor was closed is found again by walking its names down from the nearest directory that is
  held, one component at a time, no symlink followed. What is then found must be the same file
  (``Identity``), else the answer is ESTALE: never another file's content.
- A file without a name cannot be found again: from the moment the guest took its last name until it forgets
  the file, its descriptor is *pinned*. So that it outlives this process, a copy goes to the descriptor store before the
  name is taken (``keepsakes``).
- The lock is held for work on dicts only, never during a system call that may wait for a disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import stat
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Final

from host_agent.fileserver import linux
from host_agent.fileserver.held import Held
from host_agent.fileserver.keepsakes import Keepsakes, ShareKeepsakes
from host_agent.fileserver.linux import Status, failure
from host_agent.fileserver.nodes import Key, Link, Node, NodeTable, Recorder, RestoredNode

logger = logging.getLogger(__name__)

SWEEP: Final = 10.0
"""Seconds between looks for files that were deleted on the host while the guest still knows them: it is told after
two looks at a file that it did not use in between, so that their disk space is given back."""

SWEPT_AT_ONCE: Final = 2048
"""Descriptors looked at in one sweep: about 2 ms."""

MAX_DEPTH: Final = 4096
"""Directories below each other: a path has 4,096 bytes. Also ends a walk in a circle, which directories that were
moved into each other on the host may seem to be."""

WALKS: Final = 5
"""Attempts to find a file: the guest may rename a directory above it between a look at the table and one at the
disk. What is being renamed is held, so only a walk that began before meets that, and not often twice."""

_UNREACHABLE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def default_descriptors() -> int:
    """An eighth of what the process may open: several shares fit."""
    return max(16, min(16384, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))


class Reach:
    """The node table of one share and the descriptors of its nodes. Thread-safe."""

    def __init__(
        self,
        recorder: Recorder,
        next_node: Callable[[], int] | None,
        sealed: Container[tuple[int, int]],
        max_descriptors: int | None,
        keepsakes: ShareKeepsakes | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._table = NodeTable(recorder, next_node, sealed)
        self._held = Held(max_descriptors or default_descriptors())
        self._keepsakes = keepsakes or Keepsakes().of(0)
        self._births: dict[int, bool] = {}  # of a device: does the time of birth tell files apart?
        self._sweep_due = 0.0
        self._root_errno = errno.ENOENT
        self.lost = 0
        # What has files open for data: closes those of one node, or the least recently used of all.
        self.close_data: Callable[[Node], None] = lambda node: None
        self.shed_data: Callable[[], None] = lambda: None

    @property
    def nodes(self) -> int:
        return len(self._table.by_number)

    @property
    def descriptors(self) -> int:
        return len(self._held) + (self._table.root.descriptor >= 0)

    @property
    def root_device(self) -> int:
        return self._table.root.key[0]

    # --- using a file ------------------------------------------------------------------------------

    def acquire(self, number: int) -> Node:
        """The file, its descriptor open until ``release``. Raises ESTALE, or what the walk to it met."""
        with self._lock:
            node = self._table.by_number.get(number)
            if node is None or node.dead:
                raise failure(errno.ESTALE)
            if node.descriptor >= 0:
                self._held.use(node)
                return node
        self._find(node)
        return node

    def release(self, node: Node) -> None:
        with self._lock:
            node.uses -= 1
            if node.uses or not (node.dead or node.retired):
                return
            closing = self._held.let_go(node)
        if node.dead:
            self._keepsakes.give_up_node(node.number)
        _close(closing)

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[Node]:
        node = self.acquire(number)
        try:
            yield node
        finally:
            self.release(node)

    def peek(self, number: int) -> Node | None:
        """The node if there is one, not acquired."""
        with self._lock:
            return self._table.by_number.get(number)

    def is_named(self, directory: Node, name: bytes, key: Key) -> bool:
        """Does the table have this file by this name?"""
        with self._lock:
            node = self._table.by_name.get((directory.number, name))
            return node is not None and node.key == key

    def hold(self, node: Node) -> None:
        """One use more, of a node that the caller has acquired."""
        with self._lock:
            node.uses += 1

    def victim(self, directory: Node, name: bytes, *, loses: bool) -> Node | None:
        """What is about to lose ``name``, acquired until ``spare``, if it is known and still is what it was.

        ``loses``: it gets no other name. If it has none left, a successor must have the file even if we are killed
        right after the name went.
        """
        with self._lock:
            node = self._table.by_name.get((directory.number, name))
        if node is None:
            return None
        try:
            self.acquire(node.number)
        except OSError:
            return None
        if loses and len(node.links) <= 1:
            self._keepsakes.keep_node(node.number, node.descriptor)
        return node

    def spare(self, node: Node) -> None:
        """Release a ``victim``, which may have a name after all."""
        with self._lock:
            if not node.pinned:
                self._keepsakes.give_up_node(node.number)
        self.release(node)

    # --- the walk ----------------------------------------------------------------------------------

    def _find(self, node: Node) -> None:
        """Open the node's descriptor again; it then has one use more."""
        if node is self._table.root:
            raise failure(self._root_errno)
        for _ in range(WALKS):
            if self._walk(node):
                return
        if self._root_gone():
            raise failure(self._root_errno)
        if not node.lost and not node.dead:
            node.lost = True
            self.lost += 1
        raise failure(errno.ESTALE)

    def _walk(self, node: Node) -> bool:
        """Try its names, the newest first."""
        for parent, name in reversed(node.links):
            try:
                directory = self._find_directory(parent)
                try:
                    self._open_again(directory, name, node)
                finally:
                    self.release(directory)
            except OSError as error:
                if error.errno not in _UNREACHABLE:
                    raise
                continue
            return True
        return False

    def _root_gone(self) -> bool:
        return self._table.root.descriptor < 0

    def _find_directory(self, number: int) -> Node:
        """The directory, acquired: up to the first one that is held, and down again."""
        below: list[tuple[bytes, Node]] = []
        with self._lock:
            while True:
                node = self._table.by_number.get(number)
                if node is None or node.dead or len(below) > MAX_DEPTH:
                    raise failure(errno.ESTALE)
                if node.descriptor >= 0:
                    self._held.use(node)
                    break
                if not node.links:
                    raise failure(errno.ESTALE)
                number, name = node.links[-1]
                below.append((name, node))
        while below:
            name, child = below.pop()
            try:
                self._open_again(node, name, child)
            finally:
                self.release(node)
            node = child
        return node

    def _open_again(self, directory: Node, name: bytes, node: Node) -> None:
        if directory.sealed:
            raise failure(errno.EACCES)
        descriptor = self.open_entry(directory, name)
        try:
            status = linux.fstatx(descriptor)
            if self.key(status, descriptor) != node.key:
                raise failure(errno.ESTALE)
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            node.kind = status.kind
            closing = self._held.install(node, descriptor)
            dead = node.dead
        _close(closing)
        if dead:
            raise failure(errno.ESTALE)

    # --- descriptors -------------------------------------------------------------------------------

    def open_entry(self, directory: Node, name: bytes) -> int:
        """The entry itself, by an O_PATH descriptor. Makes room if there are too many."""
        return self.opening(lambda: linux.open_entry(directory.descriptor, name))

    def opening(self, attempt: Callable[[], int]) -> int:
        """``attempt``, again with fewer descriptors held if there was none left."""
        try:
            return attempt()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self.shed_data()
        with self._lock:
            closing = self._held.halve()
        _close(closing)
        return attempt()

    # --- what a file is ----------------------------------------------------------------------------

    def key(self, status: Status, descriptor: int) -> Key:
        """The identity of the file behind ``descriptor``. Raises EACCES for one that is the kernel's: somebody has
        mounted /proc below the share, in a chroot(2) say, and what is there is not the share's."""
        device = status.device
        trusted = self._births.get(device)
        if trusted is None:
            kind = linux.filesystem_type(descriptor)
            if kind in linux.KERNEL_FILESYSTEMS:
                raise failure(errno.EACCES)
            trusted = self._births[device] = kind != linux.OVERLAYFS
        return (device, status.ino, status.birth_ns() if trusted else 0)

    def known(self, directory: Node, name: bytes, status: Status) -> Node | None:
        """What is known by this name, if it is the file of ``status``; one lookup more of it."""
        with self._lock:
            node = self._table.by_name.get((directory.number, name))
            if node is None or node.key[1] != status.ino or node.shelved:
                return None
            device = status.device
            trusted = self._births.get(device)
            if trusted is None or node.key != (device, status.ino, status.birth_ns() if trusted else 0):
                return None
            node.kind = status.kind
            self._table.count(node)
            return node

    # --- names -------------------------------------------------------------------------------------

    def enter(self, directory: Node | None, name: bytes, descriptor: int, status: Status) -> Node:
        """The file behind ``descriptor`` (taken over) is ``name`` in ``directory``, or, if that is None, has no name.
        One lookup more of it. It is acquired, and to be released."""
        closing = [descriptor]
        try:
            key = self.key(status, descriptor)
            with self._lock:
                node = self._table.found(key, status.kind)
                closing = self._held.install(node, descriptor)
                if directory is not None:
                    self._table.name(node, directory, name, only=stat.S_ISDIR(status.mode))
                    self._held.unpin(node)
                    self._keepsakes.give_up_node(node.number)
                else:
                    self._table.unnamed(node)
                    closing += self._pin(node)
                self._table.count(node)
                dropped = self._take_dropped()
        finally:
            _close(closing)
        self._bury(dropped)
        return node

    def removed(self, directory: Node, name: bytes) -> None:
        """The guest has removed the name."""
        with self._lock:
            closing = self._pin(self._table.unname((directory.number, name)))
            dropped = self._take_dropped()
        _close(closing)
        self._bury(dropped)

    def moved(self, old: Node, old_name: bytes, new: Node, new_name: bytes, *, exchange: bool) -> None:
        """The guest has renamed."""
        source: Link = (old.number, old_name)
        with self._lock:
            closing = self._pin(self._table.moved(source, (new.number, new_name), new, exchange=exchange))
            dropped = self._take_dropped()
        _close(closing)
        self._bury(dropped)

    def _pin(self, node: Node | None) -> list[int]:
        """With the lock held. The node may have lost its last name."""
        closing = self._held.pin(node)
        if node is not None and node.pinned:
            self._keepsakes.keep_node(node.number, node.descriptor)
        return closing

    def forget(self, number: int, count: int) -> None:
        with self._lock:
            self._table.forget(number, count)
            dropped = self._take_dropped()
        self._bury(dropped)

    def _take_dropped(self) -> list[Node]:
        dropped, self._table.dropped = self._table.dropped, []
        return dropped

    def _bury(self, nodes: list[Node]) -> None:
        """Close what nodes that are gone still have open, now or when nobody uses them any more."""
        for node in nodes:
            self.close_data(node)
            self._keepsakes.give_up_node(node.number)
            with self._lock:
                closing = [] if node.uses else self._held.let_go(node)
            _close(closing)

    # --- the root ----------------------------------------------------------------------------------

    def set_root(self, descriptor: int, status: Status) -> bool:
        """``descriptor`` (taken over) is the shared folder. True if it is another one than before: every other file of
        before is then gone."""
        try:
            key = self.key(status, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        with self._lock:
            root = self._table.root
            replaced = root.key != key
            abandoned = self._table.abandon() if replaced and root.key[1] else []
            closing = [descriptor] if not replaced and root.descriptor >= 0 else self._swap_root(descriptor)
            if replaced:
                self._table.root_is(key, status.kind)
        _close(closing)
        self._bury(abandoned)
        return replaced

    def lose_root(self, number: int) -> None:
        """There is no shared folder: what needs it fails with the errno ``number``."""
        with self._lock:
            self._root_errno = number
            closing = self._swap_root(-1)
        _close(closing)

    def _swap_root(self, descriptor: int) -> list[int]:
        root = self._table.root
        if root.descriptor >= 0:
            root.retired = (*root.retired, root.descriptor)
        root.descriptor = descriptor
        return [] if root.uses else self._held.let_go(root)

    # --- all at once -------------------------------------------------------------------------------

    def restore(self, nodes: Iterable[RestoredNode]) -> None:
        nodes = list(nodes)
        with self._lock:
            self._table.restore(nodes)
        for old in nodes:
            if old.descriptor >= 0:
                self._take_back(old.node, old.descriptor)

    def _take_back(self, number: int, descriptor: int) -> None:
        """``descriptor`` (taken over) was kept of a node; its name may have gone without anybody writing that down."""
        closing = [descriptor]
        try:
            status = linux.fstatx(descriptor)
            key = self.key(status, descriptor)
            with self._lock:
                node = self._table.by_number.get(number)
                if node is not None and not node.dead and node.key == key and node.descriptor < 0:
                    node.kind = status.kind
                    closing = self._held.install(node, descriptor)
                    if status.nlink:
                        closing += self._held.pin(node)
                    else:
                        self._held.pin_deleted(node)
                    node.uses -= 1
        except OSError as error:
            logger.warning("what was kept of node %d is of no use: %s", number, error)
        if descriptor in closing:
            self._keepsakes.give_up_node(number)
        _close(closing)

    def reseal(self) -> None:
        with self._lock:
            self._table.reseal()

    def suspect_all(self) -> None:
        with self._lock:
            nodes = list(self._table.by_number.values())
        for node in nodes:
            node.base, node.doubt, node.told = (), True, -1

    def sweep(self, now: float) -> list[Link]:
        """The names that the guest has of files which were deleted on the host and which it did not use lately.

        Each is returned once. The file is held until the guest forgets it: it may have it open.
        """
        if now < self._sweep_due:
            return []
        self._sweep_due = now + SWEEP
        with self._lock:
            quiet = self._held.take_quiet(SWEPT_AT_ONCE)
        return [link for node in quiet for link in self._deleted(node)]

    def _deleted(self, node: Node) -> tuple[Link, ...]:
        """The names of a node with one use, which is given back, if it is a file that has none any more."""
        try:
            links_left = linux.fstatx(node.descriptor).nlink
        except OSError:  # of a network filesystem, say; it is no worse off than before
            links_left = 1
        with self._lock:
            gone = not links_left and node.kind == stat.S_IFREG and self._held.pin_deleted(node)
            node.uses -= 1
            closing = [] if node.uses else self._held.let_go(node)
            links = node.links if gone else ()
            if gone:
                self._keepsakes.keep_node(node.number, node.descriptor)
        _close(closing)
        return links

    def close(self) -> None:
        with self._lock:
            closing = self._held.let_go_all() + self._swap_root(-1)
        _close(closing)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
