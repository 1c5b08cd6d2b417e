"""Directories in memory: names with their nodes and attributes, as the host has promised them, ready for the kernel.

A page of READDIRPLUS is a slice of a piece (``pieces``), and a LOOKUP a binary search and a slice; an emulated guest
has no time for more (5 us for each step of a loop in Python).

The laws:
- Each record with a node counts one lookup on the host. It is *given* to the kernel once, in a page or for a LOOKUP,
  and the kernel gives it back. Afterwards it is shown without its node ("nothing is known of it",
  fuse_direntplus_link), and whoever looks it up asks the host. What is dropped before it was given is given back here.
- A name that a promised piece would have and has not does not exist; whether other pieces are here or not.
- Of a name that the guest has removed the host says whether it is gone for good. That is believed for as long as
  nothing is heard of the directory, whether anything else of it is here or not.
- Of what the host says has changed nothing is kept. Own changes it does not tell: a name that the guest has made or
  removed, and a node that it has written to, is asked for, for as long as anything is here that was asked for before.
- With the last lookup of a node goes the host's promise, without a word. So of a node that the kernel forgets no
  attributes are believed any more; and a directory that it forgets, or whose own lookup is given back, is dropped.
- ``MAX_HELD`` bytes, least recently used first.

Sans-IO.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from enum import Enum
from itertools import chain, islice
from typing import Final

from guest_agent.fuse.pieces import Order, Piece
from protocol.files import MAX_NAME, Changed, position

MAX_HELD: Final = 32 << 20
"""Bytes: 170,000 names of 16 bytes."""

MAX_MARKED: Final = 65_536
"""Changes that are remembered, of nodes, and of names in one directory. With more it is cheaper to ask for all anew."""

MAX_KNOWN: Final = 16_384
"""Nodes of which single attributes are kept; 250 bytes each."""

MAX_GONE: Final = 1024
"""Directories in which the guest has removed names..."""
MAX_GONE_OF_ONE: Final = 256
"""...and so many of them in one."""

MOST_SORTED: Final = 8
"""Pieces of a directory of which the names are sorted: 6,000 names, 10 ms, or 0.1 s in emulation."""

File = tuple[int, int]
"""Its node and its size."""

ATTR_TYPE: Final = 61
"""Of an ``ATTR``, the byte with the type of the file in its upper half (4: a directory)."""

_NEAR: Final = 128
"""Pieces whose ranges of nodes may overlap: as many as were asked for at once, with directories numbered before."""


def is_directory(attr: bytes) -> bool:
    """Whether an ``ATTR`` is that of a directory."""
    return attr[ATTR_TYPE] & 0xF0 == 0x40


class NameChange(Enum):
    """What the guest itself has done to a name."""

    MADE = 0
    """No file that was there before has other attributes for it, but the one that was linked."""
    UNLINKED = 1
    """Removed, or renamed: no directory's. Of which file is not known, unless the host says so."""
    MOVED = 2
    """The same of what is a directory, or may be one."""


class _Directory:
    """Those of the pieces of one directory that are here."""

    __slots__ = ("asked", "listable", "marked", "node", "pieces")

    def __init__(self, node: int, asked: int) -> None:
        self.node = node
        self.asked = asked
        """When the first piece was asked for."""
        self.pieces: list[Piece] = []  # in the order of ``after``
        self.marked: set[bytes] = set()
        """Names that the guest has changed."""
        self.listable = True
        """Whoever begins to read the directory may be given these pieces: they are promised, and nothing is marked."""

    def with_position(self, at: int) -> Piece | None:
        """The piece that would have a record with this ``off``, if its records go that far."""
        index = bisect_left(self.pieces, at, key=_after) - 1
        return self.pieces[index] if index >= 0 else None


def _sorted(directory: _Directory, order: Order) -> list[File]:
    pieces = islice(directory.pieces, MOST_SORTED)
    keyed = chain.from_iterable(piece.keyed_files(order) for piece in pieces)
    return [(node, size) for _, node, size in sorted(keyed)]


def _after(piece: Piece) -> int:
    return piece.after


def _lowest(piece: Piece) -> int:
    return piece.lowest


class Directories:
    """Of one mount. ``give_back`` takes the nodes of which one lookup each is not used. ``doubtful`` says of which
    nodes nothing may be promised just now. ``lost`` is told of which nodes no lookup may be left, and no promise."""

    def __init__(
        self,
        give_back: Callable[[Sequence[int]], None],
        doubtful: Callable[[Sequence[int]], Collection[int]],
        lost: Callable[[Collection[int]], None] = lambda nodes: None,
    ) -> None:
        self._give_back, self._lost = give_back, lost
        self._doubtful = doubtful
        self._directories: dict[int, _Directory] = {}
        self._recent: OrderedDict[Piece, _Directory] = OrderedDict()
        """All pieces, least recently used first."""
        self._held = 0
        self._now = 0
        self._void = 0
        """Of what was asked for before that, nothing is believed."""
        self._pending = 0
        self._touched: dict[int, int] = {}
        """Nodes that have changed, and when: what was asked for before says nothing of them."""
        self._by_lowest: list[Piece] = []
        """All pieces. The host numbers nodes one after the other, so each has a range of them, more or less its own."""
        self._known: OrderedDict[int, tuple[bytes, int]] = OrderedDict()
        """Attributes that were promised of single nodes, and since when they are known, the latest last."""
        self._gone: OrderedDict[int, set[bytes]] = OrderedDict()
        """By directory, names that the guest has removed and that nobody has."""
        self._forgotten: set[int] = set()
        """Nodes that the kernel has forgotten: given records of them are promised no more, as of all nodes..."""
        self._forgotten_before = 0
        """...in pieces that were asked for until then."""
        self._relinked = -1
        """When the guest has taken a name from a file last, who knows which; its attributes tell how many it has."""
        self._moved = -1
        """The same of a directory, or of what may be one."""

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self._held

    def __contains__(self, node: int) -> bool:
        """Whether anything is here of a directory."""
        return node in self._directories

    # --- what comes ------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Something is about to be asked for; returns when that is. ``end`` says that it has come, or never will."""
        self._pending += 1
        self._now += 1
        return self._now

    def end(self) -> None:
        self._pending -= 1
        self._clear_touched()

    def keep(self, node: int, piece: Piece) -> bool:
        """Of ``node``: with a piece from the start, only that from now on. False if all of that was here already."""
        if piece.asked <= self._void:
            self.disbelieve(piece)
        found = self.find(node, piece.after)
        is_news = found is None or (found[0].bare and not piece.bare)
        held = frozenset(piece.nodes) if piece.promised else frozenset()
        if not piece.after:
            self._drop((node,), held)
        if (directory := self._directories.get(node)) is None:
            directory = self._directories[node] = _Directory(node, piece.asked)
        elif piece.asked < directory.asked and not piece.promised:
            return False  # it goes with one that was begun earlier
        before = directory.with_position(piece.after + 1)
        directory.listable = directory.listable and piece.promised
        insort(directory.pieces, piece, key=_after)
        self._recent[piece] = directory
        insort(self._by_lowest, piece, key=_lowest)
        self._held += piece.weight
        if before is not None and before.after == piece.after:
            self._drop(self._remove(before, directory, held))
        while self._held > MAX_HELD and len(self._recent) > 1:
            oldest, owner = next(iter(self._recent.items()))
            self.drop(*self._remove(oldest, owner))
        return is_news

    def disbelieve(self, piece: Piece) -> None:
        """Nothing that it says is promised, and of no node."""
        piece.promised = False
        self.drop(*self._let_go(piece))

    # --- what is asked for -----------------------------------------------------------------------------

    def find(self, node: int, off: int) -> tuple[Piece, int] | None:
        """Where to go on after ``off`` in a directory, if that is here."""
        if (directory := self._directories.get(node)) is None:
            return None
        if (piece := directory.with_position(off + 1)) is None or (index := piece.find(off)) is None:
            return None
        self._recent.move_to_end(piece)
        return piece, index

    def gap(self, node: int, name: bytes) -> int:
        """From where to list a directory so that the name would be in it."""
        at = position(name)
        directory = self._directories.get(node)
        if directory is None or (piece := directory.with_position(at)) is None:
            return 0
        return piece.after if piece.find(at - 1) is not None else piece.offs[-1]

    def is_bare(self, node: int, name: bytes) -> bool:
        """Whether a name would be in a piece of names only."""
        directory = self._directories.get(node)
        piece = None if directory is None else directory.with_position(position(name))
        return piece is not None and piece.bare

    def is_leaf_of_names(self, node: int) -> bool:
        """Whether all that is here of a directory is its names, and nothing of those below it."""
        directory = self._directories.get(node)
        return directory is not None and all(
            piece.bare and self._directories.keys().isdisjoint(piece.directories)
            for piece in directory.pieces
        )

    def is_one_piece(self, node: int) -> bool:
        """Whether all of a directory, or nothing, is in a single piece."""
        directory = self._directories.get(node)
        return directory is None or (len(directory.pieces) == 1 and directory.pieces[0].end)

    def is_listable(self, node: int) -> bool:
        """Whether whoever begins to read the directory may read what is here."""
        return (directory := self._directories.get(node)) is not None and directory.listable

    def page(self, piece: Piece, index: int, size: int) -> bytes:
        """The records from ``index`` on, ``size`` bytes at most, which are thereby given. Raises ``OSError`` if not
        even one is so small."""
        stop = piece.stop(index, size)
        doubtful = self._unsure(piece.nodes[index:stop], piece.asked)
        if doubtful or piece.given.find(1, index, stop) >= 0:
            return piece.without_nodes(index, stop, doubtful)
        piece.given[index:stop] = b"\1" * (stop - index)
        return piece.blob[piece.start(index) : piece.start(stop)]

    def lookup(self, node: int, name: bytes) -> bytes | None:
        """What a name stands for in a directory: struct fuse_entry_out, which is thereby given; empty if there is no
        such name; None if that must be asked."""
        if self._gone and name in self._gone.get(node, ()):
            return b""
        directory = self._directories.get(node)
        if directory is None or name in directory.marked or len(name) > MAX_NAME:
            return None
        if (found := self._search(directory, name)) is None:
            return None
        piece, index = found
        if index >= 0:
            return self._give(piece, index)
        self._recent.move_to_end(piece)
        return b""

    def _search(self, directory: _Directory, name: bytes) -> tuple[Piece, int] | None:
        """The record of a name; -1: there is none; None: that is not known."""
        at = position(name)
        piece = directory.with_position(at)
        if piece is None or not piece.promised:
            return None
        offs = piece.offs
        index = bisect_left(offs, at)
        while index < len(offs) and offs[index] == at:
            if piece.named(index, name):
                return piece, index
            index += 1  # another name with this hash: what has it too comes next
            at += 1
        return (piece, -1) if index < len(offs) or piece.end else None

    def attributes(self, node: int) -> bytes | None:
        """What is promised of the attributes of a node that the kernel knows, if that is here."""
        if (known := self._known.get(node)) is not None:
            attr, since = known
            if since > self._unknown_before(attr):
                return attr
            del self._known[node]
        piece = self._with(node)
        if (
            piece is None
            or not piece.promised
            or piece.asked <= self._forgotten_before
            or node in self._forgotten
        ):
            return None
        if self._touched.get(node, -1) >= piece.asked:
            return None
        self._recent.move_to_end(piece)
        return piece.attr(piece.nodes.index(node))

    def learn(self, node: int, attr: bytes, asked: int) -> None:
        """Attributes that are promised of a single node, and were asked for by ``begin``."""
        if asked > max(self._void, self._unknown_before(attr)) and self._touched.get(node, -1) < asked:
            self.know(node, attr)

    def know(self, node: int, attr: bytes) -> None:
        """The same of attributes that came with the answer that is being given now."""
        self._known[node] = attr, self._now
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _unknown_before(self, attr: bytes) -> int:
        """When the last of the guest's own changes was that may have been one of such a file's attributes."""
        return self._moved if is_directory(attr) else max(self._moved, self._relinked)

    def _give(self, piece: Piece, index: int) -> bytes | None:
        node = piece.nodes[index]
        if not node or piece.given[index] or self._unsure((node,), piece.asked):
            return None
        piece.given[index] = 1
        self._recent.move_to_end(piece)
        return piece.entry(index)

    def _unsure(self, nodes: Sequence[int], asked: int) -> Collection[int]:
        doubtful = self._doubtful(nodes)
        touched = self._touched
        if touched and not touched.keys().isdisjoint(nodes):
            return {*doubtful, *(node for node in nodes if touched.get(node, -1) >= asked)}
        return doubtful

    def directory_of(self, node: int) -> int:
        """That in which a node is, by a record that is here; 0 if there is none."""
        return 0 if (piece := self._with(node)) is None else self._recent[piece].node

    def following(self, node: int, order: Order) -> Iterator[File]:
        """The files that come after a file in its directory, as far as they are here."""
        if (piece := self._with(node)) is None:
            return iter(())
        directory = self._recent[piece]
        if order is Order.LISTED:
            others = directory.pieces[directory.pieces.index(piece) + 1 :]
            rest = piece.files(piece.nodes.index(node) + 1)
            return chain(rest, *(other.files() for other in others))
        files = _sorted(directory, order)
        place = next((at for at, file in enumerate(files) if file[0] == node), len(files))
        return islice(files, place + 1, None)

    def files_of(self, node: int, order: Order) -> Iterator[File] | None:
        """Those of a directory, as far as they are here; None if nothing is but names."""
        directory = self._directories.get(node)
        if directory is None or any(piece.bare for piece in directory.pieces):
            return None
        if order is Order.LISTED:
            return chain.from_iterable(piece.files() for piece in list(directory.pieces))
        return iter(_sorted(directory, order))

    def directories_after(self, node: int, order: Order) -> Iterator[int]:
        """The directories that come after this one in the one above, as far as they are here."""
        if (piece := self._with(node)) is None:
            return iter(())
        if order is Order.LISTED:
            below = piece.directories
        else:
            pieces = islice(self._recent[piece].pieces, MOST_SORTED)
            keyed = chain.from_iterable(each.keyed_directories(order) for each in pieces)
            below = [directory for _, directory in sorted(keyed)]
        return islice(below, below.index(node) + 1, None)

    def sorted_by_name(self, nodes: Sequence[int]) -> list[int]:
        """Directories of one listing, in the order of their names; those of which these are not here come last."""
        names: dict[int, bytes | int] = {}
        for node in nodes:
            if node not in names and (piece := self._with(node)) is not None:
                names.update((one, name) for name, one in piece.keyed_directories(Order.NAME))
        return sorted(nodes, key=lambda node: (node not in names, names.get(node, b"")))

    def neighbours(self, node: int) -> Sequence[int]:
        """The nodes of the piece that has a node, in the order of the directory; 0: not known."""
        return () if (piece := self._with(node)) is None else piece.nodes

    def _with(self, node: int) -> Piece | None:
        """A piece with a record of a node."""
        index = bisect_right(self._by_lowest, node, key=_lowest)
        near = reversed(self._by_lowest[max(index - _NEAR, 0) : index])
        return next((piece for piece in near if piece.highest >= node and node in piece.nodes), None)

    # --- what changes ----------------------------------------------------------------------------------

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        self.touch(*changed.nodes, *changed.attributes_only, *changed.directories, *changed.parents)
        for node in (*changed.parents, *changed.directories):
            self._gone.pop(node, None)
            self.drop(node)

    def name_changed(self, node: int, name: bytes, change: NameChange, whose: int = 0) -> None:
        """The guest itself has made or removed ``name`` of a directory. ``whose``: of which file that was one, if it is
        known and no directory."""
        self.touch(node)
        if (gone := self._gone.get(node)) is not None:
            gone.discard(name)
        if known := whose and change is NameChange.UNLINKED:
            self.touch(whose)
        elif change is not NameChange.MADE:
            if change is NameChange.UNLINKED:
                self._relinked = self._now
            else:
                self._moved = self._now
            self._now += 1
        if (directory := self._directories.get(node)) is not None:
            directory.listable = False
            if known or name in directory.marked:
                pass  # no other file has changed, or that was said already
            elif (found := self._search(directory, name)) and found[1] >= 0:
                self.touch(found[0].nodes[found[1]])
            directory.marked.add(name)
            if len(directory.marked) > MAX_MARKED:
                self.drop(node)

    def gone(self, node: int, name: bytes) -> None:
        """The host has promised that there is no such name, of one that was ``name_changed`` with this answer."""
        names = self._gone.setdefault(node, set())
        self._gone.move_to_end(node)
        if len(names) < MAX_GONE_OF_ONE:
            names.add(name)
        if len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)

    def touch(self, *nodes: int) -> None:
        """Attributes, or the data, of these are not what they were."""
        if self._known:
            for node in nodes:
                self._known.pop(node, None)
        if self._directories or self._pending:
            for node in nodes:
                self._touched[node] = self._now
            if len(self._touched) > MAX_MARKED:
                self.drop_all()

    def forgotten(self, nodes: Iterable[int]) -> None:
        """The kernel has forgotten these, and perhaps with them the host: it tells no more what changes."""
        for node in nodes:
            self._known.pop(node, None)
            self._gone.pop(node, None)
        if self._directories:
            self._forgotten.update(nodes)
            if len(self._forgotten) > MAX_MARKED:
                self._forgotten_before = self._now
                self._forgotten.clear()
            self.drop(*self._directories.keys() & nodes)

    def drop(self, *nodes: int) -> None:
        """Keep nothing of these directories, nor of those below whose last lookup goes with them."""
        self._drop(nodes)

    def _drop(self, nodes: Iterable[int], held: Collection[int] = ()) -> None:
        """``held``: nodes of which another lookup each has come, with a promise, before any is given back."""
        left = list(nodes)
        while left:
            if (directory := self._directories.get(left.pop())) is not None:
                for piece in list(directory.pieces):
                    left += self._remove(piece, directory, held)

    def drop_all(self) -> None:
        """Nothing is promised any more, nor by what is still to come."""
        self._void = self._now
        self.drop(*self._directories)
        self._touched.clear()
        self._known.clear()
        self._gone.clear()

    def _remove(self, piece: Piece, directory: _Directory, held: Collection[int] = ()) -> Iterable[int]:
        """Returns which directories have to go with it."""
        del self._recent[piece]
        del self._by_lowest[
            self._by_lowest.index(piece, bisect_left(self._by_lowest, piece.lowest, key=_lowest))
        ]
        self._held -= piece.weight
        directory.pieces.remove(piece)
        if not directory.pieces:
            del self._directories[directory.node]
            self._clear_touched()
        return self._let_go(piece, held)

    def _let_go(self, piece: Piece, held: Collection[int] = ()) -> Iterable[int]:
        nodes = piece.left()
        if not nodes:
            return ()
        self._give_back(nodes)
        lost = set(nodes).difference(held) if held else set(nodes)
        self._lost(lost)
        return self._directories.keys() & lost

    def _clear_touched(self) -> None:
        if not self._directories and not self._pending:
            self._touched.clear()
            self._forgotten.clear()
