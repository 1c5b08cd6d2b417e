"""From the number of a file to the file, and what the table learns of names: the node table of one share at work.

The laws:
- A file is held by an O_PATH descriptor. Those least recently used are closed when there are too many (``budget``);
  one that is in use never is. The way back to a file is in ``walk``.
- A file without a name cannot be found again: from the moment the guest took its last name until it forgets
  the file, its descriptor is *pinned*. So that it outlives this process, a copy goes to the descriptor store before the
  name is taken (``keepsakes``).
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Container, Iterable
from types import TracebackType

from fileserver import linux
from fileserver.budget import Budget
from fileserver.devices import Devices
from fileserver.keepsakes import Keepsakes, ShareKeepsakes
from fileserver.linux import Status
from fileserver.nodes import Key, Link, Node, NodeTable, Recorder, RestoredNode
from fileserver.registry import Registry, close_all
from fileserver.sweep import Sweep
from fileserver.walk import Walk
from protocol.files import ROOT

logger = logging.getLogger(__name__)


class Use:
    """A node that is acquired until the end of a ``with`` statement. (A generator would cost 1 us more, several times a
    call.)"""

    __slots__ = ("_node", "_release")

    def __init__(self, node: Node, release: Callable[[Node], None]) -> None:
        self._node, self._release = node, release

    def __enter__(self) -> Node:
        return self._node

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(self._node)


class Reach:
    """The node table of one share and the descriptors of its nodes. Thread-safe."""

    def __init__(
        self,
        recorder: Recorder,
        next_node: Callable[[], int] | None,
        sealed: Container[tuple[int, int]],
        budget: Budget,
        max_descriptors: int | None = None,
        keepsakes: ShareKeepsakes | None = None,
    ) -> None:
        """``max_descriptors``: of named files, and of those without a name, instead of what ``budget`` says."""
        self._table = NodeTable(recorder, next_node, sealed)
        self._keepsakes = keepsakes or Keepsakes().of(0)
        self.registry = Registry(self._table, budget, max_descriptors, self._keepsakes)
        self._lock, self._held = self.registry.lock, self.registry.held
        self.devices = Devices()
        walk = Walk(self.registry, self.devices)
        # The ways to a file, each of them on the way of every call.
        self.acquire, self.acquire_directory = walk.acquire, walk.acquire_directory
        self.open_entry = walk.open_entry
        self.release = self.registry.release
        self.opening = self.registry.opening
        self.key = self.devices.key
        self.sweep = Sweep(self.registry).look
        self.on_other_root: Callable[[list[tuple[bytes, Node]]], None] = lambda names: None
        """Told when the root is another directory, or none, with what was known in it."""
        self.on_outdated: Callable[[list[tuple[Link, Node]]], None] = lambda names: None
        """Told of names that stand for nothing any more, or for something else: a program of the host has moved a
        directory, and it was found by its new name before that was heard of."""

    @property
    def nodes(self) -> int:
        return len(self._table.by_number)

    @property
    def descriptors(self) -> int:
        return len(self._held) + (self._table.root.descriptor >= 0)

    @property
    def lost(self) -> int:
        return self.registry.lost

    @property
    def root_device(self) -> int:
        return self._table.root.key[0]

    # --- using a file ------------------------------------------------------------------------------

    def use(self, number: int) -> Use:
        """As ``acquire``, to be released by ``with``."""
        return Use(self.acquire(number), self.release)

    def use_directory(self, number: int) -> Use:
        """The same as ``acquire_directory``."""
        return Use(self.acquire_directory(number), self.release)

    def peek(self, number: int) -> Node | None:
        """The node if there is one, not acquired."""
        with self._lock:
            return self._table.by_number.get(number)

    def named(self, directory: Node, name: bytes) -> Node | None:
        """What the table has by this name, not acquired."""
        with self._lock:
            return self._table.by_name.get((directory.number, name))

    def is_named(self, directory: Node, name: bytes, key: Key) -> bool:
        """Does the table have this file by this name?"""
        node = self.named(directory, name)
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
        node = self.named(directory, name)
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

    def known(self, directory: Node, name: bytes, status: Status) -> Node | None:
        """What is known by this name, if it is the file of ``status``; one lookup more of it."""
        with self._lock:
            node = self._table.by_name.get((directory.number, name))
            if node is None or node.key[1] != status.ino or node.shelved:
                return None
            if not self.devices.is_key(node.key, status):
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
                dropped = self.registry.take_dropped()
                outdated, self._table.outdated = self._table.outdated, []
        finally:
            close_all(closing)
        self.registry.bury(dropped)
        if outdated:
            self.on_outdated(outdated)
        return node

    def removed(self, directory: Node, name: bytes) -> None:
        """The guest has removed the name."""
        with self._lock:
            closing = self._pin(self._table.unname((directory.number, name)))
            dropped = self.registry.take_dropped()
        close_all(closing)
        self.registry.bury(dropped)

    def moved(self, old: Node, old_name: bytes, new: Node, new_name: bytes, *, exchange: bool) -> None:
        """The guest has renamed."""
        source: Link = (old.number, old_name)
        with self._lock:
            closing = self._pin(self._table.moved(source, (new.number, new_name), new, exchange=exchange))
            dropped = self.registry.take_dropped()
        close_all(closing)
        self.registry.bury(dropped)

    def _pin(self, node: Node | None) -> list[int]:
        """With the lock held. The node may have lost its last name."""
        closing = self._held.pin(node)
        if node is not None and node.pinned:
            self._keepsakes.keep_node(node.number, node.descriptor)
        return closing

    def forget(self, number: int, count: int) -> None:
        with self._lock:
            self._table.forget(number, count)
            dropped = self.registry.take_dropped()
        self.registry.bury(dropped)

    # --- the root ----------------------------------------------------------------------------------

    def set_root(self, descriptor: int, status: Status) -> bool:
        """``descriptor`` (taken over) is the shared folder. True if it is another one than before: every other file of
        before is then gone."""
        try:
            key = self.key(status, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        root = self._table.root
        replaced = root.key != key
        other = replaced and root.key[1] != 0
        if other:
            self.registry.unwatch(root, root.descriptor, b"")
        with self._lock:
            names = self._names_in_root() if other else []
            abandoned = self._table.abandon() if other else []
            closing = [descriptor] if not replaced and root.descriptor >= 0 else self._swap_root(descriptor)
            if replaced:
                self._table.root_is(key, status.kind)
        close_all(closing)
        self.registry.bury(abandoned)
        if other:
            self.on_other_root(names)
        return replaced

    def _names_in_root(self) -> list[tuple[bytes, Node]]:
        return [(name, node) for (parent, name), node in self._table.by_name.items() if parent == ROOT]

    def lose_root(self, number: int) -> None:
        """There is no shared folder: what needs it fails with the errno ``number``."""
        with self._lock:
            self.registry.root_errno = number
            lost = self._table.root.descriptor >= 0
            names = self._names_in_root() if lost else []
            closing = self._swap_root(-1)
        close_all(closing)
        if lost:
            self.on_other_root(names)

    def _swap_root(self, descriptor: int) -> list[int]:
        root = self._table.root
        if root.descriptor >= 0:
            root.retired = (*root.retired, root.descriptor)
        root.descriptor = descriptor
        return [] if root.uses else self._held.let_go(root)

    # --- all at once -------------------------------------------------------------------------------

    def everything(self) -> tuple[list[Node], list[tuple[Link, Node]]]:
        """All nodes, none of them acquired, and all names."""
        with self._lock:
            return list(self._table.by_number.values()), list(self._table.by_name.items())

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
        close_all(closing)

    def reseal(self) -> None:
        with self._lock:
            self._table.reseal()

    def suspect_all(self) -> None:
        with self._lock:
            nodes = list(self._table.by_number.values())
        for node in nodes:
            node.base, node.doubt, node.told = (), True, -1

    def close(self) -> None:
        self.registry.close()
        with self._lock:
            closing = self._swap_root(-1)
        close_all(closing)
