"""One shared folder, and everything that a guest may ask of it.

``Tree.perform`` carries out any ``FileCall`` but the ones about locks (operations 40 to 44), at once and
in the calling thread, or raises ``OSError`` with the errno for the guest. The laws, all kept here, on the host:
- Nothing outside the folder is reached: every step is one component, from a descriptor, never through a symlink.
- A share that is read-only refuses every call of a kind that changes something (EROFS).
- Whatever a guest sends is answered: with what it asked for, or an errno; never with a traceback.

Everything is thread-safe; calls on different files do not wait for each other.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from fileserver.attributes import AttributeOperations
from fileserver.budget import Budget
from fileserver.contents import ContentOperations
from fileserver.core import Core, Outcome
from fileserver.data import DataOperations
from fileserver.entries import EntryOperations
from fileserver.judgement import Judgement
from fileserver.keepsakes import ShareKeepsakes
from fileserver.manner import PLAIN, Manner
from fileserver.names import NameOperations
from fileserver.nodes import Identity, Node, Recorder, RestoredNode
from fileserver.owner import Owner
from fileserver.promises import Promise
from fileserver.prompt import Disk
from fileserver.retractions import Retraction, Retractions
from fileserver.revalidation import Revalidation
from fileserver.root import Fullness, Root, Stage
from fileserver.seals import Seals
from fileserver.signatures import acknowledged
from fileserver.watches import Changes, Watches
from protocol.api import Done
from protocol.bulk import Run
from protocol.files import FileCall, Forget

__all__ = ["Identity", "Outcome", "Recorder", "RestoredNode", "Stage", "Tree", "TreeState"]

_REFUSED_NUMBERS: Final = (ValueError, OverflowError)
"""What Python raises for a number that does not fit a system call, or a NUL inside a name: EINVAL."""

_Method = Callable[[Any, Any], Outcome]


@dataclass(frozen=True, slots=True)
class TreeState:
    """How a share is. ``reason`` is a sentence unless it is SERVING; ``lost`` counts the files that the guest
    still had a number for and that could not be found again (ESTALE). ``full``: the disk refuses data."""

    stage: Stage
    reason: str
    nodes: int
    descriptors: int
    lost: int
    full: bool


class Tree:
    """Serves the folder ``path``.

    ``path`` is absolute and without symlinks: none is followed. ``hidden`` are the paths of directories that the guest
    sees empty and cannot enter, and which it cannot move or replace, nor what leads to them.
    ``next_node`` gives out numbers that were never used before, greater than 1; by default the tree counts by itself.
    ``max_descriptors`` bounds what is kept open to find files again; by default that is what ``budget`` says, which the
    trees of a process share.
    ``keepsakes`` is where files without a name outlive this process.
    ``watches`` knows what changes on the host, and this tree as ``share``; without it nothing is promised.
    ``retract`` is called, in any thread, with what the guest may have been promised and what does not hold.
    """

    def __init__(
        self,
        path: str | bytes,
        *,
        read_only: bool,
        hidden: Iterable[str | bytes] = (),
        recorder: Recorder,
        next_node: Callable[[], int] | None = None,
        max_descriptors: int | None = None,
        keepsakes: ShareKeepsakes | None = None,
        budget: Budget | None = None,
        share: int = 0,
        watches: Watches | None = None,
        retract: Callable[[Retraction], None] = lambda retraction: None,
        manner: Manner = PLAIN,
    ) -> None:
        self._core = core = Core(
            read_only=read_only,
            seals=Seals(hidden, manner.is_foreign),
            recorder=recorder,
            next_node=next_node,
            max_descriptors=max_descriptors,
            keepsakes=keepsakes,
            budget=budget,
            share=share,
            watches=watches,
            retract=retract,
            inherit=manner.inherit,
        )
        self.promises = core.promises
        self._retractions = Retractions(core.reach.registry.table.by_name)
        self._root = Root(os.fsencode(path), core, manner.open_root)
        self._fullness = Fullness()
        names = NameOperations(core)
        self._methods: dict[type[FileCall[Any]], _Method] = {
            Forget: self._forget,
            **names.methods(),
            **EntryOperations(core, names).methods(),
            **AttributeOperations(core).methods(),
            **DataOperations(core, self._fullness).methods(),
            **ContentOperations(core).methods(),
        }
        self._judgement = Judgement(core, self.perform)
        self._root.check()

    def perform(self, call: FileCall[Any], payload: bytes | memoryview | Run = b"") -> Outcome:
        """Do it; ``Read`` into the run, if there is one. Raises ``OSError`` whose errno is the guest's answer; ENOSYS
        for a call that is not of this class."""
        kind = type(call)
        method = self._methods.get(kind)
        if method is None:
            raise OSError(errno.ENOSYS, "not served here")
        if kind.CHANGES and self._core.read_only and kind is not Forget:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        try:
            return method(call, payload)
        except OSError as error:
            raise self._answer(error) from None
        except _REFUSED_NUMBERS as error:
            raise OSError(errno.EINVAL, str(error)) from None

    def _answer(self, error: OSError) -> OSError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._fullness.refused(time.monotonic())
        if error.errno == errno.EBADF:  # the root went away under the call, and its descriptor with it
            return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return error if error.errno else OSError(errno.EIO, str(error))

    def _forget(self, call: Forget, payload: object) -> Outcome:
        if len(call.nodes) != len(call.counts):
            raise OSError(errno.EINVAL, "as many counts as nodes")
        for number, count in zip(call.nodes, call.counts, strict=True):
            self._core.forget(number, count)
        return Outcome(Done())

    def precondition(self, call: FileCall[Any]) -> bytes:
        """What to write down before ``call`` is done, for a successor that must judge whether it was. Never raises."""
        return self._judgement.precondition(call)

    def perform_again(
        self, call: FileCall[Any], payload: bytes | memoryview = b"", precondition: bytes = b""
    ) -> Outcome:
        """Do ``call`` that a process which was killed may have done already, and which then is not done twice.

        ``precondition`` is what was written down before the first time. Raises as ``perform``.
        """
        if self._core.read_only and type(call).CHANGES and type(call) is not Forget:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        try:
            return self._judgement.perform_again(call, payload, precondition)
        except OSError as error:
            raise self._answer(error) from None
        except _REFUSED_NUMBERS as error:
            raise OSError(errno.EINVAL, str(error)) from None

    def restore(self, nodes: Iterable[RestoredNode]) -> None:
        """Take over what an earlier process recorded, before the first call. A file is looked for when it is needed."""
        self._core.reach.restore(nodes)

    def alarm_told(self, number: int) -> None:
        """An answer that said ``stale`` about a node was put on its way to the guest, so the next ones need not."""
        if (node := self._core.reach.peek(number)) is not None:
            acknowledged(node)

    def promised(self, result: Any, promise: Promise) -> int:
        """What can be promised of an answer that is about to be sent (``Promises.kept``). In the thread in which
        changes are told of."""
        return self.promises.kept(
            promise, getattr(result, "attr", b""), stale=getattr(result, "stale", False)
        )

    def retract(self, changes: Changes) -> Retraction:
        """What the guest is to be told about ``changes``. In the same thread."""
        return self._retractions.of(changes)

    def retract_again(self, retraction: Retraction) -> Retraction:
        """What of it is to be told once more, since it may not have arrived. In the same thread."""
        return self._retractions.again(retraction)

    def see_writers(self, nodes: Iterable[Node]) -> None:
        """Programs of the host have opened these files: is it to write them?"""
        if (sharing := self._core.sharing) is not None:
            for node in nodes:
                with suppress(OSError), self._core.reach.use(node.number):
                    sharing.look_again(node)

    def revalidate(self, tell: Callable[[Retraction], None], *, absences: bool, trusting: bool) -> None:
        """Look at everything that the guest knows again (``revalidation``). May take as long as the disk does."""
        Revalidation(self._core, tell).run(absences=absences, trusting=trusting)

    def show_as(self, owner: Owner | None) -> None:
        """Who the guest's user is; before its first call. None: the ids there are those here."""
        self._core.owner = owner

    def suspect_all(self) -> None:
        """A reply may have been lost, and with it the word that data is stale: say it again for every file.
        To be called when a new session with the guest begins."""
        self._core.reach.suspect_all()

    def describe(self) -> TreeState:
        reach = self._core.reach
        return TreeState(
            stage=self._root.stage,
            reason=self._root.reason,
            nodes=reach.nodes,
            descriptors=reach.descriptors + self._core.files.descriptors,
            lost=reach.lost,
            full=self._fullness.full,
        )

    def check_root(self) -> bool:
        """To be called once a second: adopts a folder that was replaced, notices one that went. True: the
        state changed. May block for as long as the disk does."""
        changed = self._root.check()
        full = self._fullness.full
        self._fullness.check(self._core, time.monotonic())
        return changed or full != self._fullness.full

    @property
    def disk(self) -> Disk | None:
        """What the folder is on, None if there is none; another object for another folder."""
        return self._root.disk

    def close_idle(self, now: float) -> float:
        """Close what is due at ``now`` (``time.monotonic``). Returns when there will be more to do: not later than
        in 10 s, and sooner if a file is written meanwhile (ask again ``datafiles.AFTER_WRITE`` after that)."""
        return self._core.files.close_idle(now)

    def names_gone(self, now: float) -> list[tuple[int, bytes]]:
        """Names (directory's node, name) of files that were deleted on the host: for the guest to drop, so that those
        it does not use are forgotten. Looks every 10 s at most; may block for as long as the disk does."""
        return self._core.reach.sweep(now)

    def data_fd_for_locks(self, node: int, flags: int) -> int:
        """A descriptor of its own open file description of a regular file; the caller closes it.

        ``flags`` are open(2)'s access mode; anything but O_RDONLY is EROFS on a share that is read-only.
        """
        core = self._core
        with core.reach.use(node) as file:
            file.locked = True
            return core.files.open_separately(file, flags & os.O_ACCMODE)

    def close(self) -> None:
        """Give every descriptor back. No call may be running."""
        self._core.files.close_all()
        self._core.snapshots.clear()
        self._core.reach.close()
