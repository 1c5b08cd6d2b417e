"""Names of extended attributes, as far as the host has promised them: nearly always none.

cp(1), tar(1) and rsync(1) ask for those of each file that they copy, and no kernel remembers them. (ls(1) is told that
there is nothing that it looks for: ``attributes``.) So whoever asks for one file's is told at once which of the other
files in its directory have none. The promise is that of the attributes: of a host program that sets one the guest is
told (FAN_ATTRIB). Values are not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from guest_agent.fuse.host import Ask
from protocol.files import ATTRIBUTES, MAX_MANY, Changed, ListXattr, XattrNames

MAX_KNOWN: Final = 65_536
"""Nodes, some 100 bytes each."""


class Asker(Protocol):
    """The host."""

    def ask(self, call: ListXattr) -> Ask[XattrNames]: ...


class Xattrs:
    """Of one mount. ``beside``: the nodes of names that are in one directory with a node, as far as they are known."""

    def __init__(self, host: Asker, share: int, beside: Callable[[int], Sequence[int]]) -> None:
        self._host = host
        self._share = share
        self._beside = beside
        self._known: OrderedDict[int, bytes] = OrderedDict()
        """Each name ends with a NUL."""
        self._pending = 0
        self._changed: set[int] = set()
        """While something is pending: of what has changed since it was asked for nothing is believed."""
        self._voided = 0

    def known(self, node: int) -> bytes | None:
        """The names of a node, if they are promised."""
        return self._known.get(node)

    async def ask(self, unique: int, node: int, *, keep: bool) -> bytes:
        """The same from the host. ``keep``: what it promises may be believed."""
        others = self._others(node) if keep else []
        self._pending += 1
        voided = self._voided
        try:
            names = await self._host.ask(ListXattr(self._share, unique, node, others))
            if keep and voided == self._voided:
                for bare in names.bare:
                    self._learn(bare, b"")
                if names.promise & ATTRIBUTES:
                    self._learn(node, names.data)
        finally:
            self._pending -= 1
            if not self._pending:
                self._changed.clear()
        return names.data

    def _others(self, node: int) -> list[int]:
        """Those that follow it first: whoever reads the directory has asked for those before."""
        known, beside = self._known, self._beside(node)
        if node not in beside:
            return []
        at = beside.index(node)
        following = (other for part in (beside[at + 1 :], beside[:at]) for other in part)
        return [other for other in following if other and other not in known][:MAX_MANY]

    def _learn(self, node: int, names: bytes) -> None:
        if node not in self._changed:
            self._known[node] = names
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        self.drop(*changed.nodes, *changed.attributes_only, *changed.directories)

    def drop(self, *nodes: int) -> None:
        """They have changed, or nobody tells any more whether they do."""
        for node in nodes:
            self._known.pop(node, None)
        if self._pending:
            self._changed.update(nodes)

    def void(self) -> None:
        """Nothing is promised any more, nor by what is still to come."""
        self._known.clear()
        self._voided += 1
