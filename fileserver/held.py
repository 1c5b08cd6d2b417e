"""Which O_PATH descriptors are kept open: bookkeeping for ``registry``, which holds the lock and does the closing.

Every method that returns descriptors has taken them out; the caller closes them once it has let go of the lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

from fileserver.nodes import Node
from protocol.files import ROOT

_Nodes: TypeAlias = "OrderedDict[Node, None]"


class Held:
    """The nodes that have a descriptor, but the root: those with a name, the least recently used first, and those
    that are pinned because they have lost their last one. At most ``limit()`` of each, not counting those in use."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._named: _Nodes = OrderedDict()
        self._pinned: _Nodes = OrderedDict()
        self._looked_at = 0

    def __len__(self) -> int:
        return len(self._named) + len(self._pinned)

    def use(self, node: Node) -> None:
        """One use more of a node that has a descriptor."""
        node.uses += 1
        node.idle = False
        if not node.pinned and node.number != ROOT:
            self._named.move_to_end(node)

    def install(self, node: Node, descriptor: int) -> list[int]:
        """``descriptor`` becomes the node's, unless it has one or is gone; if not gone, it has one use more."""
        if node.dead:
            return [descriptor]
        if node.descriptor >= 0:
            self.use(node)
            return [descriptor]
        node.descriptor = descriptor
        self._named[node] = None
        self.use(node)
        return self._evict(self._named, self._limit())

    def replace(self, node: Node, descriptor: int) -> list[int]:
        """As ``install``, but ``descriptor`` is the better one: what the node has is closed when nobody uses it."""
        if not node.dead and node.descriptor >= 0:
            node.retired = (*node.retired, node.descriptor)
            node.descriptor = descriptor
            self.use(node)
            return []
        return self.install(node, descriptor)

    def pin(self, node: Node | None) -> list[int]:
        """The node has lost a name. Keep it if that was the last."""
        if node is None or node.links or node.dead or node.pinned or node.descriptor < 0:
            return []
        node.pinned = True
        del self._named[node]
        self._pinned[node] = None
        return self._evict(self._pinned, self._limit())

    def pin_deleted(self, node: Node) -> bool:
        """The node was deleted on the host, and can only be reached by its descriptor. True if that is news."""
        if node.pinned or node.dead or node.descriptor < 0:
            return False
        node.pinned = True
        del self._named[node]
        self._pinned[node] = None
        return True

    def unpin(self, node: Node) -> None:
        """The node has got a name."""
        if node.pinned:
            node.pinned = False
            del self._pinned[node]
            self._named[node] = None

    def halve(self) -> list[int]:
        """The process has no descriptors left."""
        return self._evict(self._named, len(self._named) // 2)

    def trim(self) -> list[int]:
        """The limit is lower than it was."""
        limit = self._limit()
        return self._evict(self._named, limit) + self._evict(self._pinned, limit)

    @staticmethod
    def _evict(nodes: _Nodes, limit: int) -> list[int]:
        closing: list[int] = []
        looks = len(nodes) if len(nodes) > limit else 0
        while len(nodes) > limit and looks > 0:
            looks -= 1
            node, _ = nodes.popitem(last=False)
            if node.uses:
                nodes[node] = None
                continue
            closing.append(node.descriptor)
            node.descriptor, node.pinned = -1, False
        return closing

    def let_go(self, node: Node) -> list[int]:
        """Of a node that nobody uses: what was replaced; and everything if it is dead."""
        closing = [*node.retired]
        node.retired = ()
        if node.descriptor >= 0 and node.dead:
            closing.append(node.descriptor)
            node.descriptor = -1
            self._named.pop(node, None)
            self._pinned.pop(node, None)
        return closing

    def let_go_all(self) -> list[int]:
        nodes = [*self._named, *self._pinned]
        closing = [node.descriptor for node in nodes]
        for node in nodes:
            node.descriptor, node.pinned = -1, False
        self._named.clear()
        self._pinned.clear()
        return closing

    def take_quiet(self, most: int) -> list[Node]:
        """Of the next ``most`` nodes, going round: those that nobody used since the last look at them, each with
        one use more."""
        nodes = list(self._named)
        if self._looked_at >= len(nodes):
            self._looked_at = 0
        looked_at = nodes[self._looked_at : self._looked_at + most]
        self._looked_at += most
        quiet = [node for node in looked_at if node.idle and not node.uses]
        for node in looked_at:
            node.idle = True
        for node in quiet:
            node.uses += 1
        return quiet
