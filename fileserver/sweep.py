"""Files that were deleted on the host while the guest still knows them: it is told, so that their disk space is given
back."""

from __future__ import annotations

import stat
from typing import Final

from fileserver import linux
from fileserver.nodes import Link, Node
from fileserver.registry import Registry, close_all

SWEEP: Final = 10.0
"""Seconds between looks. The guest is told after two looks at a file that it did not use in between."""

SWEPT_AT_ONCE: Final = 2048
"""Descriptors looked at in one sweep: about 2 ms."""


class Sweep:
    """Of one share."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._due = 0.0

    def look(self, now: float) -> list[Link]:
        """The names that the guest has of files which were deleted on the host and which it did not use lately.

        Each is returned once. The file is held until the guest forgets it: it may have it open.
        """
        if now < self._due:
            return []
        self._due = now + SWEEP
        with self._registry.lock:
            quiet = self._registry.held.take_quiet(SWEPT_AT_ONCE)
        return [link for node in quiet for link in self._deleted(node)]

    def _deleted(self, node: Node) -> tuple[Link, ...]:
        """The names of a node with one use, which is given back, if it is a file that has none any more."""
        registry = self._registry
        try:
            links_left = linux.fstatx(node.descriptor).nlink
        except OSError:  # of a network filesystem, say; it is no worse off than before
            links_left = 1
        with registry.lock:
            gone = not links_left and node.kind == stat.S_IFREG and registry.held.pin_deleted(node)
            node.uses -= 1
            closing = [] if node.uses else registry.held.let_go(node)
            links = node.links if gone else ()
            if gone:
                registry.keepsakes.keep_node(node.number, node.descriptor)
        close_all(closing)
        return links
