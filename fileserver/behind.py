"""What comes behind writes that the guest has answered for before they were done (``Write.ahead``). Sans-IO, but for
``Batch.run``.

The laws, for the calls of one share:
- These writes are done one after another, in the order in which they came: what was written first in the guest, a
  program of the host sees first.
- Whatever could tell that they have yet to be done, or change something before they are, waits for them. Only a
  question about some other file overtakes. Locks wait for their turn as well: one that is given up or taken before the
  data is there would protect nothing, and none holds up the others, since no lock call waits for another process.
- What waits begins in its order, up to the next such write that goes to a thread.
- A write that is done as soon as it is here needs none of this: a share has a ``Behind`` only while a thread has one.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from protocol.files import (
    FileCall,
    GetAttributes,
    GetXattr,
    ListXattr,
    Read,
    ReadLink,
    Seek,
    Write,
)

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

_OF_A_FILE: Final = frozenset({GetAttributes, GetXattr, ListXattr, Read, ReadLink, Seek})
"""Questions to which no other file than ``node`` matters. Not ``Lookup`` and listings, which do not know before whose
attributes they tell, nor statfs(2)."""


def is_ahead(call: FileCall[Any]) -> bool:
    """Whether the guest has answered for it already."""
    return type(call) is Write and call.ahead


class Batch(Generic[ItemT]):
    """What one thread does, in its order, after all of ``previous``."""

    def __init__(self, items: deque[ItemT], previous: Batch[ItemT] | None = None) -> None:
        self.items = items
        self._previous = previous
        self._done = threading.Event()

    def run(self, work: Callable[[ItemT], object]) -> None:
        """Nothing is kept of an item that was worked on."""
        if self._previous is not None:
            self._previous._done.wait()
        while self.items:
            try:
                work(self.items.popleft())
            except Exception:
                logger.exception("call.failed")
        self._done.set()


class Behind(Generic[ItemT]):
    """The calls of one share, each with an item that stands for it."""

    def __init__(self) -> None:
        self._batch: Batch[ItemT] = Batch(deque())
        self._under_way = 0  # writes that a thread does, or will do without being asked again
        self._waiting: deque[tuple[FileCall[Any], ItemT]] = deque()
        self._written: Counter[int] = Counter()  # by node: writes that are under way, or wait

    def __bool__(self) -> bool:
        return bool(self._under_way or self._waiting)

    def holds(self, call: Any) -> bool:
        """Whether ``call``, which has just come, must wait."""
        return type(call) not in _OF_A_FILE or call.node in self._written

    def wait(self, call: FileCall[Any], item: ItemT) -> None:
        """``item`` is to begin when all that waits now has begun, and what is a write is done."""
        self._waiting.append((call, item))
        if is_ahead(call):
            self._count(call, 1)

    def next(self) -> ItemT | None:
        """What is to begin now; None: nothing, or not yet."""
        if self._under_way or not self._waiting:
            return None
        call, item = self._waiting.popleft()
        if is_ahead(call):
            self._count(call, -1)
        return item

    def begin(self, call: FileCall[Any], item: ItemT) -> Batch[ItemT]:
        """A thread is to do ``item``, a write, and right after it those that come next. Each is to be ``ended``."""
        items = deque([item])
        self._count(call, 1)
        while self._waiting and is_ahead(self._waiting[0][0]):
            items.append(self._waiting.popleft()[1])
        self._under_way += len(items)
        self._batch = Batch(items)
        return self._batch

    def ended(self, call: FileCall[Any]) -> None:
        """A write of a batch is done."""
        self._under_way -= 1
        self._count(call, -1)

    def drop(self) -> list[ItemT]:
        """What waits and changes nothing, which will not begin any more."""
        dropped = [item for call, item in self._waiting if not call.CHANGES]
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0].CHANGES)
        return dropped

    def close(self, left_out: Callable[[FileCall[Any]], bool]) -> tuple[Batch[ItemT], list[ItemT]]:
        """Nobody will ask for the ``next``: what waits is for one thread to do, after what is under way; but what is
        ``left_out``, which comes second, will not begin any more."""
        rest = [(call, item, left_out(call)) for call, item in self._waiting]
        self._waiting.clear()
        batch = Batch(
            deque(item for _, item, out in rest if not out), self._batch if self._under_way else None
        )
        return batch, [item for _, item, out in rest if out]

    def _count(self, call: Any, by: int) -> None:
        self._written[call.node] += by
        if not self._written[call.node]:
            del self._written[call.node]
