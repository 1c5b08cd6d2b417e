"""What a guest is told of one share, beside the answers to its calls: what changed on the host, and what may have.

The laws:
- What is told and what is promised is sent by one thread, trio's, so in the order in which it was decided.
- What was told last may not have arrived when the session ends. So in the next one it is told again, as far as it still
  matters; then all that the guest was promised is compared with what is there (``revalidation``).
- Without a session nobody is told of anything: the next one begins with that comparison.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import trio

from fileserver.fanotify import OPEN
from fileserver.renewal import Allowance, Found, Wanted, counted, find, give_back, settle, wanted
from fileserver.retractions import Retraction
from fileserver.tree import Tree
from fileserver.watches import Changes
from protocol.link import Link

logger = logging.getLogger(__name__)

SAID_AGAIN: Final = 60.0
"""Seconds for which something that was told may not have arrived: a session is over when nothing has come for 20."""

MAX_SAID: Final = 65536
"""Names, files and directories that are remembered for so long. After more, nothing is taken for granted in the next
session."""


class _Doubts(NamedTuple):
    """What has to be looked at again (``Revalidation.run``)."""

    absences: bool
    trusting: bool

    def and_also(self, other: _Doubts) -> _Doubts:
        return _Doubts(self.absences or other.absences, self.trusting and other.trusting)


class Telling:
    """Of one share. In trio's thread, where nothing else is said."""

    def __init__(
        self,
        share: int,
        submit: Callable[[Callable[[], object]], object],
        put: Callable[[Retraction], None],
        put_found: Callable[[Link, Found], None] | None = None,
        do_at_once: Callable[[Callable[[], object]], bool] = lambda function: False,
    ) -> None:
        """``submit`` has something done in a thread of the share's; ``put`` brings what is found there to ``tell``, and
        ``put_found`` to ``renew``; without that nothing is looked up. ``do_at_once`` does something small in this
        thread, if that may be, and says whether."""
        self._share = share
        self._submit, self._put, self._put_found = submit, put, put_found
        self._do_at_once = do_at_once
        self._allowance = Allowance()
        self.tree: Tree | None = None
        """Until it is made, no guest knows anything of it."""
        self._said: deque[tuple[float, Retraction]] = deque()
        self._weight = 0
        self._trusting = True  # what is known here is what the guest was told
        self._lock = threading.Lock()  # of what follows
        self._doubts: _Doubts | None = None
        self.revalidating = False

    # --- what is certain ---------------------------------------------------------------------------

    def changed(self, link: Link, changes: Changes) -> None:
        """Programs of the host have done this."""
        if self.tree is None:
            return
        retraction = self.tree.retract(changes)
        renewable = None if self._put_found is None else wanted(changes, retraction)
        self.tell(link, retraction)
        if renewable is not None and self._allowance.take():
            found: list[Found] = []
            tree, share = self.tree, self._share
            if self._do_at_once(lambda: found.append(find(tree, share, renewable))):
                self.renew(link, link, found[0])
            else:
                self._submit(partial(self._find, link, renewable))
        # Only now: as long as a thread has something to do, nothing is done at once.
        if opened := [node for node, mask in changes.files.items() if mask & OPEN]:
            self._submit(partial(self.tree.see_writers, opened))

    def _find(self, link: Link, renewable: Wanted) -> None:
        """In a thread of the share's."""
        if self.tree is not None and self._put_found is not None:
            self._put_found(link, find(self.tree, self._share, renewable))

    def renew(self, link: Link | None, asked: Link, found: Found) -> None:
        """Have the guest told how that is now which has ``changed``, if ``link`` is the session it was ``asked`` in."""
        if (tree := self.tree) is None:
            return
        in_vain = counted(found)
        if link is asked:
            told, in_vain = settle(found, self._share, tree.promised)
            if told.nodes or told.files:
                link.post(told)
        if in_vain:
            self._submit(lambda: give_back(tree, self._share, in_vain))

    def tell(self, link: Link, retraction: Retraction) -> None:
        """Have the guest told."""
        now = trio.current_time()
        self._said.append((now, retraction))
        self._weight += retraction.weight
        while self._said and self._said[0][0] < now - SAID_AGAIN:
            self._weight -= self._said.popleft()[1].weight
        if self._weight > MAX_SAID:
            self._forget()
            self._trusting = False
        self._post(link, retraction)

    def _post(self, link: Link, retraction: Retraction) -> None:
        for notice in retraction.notices(self._share):
            link.post(notice)

    def _forget(self) -> None:
        self._said.clear()
        self._weight = 0

    # --- what is not -------------------------------------------------------------------------------

    def inherit(self) -> None:
        """Another process has told this guest what it knows."""
        self._trusting = False

    def begin_session(self, link: Link) -> None:
        """What was told last in the session before may not have arrived, and what has happened since was not told."""
        if self.tree is not None:
            for _, retraction in self._said:
                self._post(link, self.tree.retract_again(retraction))
        self._forget()
        self._look_again(_Doubts(absences=False, trusting=self._trusting))
        self._trusting = True

    def void(self) -> None:
        """Nothing stands any more that the guest was promised."""
        self._look_again(_Doubts(absences=True, trusting=True))

    def _look_again(self, doubts: _Doubts) -> None:
        with self._lock:
            self._doubts = doubts if self._doubts is None else self._doubts.and_also(doubts)
            begin = not self.revalidating
            self.revalidating = True
        if begin:
            self._submit(self._revalidate)

    def _revalidate(self) -> None:
        """In a thread of the share's."""
        while (doubts := self._take_doubts()) is not None:
            try:
                if self.tree is not None:
                    self.tree.revalidate(self._put, absences=doubts.absences, trusting=doubts.trusting)
            except Exception:
                logger.exception("share.not-revalidated share=%x", self._share)

    def _take_doubts(self) -> _Doubts | None:
        with self._lock:
            doubts, self._doubts = self._doubts, None
            self.revalidating = doubts is not None
            return doubts
