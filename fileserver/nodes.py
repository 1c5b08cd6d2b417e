"""The files a guest knows of: which number stands for which file, and under which names.

The law: a number stands for one file for ever. What a file is, its ``Identity``, is its device, its inode
number and the time it was made, since inode numbers are used again. Names are links from a directory's
*node*, not paths, so that moving a directory costs nothing, however much is in it.

``NodeTable`` is bookkeeping only: it makes no system call and takes no lock. ``registry`` owns the lock under
which it is used, and the descriptors.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from fileserver.linux import failure
from protocol.files import ROOT

if TYPE_CHECKING:
    from fileserver.datafiles import OpenFile
    from fileserver.watches import Watch

Key: TypeAlias = tuple[int, int, int]
"""An ``Identity`` as a plain tuple: what a dict of nodes is asked for on every lookup."""

Link: TypeAlias = tuple[int, bytes]
"""The node of a directory, and a name in it."""

MAX_NODES: Final = 1 << 22
"""Files that a guest may hold on to, then it gets ENFILE: 3 to 4 GiB of this process's memory."""

MAX_LINKS: Final = 64
"""Names remembered of one file. Any one is enough to find it again; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a file this file: st_dev, st_ino, and when it was made, ns since the epoch (0: the
    filesystem does not say)."""

    device: int
    inode: int
    birth_ns: int


@dataclass(frozen=True, slots=True)
class RestoredNode:
    """What an earlier process of this server told its ``Recorder`` about a node; and the O_PATH descriptor that it
    had of it, if that was kept (else -1). Whoever restores it owns that."""

    node: int
    lookups: int
    identity: Identity
    links: list[Link] = field(default_factory=list)
    descriptor: int = -1


class Recorder(Protocol):
    """Is told what a successor must know so that a guest's nodes outlive this process.

    Called by whichever thread makes the change, before the reply can reach the guest, and with the
    table's lock held, so in the order in which things happened. So it must be quick, and never call back.
    """

    def node(self, node: int, parent: int, name: bytes, identity: Identity) -> None:
        """The node came to be with this name, or got it as another name. The root and files
        without a name have parent 0 and the name ``b""``."""

    def unlinked(self, node: int, parent: int, name: bytes) -> None:
        """The node has lost this name."""

    def counted(self, node: int, lookups: int) -> None:
        """The guest now holds this many lookups of the node. 0: it is forgotten."""


class Shared(IntEnum):
    """Whether programs of the host have a file open for writing. Promised is only what is shared with nobody."""

    WITH_NOBODY = 0
    PERHAPS = 1  # this process has it open for writing itself, or the kernel does not say
    WITH_WRITERS = 2


class Node:
    """One file that the guest has a number for. The fields belong to the module named beside them."""

    __slots__ = (
        "base",
        "below",
        "confirmed",
        "dead",
        "descriptor",
        "doubt",
        "given",
        "heard",
        "idle",
        "key",
        "kind",
        "last",
        "links",
        "listed",
        "lock",
        "locked",
        "lookups",
        "lost",
        "number",
        "pinned",
        "reader",
        "retired",
        "sealed",
        "shared",
        "shelved",
        "told",
        "uses",
        "version",
        "watch",
        "writer",
    )

    def __init__(self, number: int, key: Key, kind: int, sealed: bool) -> None:
        self.number = number
        self.key = key
        self.kind = kind  # S_IFMT of the mode; 0 until a restored node has been seen
        self.sealed = sealed  # a directory whose content the guest must not see
        self.links: tuple[Link, ...] = ()
        self.last: Link | None = None  # of a dead one: where it may still be
        self.lookups = 0
        self.below = 0  # names in the table that have this node as their directory
        self.shelved = False  # forgotten, and only kept because of what is below
        self.dead = False  # gone from the table, or of a root that was replaced
        # reach: an O_PATH descriptor (-1: none), and how many calls are using it right now
        self.descriptor = -1
        self.uses = 0
        self.retired: tuple[int, ...] = ()
        self.pinned = False
        self.idle = False
        self.lost = False
        self.confirmed = 0.0  # confinement: until when it counts as below the root (monotonic)
        # signatures: of the data that the guest was given
        self.base: tuple[int, ...] | None = None
        self.doubt = False
        self.heard: int | None = None
        self.told = -1  # signatures.UNKNOWN
        # watches: its own
        self.watch: Watch | None = None
        self.version = 0
        # promises: what the guest was promised (a number for it; 0: nothing), whether that was told by the list of a
        # directory, and whether others may be writing it
        self.given = 0
        self.listed = False
        self.shared = Shared.WITH_NOBODY
        # datafiles: open for data, and whether it ever was for a lock
        self.reader: OpenFile | None = None
        self.writer: OpenFile | None = None
        self.locked = False
        self.lock = threading.Lock()  # one writer at a time: a write is compared with what was before it


next_version: Final = itertools.count(1).__next__


def move(node: Node) -> int:
    """What was read of the node before now cannot be promised any more (``watches``). Its new version, which is nobody
    else's, whichever threads do this at once."""
    version = node.version = next_version()
    return version


class NodeTable:
    """Numbers, identities and names. The caller holds the lock."""

    def __init__(
        self, recorder: Recorder, next_node: Callable[[], int] | None, sealed: Container[tuple[int, int]]
    ) -> None:
        self._recorder = recorder
        self._next = next_node or itertools.count(ROOT + 1).__next__
        self._counts_itself = next_node is None
        self._sealed = sealed
        self.by_number: dict[int, Node] = {}
        self.by_key: dict[Key, Node] = {}
        self.by_name: dict[Link, Node] = {}
        self.root = Node(ROOT, (0, 0, 0), 0, False)
        self.by_number[ROOT] = self.root
        self.dropped: list[
            Node
        ] = []  # gone from the table; whoever called takes them and closes what they have open
        self.outdated: list[tuple[Link, Node]] = []
        """Names that are not in the table any more, though the guest may know them, and was not told. Whoever called
        takes them and has that done."""

    def is_sealed(self, key: Key) -> bool:
        return (key[0], key[1]) in self._sealed

    def reseal(self) -> None:
        """More is sealed than before."""
        for node in self.by_number.values():
            node.sealed = self.is_sealed(node.key)

    # --- coming to be ------------------------------------------------------------------------------

    def found(self, key: Key, kind: int) -> Node:
        """The node of a file, new or known. Raises ENFILE."""
        node = self.by_key.get(key)
        if node is not None:
            node.kind = kind
            return node
        if len(self.by_number) >= MAX_NODES:
            raise failure(errno.ENFILE)
        node = Node(self._next(), key, kind, self.is_sealed(key))
        self.by_number[node.number] = self.by_key[key] = node
        return node

    def name(self, node: Node, directory: Node, name: bytes, *, only: bool) -> None:
        """``node`` is what ``name`` in ``directory`` stands for. ``only``: it can have no other name (a directory)."""
        link = (directory.number, name)
        before = self.by_name.get(link)
        if before is node:
            return
        directory.below += 1  # first: a directory that is being left for good is dropped
        if before is not None:
            self.unname(link)
        for other in self._superseded(node, only):
            self.unname(other)
            self.outdated.append((other, node))
        self.by_name[link] = node
        node.links = (*node.links, link)
        self._recorder.node(node.number, directory.number, name, Identity(*node.key))

    def _superseded(self, node: Node, only: bool) -> tuple[Link, ...]:
        if only:
            return node.links
        return node.links[: max(0, len(node.links) + 1 - MAX_LINKS)]

    def unnamed(self, node: Node) -> None:
        """A file came to be that has no name."""
        self._recorder.node(node.number, 0, b"", Identity(*node.key))

    def unname(self, link: Link) -> Node | None:
        """The file, if any is known, has lost this name."""
        node = self.by_name.pop(link, None)
        if node is None:
            return None
        node.links = tuple(other for other in node.links if other != link)
        self._recorder.unlinked(node.number, *link)
        self._leave(link[0])
        return node

    def moved(self, source: Link, target: Link, directory: Node, *, exchange: bool) -> Node | None:
        """renameat2(2) was done; ``directory`` is the target's. The file whose name was taken over, if known."""
        node, other = self.by_name.get(source), self.by_name.get(target)
        if node is not None and node is other:
            return None  # two names of one file: rename(2) does nothing
        origin = self.by_number.get(source[0])
        if node is None:
            self.unname(target)
        else:  # the new name is recorded before the old one goes: a successor finds the file by either
            self.name(node, directory, target[1], only=False)
            self.unname(source)
        if exchange and other is not None and origin is not None:
            self.name(other, origin, source[1], only=False)
        return other

    def _leave(self, directory: int) -> None:
        """A name in ``directory`` is gone from the table. A directory that the guest forgot earlier than what
        is in it was kept to find that again."""
        leaving = [directory]
        while leaving:
            node = self.by_number.get(leaving.pop())
            if node is None:
                continue
            node.below -= 1
            if not node.below and not node.lookups and node is not self.root:
                leaving += [link[0] for link in self._drop(node)]

    def _drop(self, node: Node) -> tuple[Link, ...]:
        """Out of the table. The names it had."""
        links, node.links, node.last = node.links, (), node.links[-1] if node.links else None
        for link in links:
            del self.by_name[link]
        del self.by_number[node.number]
        if self.by_key.get(node.key) is node:
            del self.by_key[node.key]
        node.dead = True
        self.dropped.append(node)
        return links

    # --- counting ----------------------------------------------------------------------------------

    def count(self, node: Node) -> None:
        """An ``Entry`` of the node is being sent."""
        if node.shelved:
            node.shelved = False
            for directory, name in node.links:
                self._recorder.node(node.number, directory, name, Identity(*node.key))
        node.lookups += 1
        self._recorder.counted(node.number, node.lookups)

    def forget(self, number: int, count: int) -> None:
        """Lookups are given back; with the last one, the file is."""
        node = self.by_number.get(number)
        if node is None or node is self.root or count <= 0 or not node.lookups:
            return
        node.lookups = max(0, node.lookups - count)
        self._recorder.counted(number, node.lookups)
        if node.lookups:
            return
        if node.below:
            node.shelved = True
            return
        for link in self._drop(node):
            self._leave(link[0])

    # --- all at once -------------------------------------------------------------------------------

    def abandon(self) -> list[Node]:
        """The root is another directory now: no file of before can be meant again. Their numbers stay taken."""
        nodes = [node for node in self.by_number.values() if node is not self.root]
        for node in nodes:
            for link in node.links:
                self._recorder.unlinked(node.number, *link)
            node.links, node.below, node.dead = (), 0, True
        self.by_key.clear()
        self.by_name.clear()
        self.root.below = 0
        return nodes

    def root_is(self, key: Key, kind: int) -> None:
        self.root.key, self.root.kind, self.root.sealed = key, kind, self.is_sealed(key)
        self._recorder.node(ROOT, 0, b"", Identity(*key))

    def restore(self, nodes: Iterable[RestoredNode]) -> None:
        """Nodes of an earlier process. What the guest has of their data is not known."""
        for old in nodes:
            if old.node <= ROOT or old.lookups <= 0 or old.node in self.by_number:
                continue
            key = (old.identity.device, old.identity.inode, old.identity.birth_ns)
            node = Node(old.node, key, 0, self.is_sealed(key))
            node.lookups = old.lookups
            node.base, node.doubt, node.told = (), True, -1
            node.links = tuple(link for link in old.links if link[0] >= ROOT and link not in self.by_name)
            self.by_name.update(dict.fromkeys(node.links, node))
            self.by_number[node.number] = node
            self.by_key.setdefault(key, node)
        for parent, _ in self.by_name:
            if (directory := self.by_number.get(parent)) is not None:
                directory.below += 1
        if self._counts_itself:
            self._next = itertools.count(max(self.by_number) + 1).__next__
