"""One mounted share, as the operations on it see it.

The guest keeps nothing of nodes: a node's number goes from the kernel to the host and back as it is. What
is kept here is what only this side can know.

The law of stale data: when the host says that a file's data is not what this guest was last given, the
kernel's copy is dropped *before* the answer that said so, for whoever asked (open(2), stat(2)) goes by it.
Only a LOOKUP or a GETATTR is ever answered so. A WRITE or a SETATTR must never wait for a drop: the kernel
holds a page until it has the answer (fuse_fill_write_pages), or no page is written meanwhile (FUSE_NOWRITE).

What the host promises (``promises``) is used without asking until the host takes it back. For what is not promised the
kernel asks each time, but for a directory's attributes: those it may use for one tick of its clock. A path is walked
by asking for each name, and then for the permissions of what the answer was: without that tick half of all messages.

The kernel gives the answer to a GETATTR to its caller, and does not store it if the node was invalidated while it was
on its way (fuse_change_attributes). Then fstat(2) knows a size that a mapping does not have, and who touches what is
beyond that gets SIGBUS. So a node of which the attributes are being asked for is invalidated after the answer.

The host knows of one guest. While several volumes of a share are in use nothing is promised, and what is changed
through one is taken back from the others.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol

from guest_agent.fuse import bodies, callers
from guest_agent.fuse.contents import Contents
from guest_agent.fuse.directories import ATTR_TYPE, NameChange, is_directory
from guest_agent.fuse.forgetting import Forgets, fresh_uniques
from guest_agent.fuse.host import Ask, Host, LetGo
from guest_agent.fuse.listing import Listings
from guest_agent.fuse.looked import Looked
from guest_agent.fuse.notifier import NotifierFull
from guest_agent.fuse.operation import Kernel, Pause, Resume, Timers, Wait
from guest_agent.fuse.promises import Promises
from guest_agent.fuse.readahead import Readahead
from guest_agent.fuse.renewals import Known, Renewals
from guest_agent.fuse.room import Room
from guest_agent.fuse.writebehind import WriteBehind
from guest_agent.fuse.written import End, Ends
from guest_agent.fuse.xattrs import Xattrs
from protocol.errors import RemoteProtocolError
from protocol.files import (
    ATTRIBUTES,
    EMPTY,
    NAME,
    Changed,
    Entry,
    FileCall,
    Removed,
    Renamed,
    Renewed,
    Written,
)

log = logging.getLogger(__name__)

_ALL: Final = NAME | ATTRIBUTES

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

DROP_PATIENCE: Final = 0.05
"""Seconds that somebody waits for a drop that only spares messages. Others may have all threads that write drops wait
for pages of a file, for as long as the host is away."""

AFTER_ANSWER: Final = 0.002
"""Seconds after the answer to a GETATTR until its caller will have stored it, if it was given a processor meanwhile."""

MOST_HELD_BACK: Final = 0.1
"""Seconds for which an invalidation waits for that answer, and once more until it is stored."""


class Dropper(Protocol):
    """Of ``notifier.Notifier``, what is needed here."""

    def invalidate_data(self, node: int, then: Callable[[], None]) -> None: ...

    def invalidate_entry(self, parent: int, name: bytes, then: Callable[[], None]) -> None: ...

    def sequence(self, notifications: bytes, then: Callable[[], None]) -> None: ...


class Cache(Protocol):
    """What is kept here of what the host has said, and what ends it."""

    def changed(self, changed: Changed) -> None:
        """The host says that these are not what they were."""

    def drop(self, *nodes: int) -> None:
        """Data or attributes of these are not what they were."""

    def void(self) -> None:
        """Nothing stands any more, nor what is on its way."""


class Volume:
    """``salt``: of this mount, as ``SALT_SHIFT`` says; a successor that takes the mount over needs it. ``volumes``:
    all of the share, if there can be several (of superblocks that are still in use); this one joins them. The host
    knows of one guest, and says only once that a file's data is stale: what one is told is dropped by all.
    ``inherited``: a predecessor served the mount."""

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
        inherited: bool = False,
        times_run: Callable[[int], int | None] = callers.times_run,
    ) -> None:
        self.share = share
        self.host = host
        self.host_locks = host_locks
        self.timers = timers
        self.uniques = fresh_uniques()
        self.promises = Promises(notifier)
        self.forgets = Forgets(host, share, timers, self.uniques)
        self.listings = Listings(self, host, inherited=inherited)
        self.renewals = Renewals(self.give_back)
        self.xattrs = Xattrs(host, share, self.listings.directories.neighbours)
        self.contents = Contents(host, share, self.listings.directories, timers, self.uniques)
        self.looked = Looked()
        self.written = Ends()
        self.room = Room()
        self.behind = WriteBehind()
        self.kernel: Kernel | None = None
        """Where a request is answered before its operation has ended."""
        self.readahead = Readahead(host, share, self.listings.directories, timers, self.uniques)
        self._caches: tuple[Cache, ...] = (
            self.listings, self.renewals, self.xattrs, self.contents, self.looked, self.readahead, self.written,
            self.room,
        )  # fmt: skip
        self.asking: dict[int, int] = {}
        """By node, how many GETATTR are unanswered."""
        self.locking: dict[int, Pause | None] = {}
        """Requests that wait for a lock, by unique; None once they have been interrupted."""
        self.lockers: dict[tuple[int, int], int] = {}
        """Handles by node and owner: of fcntl(2) locks on the host that no FLUSH has given back. If RELEASE of the
        handle comes before one, they are the open file's own (F_OFD_SETLK), and the kernel says no more of them."""
        self.unlearned: set[int] = set()
        """Nodes whose last attributes the kernel has not stored, for a drop went before the answer."""
        self.adrift: set[int] = set()
        """Files that are appended to elsewhere than the kernel thinks, whose page it was seen to hold meanwhile."""
        self.salt = salt << SALT_SHIFT
        self._volumes = volumes if volumes is not None else set()
        for other in self._volumes:
            other.listings.void()
            other.xattrs.void()
        self._volumes.add(self)
        self._notifier = notifier
        self._times_run = times_run
        self._held_back: dict[int, set[int]] = {}
        """Nodes that are invalidated after an answer, and the directories that they are reached through."""
        self._dropping: dict[int, int] = {}
        """How many wait for the drop of a node's data. Who asks about it meanwhile is answered after that, too."""

    @property
    def is_alone(self) -> bool:
        """No other volume of the share is in use."""
        return len(self._volumes) == 1

    def is_dropping(self, node: int) -> bool:
        return node in self._dropping

    def drop(self, node: int) -> _Drop:
        """Await it to have the kernel's copy of a file's data dropped."""
        return _Drop(self._drop, node)

    async def drop_for_attributes(self, node: int, thread: int) -> None:
        """Before the answer to a GETATTR of ``thread``, which the kernel then does not store; the host takes its size
        for known. So the next answer goes first, and the drop follows: else the kernel would never learn the size of a
        file that changes all the time (a read ends early, copy_file_range(2) returns 0 for ever)."""
        if node in self.unlearned and node not in self._dropping:
            self.unlearned.discard(node)
            self._once_stored(thread, partial(self._drop, node, _nothing))
        else:
            self.unlearned.add(node)
            await self.drop(node)

    def drop_soon(self, node: int) -> _Within:
        """The same, for ``DROP_PATIENCE`` at the most: what is dropped was right."""
        return _Within(self.drop(node), DROP_PATIENCE, self.timers)

    def drop_pages(self, directories: Sequence[int]) -> None:
        """Have the kernel ask for the names of these anew, in its own time."""
        self.promises.drop_pages(directories)

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

    async def made(self, call: FileCall[Entry], directory: int, name: bytes) -> Entry:
        """A node that has a new name. Who is told of that waits for no drop: what the host says next may be newer."""
        entry = await self.host.ask(call)
        self.name_changed(directory, name, entry.above, NameChange.MADE)
        if entry.promise & EMPTY and self.is_alone:
            self.listings.made(entry.node)
        if entry.stale or entry.node in self._dropping:
            await self.drop(entry.node)
        return entry

    async def entry_out(self, call: FileCall[Entry], thread: int) -> bytes:
        """The answer to ``thread`` that names a node; empty if the host has promised that there is none. Its attributes
        are kept, for once it is read the kernel asks for them again (``attributes.getattr_``)."""
        changes, known = self.looked.changes, self.listings.directories
        asked = known.begin()
        try:
            entry = await (ask := self.host.ask(call))
            if entry.stale or entry.node in self._dropping:
                await self.drop(entry.node)
            if entry.promise & ATTRIBUTES and self.is_alone and not ask.unheard:
                known.learn(entry.node, entry.attr, asked)
        finally:
            known.end()
        if not entry.node:
            return b""
        if ask.unheard:
            # The kernel will not hear of the node, and the host has counted this.
            self.forgets.add(entry.node, 1)
        elif not (entry.stale or entry.promise & ATTRIBUTES or is_directory(entry.attr)):
            self.looked.remember(thread, entry.node, entry.attr, changes)
        return bodies.entry_out(entry.node, entry.attr, self.valid(entry.node, entry.attr, entry.promise))

    def absent_out(self, directory: int, name: bytes) -> bytes:
        """There is no such name, the host has promised."""
        if not self.is_alone:
            raise OSError(errno.ENOENT, "")
        self.promises.absent(directory, name)
        return bodies.ABSENT

    def valid(self, node: int, attr: bytes, promise: int) -> int:
        """What of an answer the kernel may use without asking (``bodies.entry_out``)."""
        promise = promise & _ALL if self.is_alone else 0
        if not promise & ATTRIBUTES:
            self.listings.directories.touch(node)
            self.readahead.drop(node)
        if not is_directory(attr):
            # A write clears setuid and setgid on the host, and the kernel's copy of the mode stays as it is.
            return promise & ~ATTRIBUTES if attr[ATTR_TYPE] & 0x0C else promise
        if promise & ATTRIBUTES and self.promises.is_settled(node):
            return promise
        return promise & NAME | bodies.TICK

    def doubtful(self, nodes: Sequence[int]) -> list[int]:
        """Those of ``nodes`` of which nothing may be promised just now, whatever the host has said."""
        doubtful = self.promises.unsettled(nodes)
        if self._dropping:
            doubtful += self._dropping.keys() & nodes
        if written := self.behind.among(nodes):
            doubtful += written
        return doubtful

    def give_back(self, nodes: Sequence[int]) -> None:
        """One lookup of each will not be used."""
        self.forgets.add_all(nodes)

    def look_around(self) -> None:
        """A session has begun."""
        if self.host.may_be_far:
            self.listings.look_around()

    def void(self) -> None:
        """The session has ended, and with it all that was promised in it."""
        for cache in self._caches:
            cache.void()
        self.behind.void()
        self.promises.void()

    def take_back(self, changed: Changed) -> None:
        """What the host has promised does not hold any more. Raises ``RemoteProtocolError`` if it says too much."""
        for cache in self._caches:
            cache.changed(changed)
        self.behind.changed(changed)
        if self.asking and not self.asking.keys().isdisjoint(changed.nodes):
            changed = self._hold_back(changed)
        self.promises.take_back(changed)

    def renew(self, renewed: Renewed) -> None:
        """How something is that has changed; what the host has promised again."""
        if not self.is_alone:
            self.give_back(renewed.entries)
            return
        attributes = dict(zip(renewed.nodes, renewed.attributes, strict=False))
        if written := self.behind.among((*renewed.nodes, *renewed.files)):  # told before the host had that
            attributes = {node: attr for node, attr in attributes.items() if node not in written}
            self.give_back([node for node in renewed.entries if node in written])
        for directory, name, node in zip(renewed.parents, renewed.names, renewed.entries, strict=False):
            # Attributes of what the kernel may not know are only good with the name.
            if (attr := attributes.get(node)) is not None:
                self.renewals.add(directory, name, Known(node, attr))
        for node in attributes.keys() - renewed.entries:
            self.listings.directories.know(node, attributes[node])
        for node, data in zip(renewed.files, renewed.contents, strict=False):
            if node not in written:
                self.contents.give(node, data)

    def renewed(self, directory: int, name: bytes) -> bytes | None:
        """The answer to a LOOKUP, as ``entry_out``; None: the host must be asked."""
        if (known := self.renewals.take(directory, name)) is None:
            return None
        if known.node in self._dropping:
            self.give_back((known.node,))
            return None
        return bodies.entry_out(known.node, known.attr, self.valid(known.node, known.attr, NAME | ATTRIBUTES))

    def asked(self, node: int, thread: int) -> None:
        """A GETATTR of ``node`` is about to be answered to ``thread``."""
        self.asking[node] -= 1
        if not self.asking[node]:
            del self.asking[node]
            if node in self._held_back:
                self._once_stored(thread, partial(self._let_through, node))

    def _once_stored(self, thread: int, then: Callable[[], None]) -> None:
        """``then``, once ``thread``, which sleeps and is about to be answered, has stored the answer: after it was
        given a processor, which a busy machine may be late with. An invalidation before that would undo the answer,
        and a read(2) go by the size of before although somebody has been told the new one."""
        runs = self._times_run(thread)

        def look(patience: float) -> None:
            if runs is None or patience <= 0 or self._times_run(thread) != runs:
                then()
            else:
                self.timers.after(AFTER_ANSWER, partial(look, patience - AFTER_ANSWER))

        self.timers.after(AFTER_ANSWER, partial(look, MOST_HELD_BACK))

    def _hold_back(self, changed: Changed) -> Changed:
        """Returns what is to be taken back at once."""
        nodes, through = [], []
        for node, directory in zip(changed.nodes, changed.through, strict=False):
            if node in self.asking:
                if node not in self._held_back:
                    self.timers.after(MOST_HELD_BACK, partial(self._let_through, node))
                self._held_back.setdefault(node, set()).add(directory)
            else:
                nodes.append(node)
                through.append(directory)
        return replace(changed, nodes=nodes, through=through)

    def _let_through(self, node: int) -> None:
        through = list(self._held_back.pop(node, ()))
        with suppress(RemoteProtocolError):  # the host hears of that when it says something itself
            self.promises.take_back(Changed(self.share, nodes=[node] * len(through), through=through))

    # --- what changes ----------------------------------------------------------------------------------

    def name_changed(
        self, directory: int, name: bytes, above: bytes, change: NameChange, whose: int = 0
    ) -> None:
        """The guest itself has made or removed ``name``; to be said before it is answered. ``above``: attributes of the
        directory that are promised now, for which the kernel will ask. ``whose`` as in ``Directories.name_changed``."""
        self.looked.void()
        self.room.void()
        self.promises.name_changed(directory, name)
        self.renewals.void()  # another name of what was told may be gone, and how many it has with it
        self.listings.directories.name_changed(directory, name, change, whose)
        if above and self.is_alone:
            self.listings.directories.know(directory, above)
        if not self.is_alone:
            self._tell_others(Changed(self.share, [directory], [name], directories=[directory], above=[0]))

    def name_removed(self, directory: int, name: bytes, removed: Removed, change: NameChange) -> None:
        """The same with the host's answer: the next who looks for that name (a lock file is made again and again)
        need not ask for it."""
        self.name_changed(directory, name, removed.above, change, removed.node)
        if removed.promise & NAME and self.is_alone:
            self.listings.directories.gone(directory, name)

    def renamed(self, old: tuple[int, bytes], new: tuple[int, bytes], outcome: Renamed) -> None:
        """The same of a rename: directories and names."""
        self.looked.void()
        self.room.void()
        self.promises.renamed(old, new, outcome.node, expire=not outcome.promise & NAME)
        change = NameChange.UNLINKED if outcome.files else NameChange.MOVED
        directories = self.listings.directories
        directories.name_changed(*old, change, outcome.node)
        directories.name_changed(*new, change, outcome.replaced)
        directories.touch(outcome.node)
        self.renewals.void()
        if self.is_alone:
            self._know_renamed(old, outcome)
        else:
            parents, names = [old[0], new[0]], [old[1], new[1]]
            self._tell_others(Changed(self.share, parents, names, directories=parents, above=[0, 0]))

    def _know_renamed(self, old: tuple[int, bytes], outcome: Renamed) -> None:
        """For what the kernel, and who writes a file beside the one that it is to replace, ask for next."""
        directories = self.listings.directories
        if outcome.promise & NAME and outcome.gone:
            directories.gone(*old)
            if outcome.above:
                directories.know(old[0], outcome.above)
        if outcome.promise & ATTRIBUTES and outcome.attr:
            directories.know(outcome.node, outcome.attr)

    def data_changed(self, node: int) -> None:
        """The guest itself has changed the data or the attributes of ``node``."""
        for cache in self._caches:
            cache.drop(node)
        if not self.is_alone:
            self._tell_others(Changed(self.share, nodes=[node], through=[0]))

    def has_written(self, node: int, data: bytes | memoryview, offset: int, answer: Written) -> None:
        """The same by a write of ``data`` at ``offset``, with the host's answer."""
        end = self._took(node, data, offset, answer)
        self.data_changed(node)
        if end is not None:
            self.written.keep(node, end)

    def _took(self, node: int, data: bytes | memoryview, offset: int, answer: Written) -> End | None:
        """The host's answer to a write; returns what is to be kept of it."""
        is_there = (answer.offset, answer.size) == (offset, len(data))
        if is_there:
            self.behind.took(node, answer)
        else:
            self.behind.wait_for(node)
        return self.written.end(node, data if is_there and self.is_alone else b"", answer.attr)

    # --- writes that are answered before the host has them ---------------------------------------------

    def may_answer_ahead(self, node: int, size: int, flags: int) -> bool:
        return self.is_alone and self.host.fence.shared and self.behind.may(node, size, flags)

    def is_writing_ahead(self, node: int) -> None:
        """A write is about to be asked that may be answered at once: what is known of the file is of before it. (Of the
        end that was written last nothing is given until the host has promised that the file is as long as that.)"""
        for cache in self._caches:
            if cache is not self.written:
                cache.drop(node)

    def answer_ahead(self, ask: Ask[Written], unique: int, node: int) -> None:
        """It is asked: answer it if nothing can keep it from arriving; then ``has_landed`` or ``has_lost`` follows."""
        if ask.may_be_answered and self.kernel is not None and self.host.answer_for(ask):
            self.behind.begin(node, ask.size)
            self.kernel.reply(unique, bodies.write_out(ask.size))

    def has_landed(
        self, ask: Ask[Written], node: int, data: bytes | memoryview, offset: int, answer: Written
    ) -> None:
        """The host has taken it."""
        self._end_ahead(ask, node)
        end = self._took(node, data, offset, answer)
        if end is not None:
            self.written.keep(node, end)
        if answer.size != len(data):
            self._lose(node, errno.ENOSPC)
        elif answer.offset != offset:
            self._drop(node, _nothing)

    def has_lost(self, ask: Ask[Written], node: int, error: Exception) -> None:
        """It has failed: whoever writes or syncs the file next is told."""
        self._end_ahead(ask, node)
        self._lose(node, (isinstance(error, OSError) and error.errno) or errno.EIO)

    def _end_ahead(self, ask: Ask[Written], node: int) -> None:
        self.behind.end(node, ask.size)
        self.host.landed(ask)

    def _lose(self, node: int, error: int) -> None:
        log.warning(
            "write.lost share=%d node=%d error=%s", self.share, node, errno.errorcode.get(error, error)
        )
        self.behind.lost(node, error)
        self._drop(node, _nothing)

    def read_written(self, node: int, offset: int, size: int) -> bytes | None:
        """What a READ is to be answered with, of what the guest has written itself."""
        if node in self._dropping:
            return None
        return self.written.read(node, offset, size, self.listings.directories.attributes(node))

    def _tell_others(self, changed: Changed) -> None:
        for volume in self._volumes:
            if volume is not self:
                volume.take_back(changed)

    def interrupt(self, unique: int, let_go: LetGo) -> None:
        """The caller of a request has had a signal; ``let_go`` answers the request with EINTR."""
        if (pause := self.locking.get(unique)) is not None:
            self.locking[unique] = None
            pause.interrupt()
        self.listings.interrupt(unique ^ self.salt)
        self.contents.interrupt(unique ^ self.salt)
        self.readahead.interrupt(unique ^ self.salt)
        self.host.interrupt(self.share, unique ^ self.salt, let_go)

    def _drop(self, node: int, then: Callable[[], None]) -> None:
        for volume in self._volumes:
            volume._drop_here(node, then if volume is self else _nothing)

    def _drop_here(self, node: int, then: Callable[[], None]) -> None:
        self.readahead.drop(node)
        self.written.drop(node)
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
