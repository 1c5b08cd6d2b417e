"""What the host has promised to the kernel of one mount, and how that is taken back.

What is promised the kernel keeps for ever. The host says when it ends (``protocol.files.Changed``), and then the
kernel is told. The laws:

- **Barrier first.** INVAL_INODE finds nothing while an answer that brings the inode is written and its receiver has
  not stored it yet; what is stored after that would live for ever. Such an answer is a LOOKUP's or a READDIR's, which
  holds the lock of its directory, and INVAL_ENTRY waits for that lock, also with a name that is not there. So an
  invalidation is a *sequence*, written by one thread: names of a directory, or the barrier, and then inodes.
  (From Linux 6.19 on a name that is not there takes no lock. No guest of ours has that.)
- Attributes that are on their way without that lock (GETATTR, a name that is looked at again) are given up by the
  kernel itself, since INVAL_INODE raises the inode's attr_version (fuse_change_attributes).
- **Own changes** of a directory make the kernel ask for its attributes again, but do not raise that version
  (fuse_dir_changed): a promised answer from before could be stored after. So the first own change in a directory has
  its attributes dropped, and until ``SETTLED`` seconds after the last one they are not promised.
- **Names that are not there** only the kernel knows of: the host remembers files. So they are remembered here, up to
  ``MAX_ABSENT``, and taken back when the session ends in which they were promised.
- INVAL_ENTRY of a directory also unmounts what is mounted below it, a container's volumes for one. So a name is named
  only if it is something else now, or (``Changed.fresh``) if the kernel can have nothing but that there is none.
- What waits for the kernel is merged by directory, and never dropped. A host that has more to say than
  ``MAX_WAITING`` loses the session, and tells in the next one what differs.

Sources: fuse_reverse_inval_entry and fuse_dentry_revalidate in fs/fuse/dir.c, fuse_reverse_inval_inode in
fs/fuse/inode.c, Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice, repeat
from time import monotonic
from typing import Final, Protocol, TypeVar

from guest_agent.fuse import abi
from protocol.errors import RemoteProtocolError
from protocol.files import Changed

T = TypeVar("T")

MAX_ABSENT: Final = 65_536
"""Names that are not there: those that a compiler looks for in vain. Some 200 bytes each, 13 MB."""

MAX_WAITING: Final = 1 << 20
"""Names and nodes that wait for the kernel, which takes tens of thousands a second unless their locks are held."""

MAX_UNDER_WAY: Final = 16
"""Sequences that the writer process has for its 8 threads; what comes meanwhile is merged here."""

MAX_SEQUENCE: Final = 256
"""Names in one sequence, and as many nodes: behind a large one stands nothing for long."""

SETTLED: Final = 1.0
"""Seconds after the last own change in a directory until its attributes are promised again."""

BARRIER: Final = b"\x01barrier"
"""A name that nobody uses. If somebody does, the kernel asks for it once more."""


class Writer(Protocol):
    """Of ``notifier.Notifier``, what is needed here."""

    def sequence(self, notifications: bytes, then: Callable[[], None]) -> None: ...


class _Place:
    """What is to be taken back in one directory."""

    __slots__ = ("above", "expired", "itself", "names", "nodes")

    def __init__(self) -> None:
        self.names: dict[bytes, None] = {}
        self.expired: dict[bytes, None] = {}
        """Names that stay, and are to be asked for."""
        self.nodes: dict[int, None] = {}
        self.itself = False
        """Its own attributes, and the list of its names."""
        self.above: dict[int, None] = {}
        """Directories by whose names it is known."""


class Promises:
    """Of one mount. ``clock``: seconds."""

    def __init__(self, writer: Writer, clock: Callable[[], float] = monotonic) -> None:
        self._writer = writer
        self._clock = clock
        self._absent: dict[tuple[int, bytes], None] = {}
        self._unsettled: dict[int, float] = {}
        """Directories that the guest has changed, and when they will be settled."""
        self._places: dict[int, _Place] = {}
        """What waits for the kernel, by directory; 0: what no directory's lock is known for."""
        self._attributes: dict[int, None] = {}
        """Nodes whose attributes wait to be dropped, and nothing else of theirs."""
        self._poor: dict[int, None] = {}
        """Directories whose pages wait to be dropped, though they are right."""
        self._waiting = 0
        self._under_way = 0

    # --- what is promised ----------------------------------------------------------------------------

    def absent(self, directory: int, name: bytes) -> None:
        """The kernel is about to be told, for ever, that there is no such name."""
        if len(self._absent) >= MAX_ABSENT:
            for oldest in list(islice(self._absent, MAX_ABSENT // 64)):
                del self._absent[oldest]
                self._take_back_name(*oldest)
            self._pump()
        self._absent[directory, name] = None

    def is_settled(self, directory: int) -> bool:
        """Whether the guest has left the directory alone for long enough for its attributes to be promised."""
        if not self._unsettled or (until := self._unsettled.get(directory)) is None:
            return True
        if self._clock() < until:
            return False
        del self._unsettled[directory]
        return True

    def unsettled(self, nodes: Sequence[int]) -> list[int]:
        """Those of ``nodes`` that are not settled."""
        if not self._unsettled:
            return []
        return [node for node in self._unsettled.keys() & nodes if not self.is_settled(node)]

    def name_changed(self, directory: int, name: bytes) -> None:
        """The guest itself has made or removed ``name``, and its kernel is about to be told."""
        self._name_changed(directory, name)
        self._pump()

    def renamed(self, old: tuple[int, bytes], new: tuple[int, bytes], node: int, *, expire: bool) -> None:
        """The guest itself has renamed ``node`` (0: it is not known which), and its kernel is about to be told.

        ``expire``: the kernel takes along for how long the old name was promised, and the new one is not.
        """
        self._name_changed(*old)
        self._name_changed(*new)
        if node:
            self._attributes[node] = None  # its ctime, as with a directory's
        if expire:
            for directory, name in (old, new):
                self._place(directory).expired[name] = None
        self._pump()

    def _name_changed(self, directory: int, name: bytes) -> None:
        self._absent.pop((directory, name), None)
        if self.is_settled(directory):
            self._attributes[directory] = None
            if len(self._unsettled) >= MAX_ABSENT:
                now = self._clock()
                self._unsettled = {one: until for one, until in self._unsettled.items() if now < until}
        self._unsettled[directory] = self._clock() + SETTLED

    # --- and taken back ------------------------------------------------------------------------------

    def take_back(self, changed: Changed) -> None:
        """What the host says. Raises ``RemoteProtocolError`` if that is too much."""
        fresh = chain(changed.fresh, repeat(False))
        for directory, name, is_fresh in zip(changed.parents, changed.names, fresh, strict=False):
            was_absent = self._absent.pop((directory, name), False) is None
            if was_absent or not is_fresh:
                self._take_back_name(directory, name)
        for node, directory in zip(changed.nodes, changed.through, strict=False):
            self._take_back_node(node, directory)
        for directory, above in zip(changed.directories, chain(changed.above, repeat(0)), strict=False):
            self._take_back_directory(directory, above)
        self._attributes.update(dict.fromkeys(changed.attributes_only))
        if self._waiting + len(self._places) + len(self._attributes) > MAX_WAITING:
            raise RemoteProtocolError(f"more than {MAX_WAITING} changes wait for the guest's kernel")
        self._pump()

    def drop_pages(self, directories: Sequence[int]) -> None:
        """Have the kernel ask for their names anew. What it has is right, so there is no barrier, and no hurry."""
        self._poor.update(dict.fromkeys(reversed(directories)))  # the last is taken first
        self._pump()

    def void(self) -> None:
        """The session has ended, and with it all that was promised in it.

        Of what exists the host of the next one knows what it has said, and tells what differs.
        """
        for directory, name in self._absent:
            self._take_back_name(directory, name)
        self._absent.clear()
        self._pump()

    def _place(self, directory: int) -> _Place:
        if (place := self._places.get(directory)) is None:
            place = self._places[directory] = _Place()
        return place

    def _take_back_name(self, directory: int, name: bytes) -> None:
        names = self._place(directory).names
        self._waiting += name not in names
        names[name] = None

    def _take_back_node(self, node: int, through: int) -> None:
        nodes = self._place(through).nodes
        self._waiting += node not in nodes
        nodes[node] = None

    def _take_back_directory(self, directory: int, above: int) -> None:
        place = self._place(directory)
        place.itself = True
        if above:
            place.above[above] = None

    # --- sequences -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        while self._under_way < MAX_UNDER_WAY and (self._places or self._attributes or self._poor):
            self._under_way += 1
            self._writer.sequence(b"".join(self._next()), self._done)

    def _done(self) -> None:
        self._under_way -= 1
        self._pump()

    def _next(self) -> list[bytes]:
        if self._attributes:
            return [abi.inval_inode(node, -1, 0) for node in _take(self._attributes)]
        if not self._places:
            return [abi.inval_inode(node, 0, 0) for node in _take(self._poor)]
        directory = next(iter(self._places))
        place = self._places.pop(directory)
        names = _take(place.names)
        sequence = [abi.inval_entry(directory, name) for name in names]
        self._waiting -= len(names)
        if place.names:
            self._places[directory] = place  # behind all others
            return sequence
        sequence += [abi.inval_entry(directory, name, expire=True) for name in _take(place.expired)]
        if not sequence and directory:
            sequence.append(abi.inval_entry(directory, BARRIER))
        nodes = _take(place.nodes)
        sequence += [abi.inval_inode(node, 0, 0) for node in nodes]
        self._waiting -= len(nodes)
        if place.itself:
            sequence += [abi.inval_entry(above, BARRIER) for above in _take(place.above)]
            sequence.append(abi.inval_inode(directory, 0, 0))
        if place.expired or place.nodes or place.above:
            self._places[directory] = place
        return sequence


def _take(things: dict[T, None]) -> list[T]:
    """As many as one sequence should have, which are then no longer in ``things``."""
    return [things.popitem()[0] for _ in range(min(len(things), MAX_SEQUENCE))]
