"""Directory streams, and names looked up, from what is in memory (``directories``) or from the host.

OPENDIR is ENOSYS: no message opens or closes a directory, and its streams have no handle. What is kept is kept by
directory, and all who read it share it, wherever each of them is. Whoever begins (offset 0) reads what is promised; of
what is not it has the directory listed afresh, for itself and for all. A stream that finds nothing to go on with (of
before a restart, long ago, dropped) asks the host from its offset: that is a hash of a name, which always has a place.

The kernel keeps the pages of a listing, and for a directory opened without a message nobody tells it how long. The
laws, from fs/fuse/readdir.c:
- It reads from those pages only when some stream has come to an empty reply. If anything that this one or another
  had been given was not promised, the pages are dropped *before* that reply, so that nothing is ever read from them.
  (After it there would be some ms in which it is. A drop takes page locks, which nobody holds who waits for a page.)
- ``Changed`` drops them behind a barrier, for a first page may be on its way and not be in them yet. From a listing
  of before that nothing may be given any more: another stream may have begun to fill them anew, up to the same offset.
- A stream that is read across a drop leaves pages with a hole. Whoever begins finds it, and asks here: right, but the
  kernel fills them again only when some stream is read from where the hole ends.

Whoever reads a directory is given names. Nodes and attributes of files, which cost the host ten times as much, come
with the first name that is looked up in it (find(1) wants none, ls(1) all of them): then that directory is listed once
more, and from then on all of them whole, until nobody has read one for ``WHOLE``.

Of a host that is far away (``distance``) more is listed ahead, and sooner: what is below a directory that is read, with
its answer; what is at the root, with the session (``look_around``); and with the first name that is looked up come the
directories after this one whole, too, of which only names are here. What is looked into for the first time is listed
beside that lookup: a second one costs more than the listing.

Who needs what is asked for already waits for that (``_Coming``), unless it gets a signal: then it asks for itself, so
that it can be let go like any other (``host``).
"""

from __future__ import annotations

import errno
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Generator, Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

from guest_agent.fuse.ahead import MAX_UNDER_WAY, MOST_UNDER_WAY, Ahead, Interest
from guest_agent.fuse.arrival import Arrival
from guest_agent.fuse.bare import BarePages
from guest_agent.fuse.directories import Directories
from guest_agent.fuse.host import Ask
from guest_agent.fuse.operation import Resume, Wait, spawn, start
from guest_agent.fuse.pieces import Piece
from protocol.files import (
    ATTR,
    ATTRIBUTES,
    DIRENT,
    ENTRY,
    NAME,
    ROOT,
    Changed,
    FileCall,
    GetAttributes,
    ListEntries,
    Listing,
)

ResultT = TypeVar("ResultT")

WHOLE: Final = 2.0
"""Seconds after somebody wanted more than names of a directory."""

MAX_LOOSE: Final = 65_536
"""Directories whose pages in the kernel are known to hold what was not promised. Beyond that they are dropped early."""

_DIRECTORY: Final = 4
"""DT_DIR."""
_UNKNOWN_INODE: Final = 0xFFFFFFFF
"""What libfuse shows for names whose inode number is not known (FUSE_UNKNOWN_INO)."""
_SELF_OFF, _PARENT_OFF = 1, 2
_NOTHING_KNOWN = bytes(ENTRY.size + ATTR.size)
_SELF = _NOTHING_KNOWN + DIRENT.pack(_UNKNOWN_INODE, _SELF_OFF, 1, _DIRECTORY) + b".\0\0\0\0\0\0\0"
_PARENT = _NOTHING_KNOWN + DIRENT.pack(_UNKNOWN_INODE, _PARENT_OFF, 2, _DIRECTORY) + b"..\0\0\0\0\0\0"
_DOTS = {0: _SELF + _PARENT, _SELF_OFF: _PARENT}
"""``.`` and ``..``, which the host does not list and programs expect, by the offset they are read at. Their own
offsets are no names' (hashes of 62 bits)."""


class Drop(Protocol):
    """The kernel's pages of a node are being dropped."""

    def __await__(self) -> Generator[Wait, Any, None]: ...

    def begin(self, resume: Resume) -> None: ...


class Asker(Protocol):
    """The host."""

    caller: int

    @property
    def is_far(self) -> bool: ...

    def ask(self, call: FileCall[ResultT]) -> Ask[ResultT]: ...

    def scaled(self, count: int, most: int) -> int: ...


class Mount(Protocol):
    """Of ``volume.Volume``, what is needed here."""

    share: int
    uniques: Iterator[int]

    @property
    def is_alone(self) -> bool:
        """Whether anything is promised at all."""

    def drop(self, node: int) -> Drop: ...

    def drop_soon(self, node: int) -> Awaitable[bool]:
        """The same, but nobody is to wait for long."""

    def drop_pages(self, directories: Sequence[int]) -> None:
        """Have the kernel ask for their names anew, in its own time."""

    def give_back(self, nodes: Sequence[int]) -> None:
        """One lookup of each."""

    def doubtful(self, nodes: Sequence[int]) -> Sequence[int]:
        """Those of which nothing may be promised just now."""


class _Coming(Arrival):
    """A piece of a directory that was asked for."""

    __slots__ = ("after", "spoiled")

    def __init__(self, after: int, host: Asker) -> None:
        super().__init__(host)
        self.after = after
        self.spoiled = False
        """The host's promise may have ended without a word."""


class _Nobody:
    """Who waits for a listing ahead."""

    def reply(self, unique: int, *buffers: bytes | bytearray | memoryview) -> None: ...

    def fail(self, unique: int, error: int) -> None: ...


class Listings:
    """The directory streams of one share, on one mount."""

    def __init__(
        self,
        mount: Mount,
        host: Asker,
        *,
        inherited: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``inherited``: the mount is a predecessor's, and what that one put into the kernel's pages is not known."""
        self._mount = mount
        self._host = host
        self._inherited = inherited
        self.directories = Directories(mount.give_back, mount.doubtful, self._spoil)
        self._coming: dict[int, _Coming] = {}
        """By directory; of one that was asked for twice at a time, the first."""
        self._ahead = Ahead(self.directories.sorted_by_name, host.scaled)
        self._interest = Interest()
        self._bare = BarePages()
        self._clock = clock
        self._whole_until = 0.0
        """Until when directories are listed with nodes and attributes of all names."""
        self._loose: OrderedDict[int, None] = OrderedDict()
        """Directories of whose pages in the kernel some were not promised."""
        self._dropped: set[int] = set()
        """Of an inherited mount, the directories whose pages have been dropped since."""

    # --- what the kernel asks --------------------------------------------------------------------------

    async def read(self, unique: int, node: int, off: int, size: int) -> bytes:
        """Whole records after ``off``, at least one unless there are none, and at most ``size`` bytes."""
        dots = _DOTS.get(off, b"")
        is_foreseen = False
        if not off:
            self._visited(node, reading=True)
            if (is_foreseen := self._bare.is_foreseen(node)) and self._bare.came(node):
                self._walk_on(node)
        piece, index = await self._find(unique, node, off, is_foreseen=is_foreseen)
        records = self.directories.page(piece, index, size - len(dots))
        if dots or records:
            if not piece.bare:
                self._go_on_whole()
            if not piece.promised:
                self._loosen(node)
        else:
            await self._finish(node, piece)
        return dots + records

    def lookup(self, node: int, name: bytes) -> bytes | None:
        """What is known of a name, as ``Directories.lookup``."""
        self._visited(node, reading=False)
        found = self.directories.lookup(node, name)
        if found and self._bare.looked_up(node):
            if not self.directories.is_one_piece(node):
                self._mount.drop_pages([node])  # its reader has not had most of it yet
            self._walk_on(node)
        return found

    async def listed_at_length(self, node: int) -> None:
        """ls(1) is about to: it asks for a label or an ACL of what it is given first, before it reads it and, if all is
        to be listed, the first directory below."""
        self._bare.expect(node)
        below = self._bare.drop(self._ahead.below(node, 1), most=2)
        if nodes := [node, *below] if self._bare.is_foreseen(node) else below:
            self._whole_until = self._clock() + WHOLE
            self._list_leaves(nodes)
            self._mount.drop_pages(nodes[1:])
            await self._mount.drop_soon(nodes[0])

    def is_coming(self, node: int) -> bool:
        """Whether ``wait`` may help, where nothing is known of a name."""
        return node in self._coming

    async def wait(self, unique: int, node: int) -> None:
        """Until what was asked for of a directory is here, or a signal has come to the caller of request ``unique``."""
        if (coming := self._coming.get(node)) is not None:
            await coming.until(unique)

    def asked(self, node: int, name: bytes) -> bool:
        """The host is to be asked for a name: whether it is better to ``wait`` for the whole directory."""
        is_wanted = self._interest.asked(node)
        is_next = self._interest.is_new(node) and (
            self.directories.is_bare(node, name)
            or (node not in self.directories and self._ahead.is_walking(node))
        )
        if node in self._coming or not self._mount.is_alone:
            return False
        if is_wanted or is_next:
            self._whole_until = self._clock() + WHOLE
            self._list_ahead(node, self.directories.gap(node, name))
            self._go_on_with_the_others(node)
        elif self._host.is_far and self._interest.is_first(node) and node not in self.directories:
            self._list_ahead(node, 0)
        return is_next

    def interrupt(self, unique: int) -> None:
        """The caller of request ``unique`` has had a signal."""
        for coming in self._coming.values():
            coming.leave(unique)

    def look_around(self) -> None:
        """A session has begun: bring what any path leads through, of a host that turns out to be far away."""
        spawn(self._look_around())

    async def _look_around(self) -> None:
        try:
            await self._learn_root()
            if self._host.is_far and self._mount.is_alone and ROOT not in self.directories:
                self._ahead.look_below(ROOT)
                self._list_ahead(ROOT, 0, bare=True)
                await self._learn_root()  # which is promised now that it is watched
        except OSError:
            pass

    async def _learn_root(self) -> None:
        asked = self.directories.begin()
        try:
            attributes = await self._host.ask(
                GetAttributes(self._mount.share, next(self._mount.uniques), ROOT)
            )
            if attributes.promise & ATTRIBUTES and self._mount.is_alone:
                self.directories.learn(ROOT, attributes.attr, asked)
        finally:
            self.directories.end()

    # --- what changes ----------------------------------------------------------------------------------

    def made(self, node: int) -> None:
        """The guest itself has just made this directory, and the host has promised that there is nothing in it."""
        asked = self.directories.begin()
        try:
            self.directories.keep(node, Piece(0, asked, Listing(0, True, NAME), b""))
        finally:
            self.directories.end()

    def forgotten(self, nodes: Sequence[int]) -> None:
        """The kernel has forgotten them."""
        self.directories.forgotten(nodes)
        self._bare.forget(nodes)
        self._spoil(nodes)

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        self.directories.changed(changed)
        self._bare.forget(changed.directories)

    def drop(self, *nodes: int) -> None:
        """Data or attributes of these are not what they were."""
        self.directories.touch(*nodes)

    def void(self) -> None:
        """Nothing is promised any more."""
        self.directories.drop_all()
        for coming in list(self._coming.values()):
            coming.end()

    def _spoil(self, nodes: Collection[int]) -> None:
        if self._coming:
            for node in self._coming.keys() & nodes:
                self._coming[node].spoiled = True

    # --- pieces ----------------------------------------------------------------------------------------

    async def _find(
        self, unique: int, node: int, off: int, *, is_foreseen: bool = False
    ) -> tuple[Piece, int]:
        """``is_foreseen``: names, which are here, will not do for whoever reads that."""
        after = 0 if off <= _PARENT_OFF else off
        found = self._here(node, off, after)
        is_poor = is_foreseen and not self._is_bare() and (found is None or found[0].bare)
        if (found is None or is_poor) and (coming := self._coming.get(node)) and coming.after == after:
            await coming.until(unique)
            found = self._here(node, off, after)
        if found is None or (is_poor and found[0].bare):
            piece = await self._fetch(unique, node, after, bare=self._is_bare())
            if piece.promised:
                if not after and self._host.is_far:
                    self._ahead.look_below(node)
                self._go_ahead()
            return piece, 0
        return found

    def _here(self, node: int, off: int, after: int) -> tuple[Piece, int] | None:
        if off or self.directories.is_listable(node):
            return self.directories.find(node, after)
        return None

    def _is_bare(self) -> bool:
        """Whether names will do: nobody is known to want more."""
        return self._clock() >= self._whole_until

    def _go_on_whole(self) -> None:
        if not self._is_bare():
            self._whole_until = self._clock() + WHOLE

    async def _fetch(self, unique: int, node: int, after: int, *, bare: bool) -> Piece:
        mine = _Coming(after, self._host)
        coming = self._coming.setdefault(node, mine)
        asked = self.directories.begin()
        try:
            call = ListEntries(self._mount.share, unique, node, after, bare)
            listing = await (ask := self._host.ask(call))
            piece = Piece(after, asked, listing, ask.received, bare=bare)
            self._take(node, piece, mine)
        finally:
            self.directories.end()
            if coming is mine:
                del self._coming[node]
                mine.end()
        if ask.unheard:
            raise OSError(
                errno.EINTR, ""
            )  # the kernel has that answer already: nothing may be given with another
        return piece

    def _take(self, node: int, piece: Piece, coming: _Coming) -> None:
        if coming.spoiled or not self._mount.is_alone:
            self.directories.disbelieve(piece)
        is_news = self.directories.keep(node, piece)
        if piece.bare:
            self._interest.begin(node)
        else:
            # Of names without a node each is asked for, however often they are listed: a quarter of them is too many.
            helps = piece.promised and is_news and 4 * piece.nodes.count(0) <= len(piece.nodes)
            self._interest.listed(node, len(piece.given), helps=helps)
        if piece.promised:
            self._ahead.listed(node, piece.directories, first=not piece.after)

    # --- ahead -----------------------------------------------------------------------------------------

    def _visited(self, node: int, *, reading: bool) -> None:
        if self._ahead.visited(node, reading=reading):
            self._go_ahead()

    def _go_ahead(self) -> None:
        while (node := self._ahead.next()) is not None:
            if node in self._coming or node in self.directories:
                self._ahead.failed(node)
            else:
                self._list_ahead(node, 0, bare=self._is_bare())

    def _go_on_with_the_others(self, wanted: int) -> None:
        """Somebody wants more than names, and will in those that follow, too. (Not where something below is here, which
        would be lost.)"""
        if self._host.is_far:
            self._list_leaves(self._ahead.following(wanted))

    def _walk_on(self, node: int) -> None:
        """Somebody looks at all files of one directory after the other, and has come to this one."""
        # More than are dropped: some of them were already.
        room = 2 * self._bare.room
        following = [*self._ahead.below(node, room), *self._ahead.beside(node, room)]
        if dropped := self._bare.drop(following):
            self._mount.drop_pages(dropped)
        if self._is_bare():
            return
        most = self._host.scaled(MAX_UNDER_WAY, MOST_UNDER_WAY)
        self._list_leaves([one for one in following if self._bare.is_foreseen(one)][:most])

    def _list_leaves(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            if node not in self._coming and self.directories.is_leaf_of_names(node):
                self._list_ahead(node, 0)

    def _list_ahead(self, node: int, after: int, *, bare: bool = False) -> None:
        start(self._fetch_ahead(node, after, bare), _Nobody(), 0)

    async def _fetch_ahead(self, node: int, after: int, bare: bool) -> bytes:
        try:
            piece = await self._fetch(next(self._mount.uniques), node, after, bare=bare)
            if not piece.promised:
                self._ahead.failed(node)
        except OSError:
            self._ahead.failed(node)
        self._go_ahead()
        return b""

    # --- the pages that the kernel keeps ---------------------------------------------------------------

    def _loosen(self, node: int) -> None:
        self._loose[node] = None
        if len(self._loose) > MAX_LOOSE:
            oldest, _ = self._loose.popitem(last=False)
            self._mount.drop(oldest).begin(_nothing)

    async def _finish(self, node: int, piece: Piece) -> None:
        """A stream of ``node`` is at its end: the kernel is about to believe in its pages."""
        if not piece.promised:
            self.directories.drop(node)
        unknown = len(piece.nodes) if piece.after else piece.nodes.count(0)
        self._bare.keep(node, unknown if piece.bare and piece.promised else 0)
        while node in self._loose or (self._inherited and node not in self._dropped):
            self._loose.pop(node, None)
            if self._inherited:
                if len(self._dropped) >= MAX_LOOSE:
                    self._dropped.clear()
                self._dropped.add(node)
            await self._mount.drop(node)


def _nothing(_: object) -> None:
    pass
