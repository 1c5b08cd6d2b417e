"""The nodes of one share and their descriptors, under one lock: what the ways to a file (``reach``, ``walk``) have in
common.

The laws:
- The lock is held for work on dicts only, never during a system call that may wait for a disk.
- A descriptor in use is not closed. What is taken out under the lock is closed after it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable

from fileserver.budget import Budget
from fileserver.held import Held
from fileserver.keepsakes import ShareKeepsakes
from fileserver.nodes import Node, NodeTable


class Registry:
    """``table`` and ``held`` are used with ``lock`` held."""

    def __init__(
        self, table: NodeTable, budget: Budget, max_descriptors: int | None, keepsakes: ShareKeepsakes
    ) -> None:
        self.lock = threading.Lock()
        self.table = table
        self.held = Held((lambda: budget.nodes) if max_descriptors is None else lambda: max_descriptors)
        self.keepsakes = keepsakes
        self.root_errno = errno.ENOENT  # what a call gets while there is no root
        self.lost = 0
        # What has files open for data: closes those of one node, half of what is idle, or what is too much.
        self.close_data: Callable[[Node], None] = lambda node: None
        self.shed_data: Callable[[], None] = lambda: None
        self.trim_data: Callable[[], None] = lambda: None
        # Takes the mark of a dead node away, by a descriptor of it, or of a directory and its name there, or -1.
        self.unwatch: Callable[[Node, int, bytes], None] = lambda node, descriptor, name: None
        self._budget = budget
        budget.join(self)

    def release(self, node: Node) -> None:
        """One use less."""
        with self.lock:
            node.uses -= 1
            if node.uses or not (node.dead or node.retired):
                return
            closing = self.held.let_go(node)
        if node.dead:
            self.keepsakes.give_up_node(node.number)
            self._unwatch(node, closing)
        close_all(closing)

    def take_dropped(self) -> list[Node]:
        """With the lock held: for ``bury``."""
        dropped, self.table.dropped = self.table.dropped, []
        return dropped

    def bury(self, nodes: list[Node]) -> None:
        """Close what nodes that are gone still have open, now or when nobody uses them any more."""
        for node in nodes:
            self.close_data(node)
            self.keepsakes.give_up_node(node.number)
            with self.lock:
                if node.uses:
                    continue  # ``release``
                closing = self.held.let_go(node)
            self._unwatch(node, closing)
            close_all(closing)

    def _unwatch(self, node: Node, descriptors: list[int]) -> None:
        """``descriptors`` are what it had. Without one, its mark is reached by its last name."""
        if node.watch is None:
            return
        if descriptors or (directory := self._last_directory(node)) is None:
            self.unwatch(node, descriptors[-1] if descriptors else -1, b"")
            return
        try:
            assert node.last is not None
            self.unwatch(node, directory.descriptor, node.last[1])
        finally:
            self.release(directory)

    def _last_directory(self, node: Node) -> Node | None:
        """That in which it had its last name, with one use more; None if that is not held."""
        if node.last is None:
            return None
        with self.lock:
            directory = self.table.by_number.get(node.last[0])
            if directory is None or directory.descriptor < 0:
                return None
            self.held.use(directory)
            return directory

    # --- so that there are not too many ------------------------------------------------------------

    def opening(self, attempt: Callable[[], int]) -> int:
        """``attempt``, again with fewer descriptors held, of all shares, if there was none left."""
        try:
            return attempt()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._budget.shed()
        return attempt()

    def shed(self) -> None:
        """Close half of what is idle: the process has run out of descriptors."""
        self.shed_data()
        with self.lock:
            closing = self.held.halve()
        close_all(closing)

    def trim(self) -> None:
        """Close what is too much by now."""
        self.trim_data()
        with self.lock:
            closing = self.held.trim()
        close_all(closing)

    def close(self) -> None:
        self._budget.leave(self)
        with self.lock:
            closing = self.held.let_go_all()
        close_all(closing)


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
