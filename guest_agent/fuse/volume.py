"""One mounted share, as the operations on it see it.

The guest keeps nothing of nodes: a node's number goes from the kernel to the host and back as it is. What
is kept here is what only this side can know.

The law of stale data: when the host says that a file's data is not what this guest was last given, the
kernel's copy is dropped *before* the answer that said so, for whoever asked (open(2), stat(2)) goes by it.
Only a LOOKUP or a GETATTR is ever answered so. A WRITE or a SETATTR must never wait for a drop: the kernel
holds a page until it has the answer (fuse_fill_write_pages), or no page is written meanwhile (FUSE_NOWRITE).

The only time for which anything is used without asking is ``TICK``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

from guest_agent.fuse import bodies
from guest_agent.fuse.forgetting import Forgets, fresh_uniques
from guest_agent.fuse.host import Host, LetGo
from guest_agent.fuse.listing import Listings
from guest_agent.fuse.notifier import NotifierFull
from guest_agent.fuse.operation import Pause, Resume, Timers, Wait
from protocol.files import Entry, FileCall

log = logging.getLogger(__name__)

SALT_SHIFT: Final = 40
SALT_BITS: Final = 22
"""A connection numbers its requests from the start, and the host must not take those of a mount for those of
the one before: so its number is mixed with these random bits of the mount's. 2^40 requests take 4 months at
100,000 a second; the result is below 2^62."""

RETRY: Final = 0.05
"""Seconds until a notifier that was full is asked again."""

APPEND_PATIENCE: Final = 0.02
"""Seconds that an append which went elsewhere waits for its page to be dropped. Either that takes far less, or
the kernel holds the page until the answer, and nobody sees it meanwhile."""


TICK: Final = 1
"""ns for which a directory's attributes count as fresh; the kernel makes it one tick of its clock, 4 ms. A path
is walked by asking for each name, and then for the permissions of what the answer was: without this, half of
all messages. It ends with promises."""

_MODE_HIGH: Final = 61
"""Of an ``ATTR``, the byte with the type of the file."""


def attr_ns(attr: bytes) -> int:
    """For how long ``attr`` may be used without asking."""
    return TICK if attr[_MODE_HIGH] & 0xF0 == 0x40 else 0


class Dropper(Protocol):
    """Of ``notifier.Notifier``, what is needed here."""

    def invalidate_data(self, node: int, then: Callable[[], None]) -> None: ...

    def invalidate_entry(self, parent: int, name: bytes, then: Callable[[], None]) -> None: ...


class Volume:
    """``salt``: of this mount, as ``SALT_SHIFT`` says; a successor that takes the mount over needs it. ``volumes``:
    all of the share, if there can be several (of superblocks that are still in use); this one joins them. The host
    knows of one guest, and says only once that a file's data is stale: what one is told is dropped by all."""

    def __init__(
        self,
        share: int,
        host: Host,
        notifier: Dropper,
        timers: Timers,
        *,
        salt: int,
        host_locks: bool = False,
        volumes: set[Volume] | None = None,
    ) -> None:
        self.share = share
        self.host = host
        self.host_locks = host_locks
        self.timers = timers
        self.uniques = fresh_uniques()
        self.forgets = Forgets(host, share, timers, self.uniques)
        self.listings = Listings(host, share, next(fresh_uniques()))
        self.written: set[int] = set()
        """Nodes that may be open for writing on the host: it is told when they are closed here."""
        self.locking: dict[int, Pause | None] = {}
        """Requests that wait for a lock, by unique; None once they have been interrupted."""
        self.lockers: dict[tuple[int, int], int] = {}
        """Handles by node and owner: of fcntl(2) locks on the host that no FLUSH has given back. If RELEASE of the
        handle comes before one, they are the open file's own (F_OFD_SETLK), and the kernel says no more of them."""
        self.adrift: set[int] = set()
        """Files that are appended to elsewhere than the kernel thinks, whose page it was seen to hold meanwhile."""
        self.salt = salt << SALT_SHIFT
        self._volumes = volumes if volumes is not None else set()
        self._volumes.add(self)
        self._notifier = notifier
        self._dropping: dict[int, int] = {}
        """How many wait for the drop of a node's data. Who asks about it meanwhile is answered after that, too."""

    def is_dropping(self, node: int) -> bool:
        return node in self._dropping

    def drop(self, node: int) -> _Drop:
        """Await it to have the kernel's copy of a file's data dropped."""
        return _Drop(self._drop, node)

    def drop_name(self, parent: int, name: bytes) -> None:
        """Have the kernel forget a name, in its own time: only memory depends on it."""
        with suppress(NotifierFull):
            self._notifier.invalidate_entry(parent, name, _nothing)

    async def drop_for_append(self, node: int) -> None:
        """The same as far as it is possible before the answer to a WRITE.

        The kernel goes on with its wrong size until somebody asks for it, a log's writer never. Its page was
        dropped after the first of such appends, so that it holds it during each that follows: waiting would cost
        ``APPEND_PATIENCE`` a line, in vain.
        """
        if node in self.adrift:
            self._drop(node, _nothing)
        elif not await _Within(self.drop(node), APPEND_PATIENCE, self.timers):
            self.adrift.add(node)

    def take_lockers(self, node: int, handle: int) -> list[int]:
        """The owners of fcntl(2) locks that are left when ``handle`` is released."""
        owners = [owner for (locked, owner), by in self.lockers.items() if (locked, by) == (node, handle)]
        for owner in owners:
            del self.lockers[node, owner]
        return owners

    async def entry(self, call: FileCall[Entry]) -> Entry:
        """A node that the host names."""
        entry = await self.host.ask(call)
        if entry.stale or entry.node in self._dropping:
            await self.drop(entry.node)
        return entry

    async def entry_out(self, call: FileCall[Entry]) -> bytes:
        entry = await (ask := self.host.ask(call))
        if entry.stale or entry.node in self._dropping:
            await self.drop(entry.node)
        if ask.unheard:
            # The kernel will not hear of the node, and the host has counted this.
            self.forgets.add(entry.node, 1)
        return bodies.entry_out(entry.node, entry.attr, 0, attr_ns(entry.attr))

    def interrupt(self, unique: int, let_go: LetGo) -> None:
        """The caller of a request has had a signal; ``let_go`` answers the request with EINTR."""
        if (pause := self.locking.get(unique)) is not None:
            self.locking[unique] = None
            pause.interrupt()
        self.host.interrupt(self.share, unique ^ self.salt, let_go)

    def _drop(self, node: int, then: Callable[[], None]) -> None:
        for volume in self._volumes:
            volume._drop_here(node, then if volume is self else _nothing)

    def _drop_here(self, node: int, then: Callable[[], None]) -> None:
        self._dropping[node] = self._dropping.get(node, 0) + 1

        def done() -> None:
            self._dropping[node] -= 1
            if not self._dropping[node]:
                del self._dropping[node]
            then()

        self._notify(node, done)

    def _notify(self, node: int, done: Callable[[], None]) -> None:
        try:
            self._notifier.invalidate_data(node, done)
        except NotifierFull:
            self.timers.after(RETRY, partial(self._notify, node, done))


def _nothing() -> None:
    pass


class _Drop:
    __slots__ = ("_begin", "_node")

    def __init__(self, begin: Callable[[int, Callable[[], None]], None], node: int) -> None:
        self._begin = begin
        self._node = node

    def __await__(self) -> Generator[Wait, Any, None]:
        yield self

    def begin(self, resume: Resume) -> None:
        self._begin(self._node, partial(resume, None))


class _Within:
    """Another wait, or so many seconds of it; ``await`` returns whether it has come to its end."""

    def __init__(self, wait: Wait, seconds: float, timers: Timers) -> None:
        self._wait = wait
        self._seconds = seconds
        self._timers = timers
        self._resume: Resume | None = None

    def __await__(self) -> Generator[Wait, Any, bool]:
        ended: bool = yield self
        return ended

    def begin(self, resume: Resume) -> None:
        self._resume = resume
        self._wait.begin(lambda _: self._end(True))
        if self._resume is not None:
            self._timers.after(self._seconds, partial(self._end, False))

    def _end(self, ended: bool) -> None:
        if (resume := self._resume) is not None:
            self._resume = None
            resume(ended)
