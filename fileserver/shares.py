"""One shared folder at work: its tree, its locks, its threads, and how it is doing.

The laws:
- Nothing here that may wait for a disk runs in trio's thread, not even the making of the tree: a folder on a
  server that is away must not stop the others.
- No call is carried out before what the session began with: a restored table, and the word that answers
  may have been lost (``resume``).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import trio

from fileserver import prompt
from fileserver.budget import Budget
from fileserver.control import GuestStage, SharedFolder, ShareStage, ShareState
from fileserver.datafiles import AFTER_WRITE
from fileserver.journal import Journal
from fileserver.keepsakes import Inherited, Name, ShareKeepsakes
from fileserver.ledger import Kind, LockRecord, NodeRecord
from fileserver.locks import HostLocks
from fileserver.manner import PLAIN, Manner
from fileserver.nodes import Identity, RestoredNode
from fileserver.nodes import Link as NameLink
from fileserver.owner import Owner
from fileserver.promises import Promise
from fileserver.prompt import Disk
from fileserver.renewal import Found
from fileserver.retractions import Retraction
from fileserver.telling import Telling
from fileserver.tree import Outcome, Stage, Tree
from fileserver.watches import Watches
from fileserver.workers import Workers, without_waiting
from protocol.files import (
    Allocate,
    CopyRange,
    Create,
    CreateUnnamed,
    FileCall,
    OpenForLocks,
    Release,
    ReleaseOwner,
    SetAttributes,
    SetLock,
    TestLock,
    Write,
)
from protocol.link import Link

logger = logging.getLogger(__name__)

#: Calls after which a writer may be open, and after how many seconds it is idle (``datafiles``), and a little more.
WRITING: Final = frozenset({Create, CreateUnnamed, Write, SetAttributes, Allocate, CopyRange})
CLOSING_DELAY: Final = AFTER_WRITE + 0.01
#: Seconds between two looks at what is idle. Of a guest that unpacks an archive a file is due every 2 ms; to close each
#: of them by itself took a tenth of this process's time.
TENDED_AFTER: Final = 0.1
#: Seconds without an answer of the disk after which a user is told.
SILENCE: Final = 5.0
#: Milliseconds by which two clocks may differ before a user is told: make(1) compares times to the second.
MAX_SKEW: Final = 1000

LOCK_CALLS: Final = (OpenForLocks, Release, ReleaseOwner, TestLock, SetLock)

_STAGES: Final = {
    Stage.SERVING: ShareStage.SERVING,
    Stage.MISSING: ShareStage.MISSING,
    Stage.DENIED: ShareStage.DENIED,
    Stage.NOT_A_DIRECTORY: ShareStage.NOT_A_DIRECTORY,
}
_HINTS: Final = {
    ShareStage.SERVING: "",
    ShareStage.MISSING: "It is served again as soon as there is a folder of this name.",
    ShareStage.DENIED: "It is served again as soon as you may read and enter it.",
    ShareStage.NOT_A_DIRECTORY: "Only folders can be shared; share the one it is in.",
    ShareStage.FULL: "Programs in the VM get 'No space left on device'. Make room on the host's disk.",
}


class _ShareRecorder:
    """Writes what a tree records into the journal."""

    def __init__(self, share: int, journal: Journal) -> None:
        self._share = share
        self._add = journal.add

    def node(self, node: int, parent: int, name: bytes, identity: Identity) -> None:
        self._add(
            Kind.NODE, self._share, node, parent, name, identity.device, identity.inode, identity.birth_ns
        )

    def unlinked(self, node: int, parent: int, name: bytes) -> None:
        self._add(Kind.UNLINKED, self._share, node, parent, name)

    def counted(self, node: int, lookups: int) -> None:
        self._add(Kind.COUNTED, self._share, node, lookups)


_numbers: Final = itertools.count(1)
"""By which a share is watched: its id may be another's as long as what is still asked of the one before it is done."""


class _Tended(NamedTuple):
    """When to come again (``time.monotonic``), whether something has changed, and names to be dropped."""

    due: float
    news: bool = False
    gone: list[NameLink] = []  # noqa: RUF012 (never changed)


class Share:
    """A folder that is served. ``close`` is the end of it."""

    def __init__(
        self,
        folder: SharedFolder,
        journal: Journal,
        hidden: list[str],
        keepsakes: ShareKeepsakes,
        budget: Budget | None = None,
        watches: Watches | None = None,
        tell: Callable[[Share, Retraction], None] = lambda share, retraction: None,
        renew: Callable[[Share, Link, Found], None] = lambda share, link, found: None,
        manner: Manner = PLAIN,
    ) -> None:
        """``hidden`` are paths of directories that the guest sees empty, ``budget`` and ``watches`` are those of all
        shares; without watches, nothing is promised. ``tell`` is called, in any thread, with what the guest is to be
        told of, and ``renew`` with how it is now."""
        self.folder = folder
        self.watched_as = next(_numbers)
        self.workers = Workers(f"share-{folder.id:08x}")
        # Apart from the calls: those wait for what is done here first.
        self._housekeeper = Workers(f"house-{folder.id:08x}", 1, 1)
        self.on_close: Callable[[], None] = lambda: None
        """Called before all ends: the last chance to give the threads something to do."""
        self.calls = 0
        self.bytes_read = self.bytes_written = 0
        self.guest = GuestStage.WAITING
        self.guest_reason = ""
        self.clock_skew_ms = 0
        self._journal = journal
        self._hidden = hidden
        self._keepsakes = keepsakes
        self._budget = budget or Budget()
        self._watches = watches
        self._manner = manner
        self._retract = partial(tell, self)
        self.telling = Telling(
            folder.id, self._submit_ready, self._retract, partial(renew, self), self._look_at_once
        )
        self._for_good = False
        self._tree: Tree | None = None
        self._locks: HostLocks | None = None
        self._opened, self._ready = threading.Event(), threading.Event()
        self._asked_at: float | None = None  # since when the disk owes tend() an answer
        self._nap = trio.CancelScope()
        self._closed = False
        self._prompt_on: Disk | None = None
        self._slow_until = 0.0
        self._housekeeper.submit(self._open)

    def _open(self) -> None:
        try:
            self._tree = Tree(
                self.folder.host_path,
                read_only=self.folder.read_only,
                hidden=self._hidden,
                recorder=_ShareRecorder(self.folder.id, self._journal),
                next_node=self._journal.next_node,
                keepsakes=self._keepsakes,
                budget=self._budget,
                share=self.watched_as,
                watches=self._watches,
                retract=self._retract,
                manner=self._manner,
            )
            self.telling.tree = self._tree
            self._locks = self._host_locks(None, {})
        finally:
            self._opened.set()

    def _host_locks(self, past: LockRecord | None, kept: dict[Name, int]) -> HostLocks:
        assert self._tree is not None
        open_file = self._tree.data_fd_for_locks
        return HostLocks(self.folder.id, self._journal, open_file, past, kept, self._keepsakes, self._budget)

    async def wait_opened(self) -> None:
        """Return when the folder was looked at for the first time."""
        while not self._opened.is_set():
            await trio.sleep(0.002)  # once in the life of a share, and for less than that

    def resume(
        self,
        nodes: dict[int, NodeRecord] | None = None,
        locks: LockRecord | None = None,
        owner: Owner | None = None,
    ) -> None:
        """A session begins; ``nodes`` and ``locks`` are what a killed server has left for the same guest, and
        ``owner`` is the guest's user.

        Calls that come from now on wait until that is taken in, and the descriptors that it kept.
        """
        self._ready.clear()
        if nodes:
            self.telling.inherit()
        kept = self._keepsakes.claim()
        self._housekeeper.submit(lambda: self._resume(nodes or {}, locks, owner, kept))

    def _resume(
        self,
        nodes: dict[int, NodeRecord],
        locks: LockRecord | None,
        owner: Owner | None,
        kept: Inherited,
    ) -> None:
        try:
            if self._tree is not None:
                self._tree.show_as(owner)
                if nodes:
                    self._tree.restore(_restored(nodes, kept))
                self._tree.suspect_all()
            if (locks is not None or kept.locks) and self._tree is not None:
                self._locks = self._host_locks(locks or LockRecord(), kept.locks)
        finally:
            self._ready.set()
        if self._locks is not None:
            self._locks.settle()
        self._keepsakes.discard(kept)

    def close(self, *, for_good: bool = False) -> None:
        """Serve no more: what was asked is still done, then everything is let go of. ``for_good``: no successor is to
        have what was kept for it."""
        self.on_close()
        self._for_good = for_good
        self._closed = True
        self._nap.cancel()
        self._ready.set()
        self._housekeeper.close(lambda: self.workers.close(self._let_go))

    def _let_go(self) -> None:
        if self._locks is not None:
            self._locks.close()
        if self._watches is not None:
            self._watches.forget_share(self.watched_as)
        if self._tree is not None:
            self._tree.close()
        if self._for_good:
            self._keepsakes.give_up_all()

    # --- calls, in the threads of ``workers`` ------------------------------------------------------

    def wait_ready(self) -> None:
        """Return when calls may be carried out."""
        if not self._ready.is_set():
            self._ready.wait()

    @property
    def tree(self) -> Tree:
        """The tree, once calls may reach it. Raises ``OSError`` if it could not be made."""
        self.wait_ready()
        if self._tree is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._tree

    @property
    def disk(self) -> Disk | None:
        """What the folder is on, if it was found. Never waits."""
        return None if self._tree is None else self._tree.disk

    def may_be_prompt_on(self, disk: Disk | None) -> None:
        """Small calls may be done at once (``prompt``) for as long as the folder is what is on this disk."""
        self._prompt_on = disk

    @property
    def is_prompt(self) -> bool:
        """Whether a small call may be done at once now."""
        return (
            self._prompt_on is not None
            and self._prompt_on is self.disk
            and self.workers.is_idle
            and self._ready.is_set()
            and time.monotonic() >= self._slow_until
        )

    def do_at_once(self, function: Callable[[], object]) -> None:
        """Do something small in trio's thread, if the share ``is_prompt``. Raises ``WouldWait``."""
        start, waits = time.monotonic(), prompt.waits()
        try:
            without_waiting(function)
        finally:
            end = time.monotonic()
            if end - start >= prompt.SLOW and prompt.waits() > waits:
                self._slow_until = end + prompt.PAUSE * (end - start)

    def _look_at_once(self, function: Callable[[], object]) -> bool:
        """The same unless threads have to, and write down what came of it; whether it was done."""
        if not self.is_prompt:
            return False
        self.do_at_once(function)
        self._journal.flush()
        return True

    def lock(self, call: FileCall[Any]) -> Outcome:
        """Do one of ``LOCK_CALLS``. Raises ``OSError``."""
        self.wait_ready()
        if not self.folder.host_locks or self._locks is None:
            raise OSError(errno.EOPNOTSUPP, "the locks of this share are the guest's own")
        return Outcome(self._locks.perform(call))

    def alarm_told(self, node: int) -> None:
        """An answer that said ``stale`` about ``node`` is on its way. Never waits: this is trio's thread."""
        if self._tree is not None:
            self._tree.alarm_told(node)

    def _submit_ready(self, function: Callable[[], object]) -> None:
        """Have ``function`` run as if it were a call."""

        def work() -> None:
            self.wait_ready()
            function()

        self.workers.submit(work)

    def promised(self, result: object, promise: Promise) -> int:
        """What can be promised of an answer that is about to be sent. In trio's thread."""
        return 0 if self._tree is None else self._tree.promised(result, promise)

    # --- housekeeping ------------------------------------------------------------------------------

    def noticed(self, call: FileCall[Any]) -> None:
        """``call`` was done: there may be something to close soon."""
        if type(call) in WRITING and (soon := trio.current_time() + CLOSING_DELAY) < self._nap.deadline:
            self._nap.deadline = soon

    async def tend(self, changed: Callable[[], object], gone: Callable[[int, list[NameLink]], None]) -> None:
        """Look after the folder until ``close``: its root once a second, and what is idle.

        ``changed`` is called when the state has changed, ``gone`` with the share's id and names that the guest
        is to drop (``NamesGone``).
        """
        look_at = 0.0
        while not self._closed:
            now = time.monotonic()
            look = now >= look_at
            if look:
                look_at = now + self._manner.look_every
            self._nap = trio.CancelScope()
            due, news, names = await self._in_thread(partial(self._tend, look=look))
            if news:
                changed()
            if names:
                gone(self.folder.id, names)
            self._nap.deadline = min(
                self._nap.deadline,
                trio.current_time() + max(TENDED_AFTER, min(due, look_at) - time.monotonic()),
            )
            with self._nap:
                await trio.sleep_forever()

    def _tend(self, *, look: bool) -> _Tended:
        now = time.monotonic()
        if self._tree is None:
            return _Tended(now + self._manner.look_every)
        news = self._tree.check_root() if look else False
        return _Tended(self._tree.close_idle(now), news, self._tree.names_gone(now))

    async def _in_thread(self, function: Callable[[], _Tended]) -> _Tended:
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        result = _Tended(time.monotonic() + self._manner.look_every)

        def work() -> None:
            nonlocal result
            try:
                result = function()
            finally:
                _tell(token, done.set)

        self._asked_at = trio.current_time()
        self._housekeeper.submit(work)
        await done.wait()
        self._asked_at = None
        return result

    # --- how it is doing ---------------------------------------------------------------------------

    def state(self) -> ShareState:
        """What a user is told."""
        stage, reason, nodes, descriptors, lost = ShareStage.SERVING, "", 0, 0, 0
        if self._tree is not None:
            tree = self._tree.describe()
            stage, reason = _STAGES[tree.stage], tree.reason
            nodes, descriptors, lost = tree.nodes, tree.descriptors, tree.lost
            if tree.full and stage is ShareStage.SERVING:
                stage, reason = ShareStage.FULL, "The disk of the host is full."
        if self._locks is not None:
            descriptors, lost = descriptors + self._locks.descriptors, lost + self._locks.lost
        reason, hint = self._explain(stage, reason)
        return ShareState(
            self.folder.id,
            stage,
            self.guest,
            reason,
            hint,
            nodes,
            descriptors,
            lost,
            self.calls,
            self.clock_skew_ms,
            self.telling.revalidating,
            self._unwatched,
            self.bytes_read,
            self.bytes_written,
        )

    def _explain(self, stage: ShareStage, reason: str) -> tuple[str, str]:
        """The reason and the hint; the gravest only."""
        if self._asked_at is not None and trio.current_time() - self._asked_at > SILENCE:
            return "The host's disk does not answer.", "Programs in the VM that use this folder wait for it."
        if stage is not ShareStage.SERVING:
            return reason, _HINTS[stage]
        if self.guest is GuestStage.FAILED:
            return self.guest_reason or "It could not be mounted in the VM.", ""
        if abs(self.clock_skew_ms) > MAX_SKEW:
            direction = "ahead of" if self.clock_skew_ms > 0 else "behind"
            reason = f"The VM's clock is {abs(self.clock_skew_ms) / 1000:.1f} s {direction} the host's."
            return reason, "make may build too much or too little."
        if self._watches is not None and self._unwatched:
            reason = "Programs in the VM are slower here: it uses more files than the host's kernel watches."
            return reason, f"Let the kernel watch more: {self._watches.limit_hint}"
        return reason, ""

    @property
    def _unwatched(self) -> int:
        return 0 if self._watches is None else self._watches.unwatched(self.watched_as)


def _restored(nodes: dict[int, NodeRecord], kept: Inherited) -> list[RestoredNode]:
    return [
        RestoredNode(
            number,
            record.lookups,
            Identity(record.device, record.inode, record.birth_ns),
            list(record.links),
            kept.nodes.pop(number, -1),
        )
        for number, record in nodes.items()
    ]


def _tell(token: trio.lowlevel.TrioToken, function: Callable[[], None]) -> None:
    try:
        token.run_sync_soon(function)
    except trio.RunFinishedError:
        logger.debug("a worker finished after the server")
