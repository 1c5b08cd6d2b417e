"""Which calls with large answers may begin: answers that nobody reads yet must not fill the memory.

The laws:
- What the calls under way may bring and what the link has not written stay below ``MAX_ANSWERS`` together,
  but for one call of each share. For this room a share waits for the link, or for itself, never for another: where
  a disk hangs, its calls stay under way.
- A call whose answer could be in the memory that is shared with the guest (``protocol.bulk``) waits for some as long
  as it is worth it; then it goes without. A share begins with memory only while it fills less than is free, so that
  one whose disk hangs ends up with half, the next one with a quarter, and who comes last finds some. (The dynamic
  threshold of switches that share a memory: Choudhury and Hahne, 1998.)
- What is held back begins in its share's order, and shares that were held back take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from protocol.bulk import Account, Bulk, Run

ItemT = TypeVar("ItemT")

#: Bytes of answers. A guest may have 1,024 calls pending, of 1 MiB each; this many keep the link busy for 10 ms
#: and more, while the threads bring the next.
MAX_ANSWERS: Final = 32 << 20
#: Bytes that the calls of one share may be about to bring: some for each of its threads, and the next.
MAX_OF_A_SHARE: Final = 8 << 20
#: How often slots may come back, without any for it, to a call that waits for some. Each time it is a tenth of all
#: slots or more, or goes with other frames of the guest's. So who needs neighbouring slots, of which a share that
#: hangs has every eighth, does not wait for as long as others go on reading.
PATIENCE: Final = 32


@dataclass(frozen=True, slots=True)
class Room:
    """What a call has been begun with, until ``Admission.ended``. ``size``: bytes of its answer at most; ``slots``:
    of the memory that it fills; ``run``: those, which are whoever's who answers, to be sent or given back."""

    share: Hashable
    size: int
    slots: int = 0
    run: Run | None = None


@dataclass(slots=True)
class _Asked(Generic[ItemT]):
    """A call that is to begin; its answer may be ``shareable``, in memory that the guest has, too."""

    size: int
    item: ItemT
    shareable: bool
    since: int = -1
    """``Bulk.returns`` when memory for it was first looked for; before: -1."""


@dataclass(slots=True)
class _Queue(Generic[ItemT]):
    """The calls of one share."""

    under_way: int = 0  # bytes
    filled: Account = field(default_factory=Account)  # slots of those under way
    held: deque[_Asked[ItemT]] = field(default_factory=deque)


class Admission(Generic[ItemT]):
    """Calls ``begin`` with each item when there is room for its answer. ``backlog``: bytes the link has to write."""

    def __init__(
        self, begin: Callable[[ItemT, Room], None], backlog: Callable[[], int], bulk: Bulk | None = None
    ) -> None:
        self._begin = begin
        self._backlog = backlog
        self._bulk = Bulk() if bulk is None else bulk
        self._queues: dict[Hashable, _Queue[ItemT]] = {}
        self._under_way = self._held = 0

    def ask(self, share: Hashable, size: int, item: ItemT, *, shareable: bool = False) -> None:
        """Begin with ``item``, whose answer has at most ``size`` bytes (and may have one), now or later."""
        queue = self._queues.setdefault(share, _Queue())
        asked = _Asked(size, item, shareable)
        room = None if queue.held else self._room(share, queue, asked)
        if room is None:
            queue.held.append(asked)
            self._held += 1
        else:
            self._begin(item, room)

    def ended(self, room: Room) -> None:
        """What was begun with ``room`` is over, and its answer with the link."""
        queue = self._queues[room.share]
        queue.under_way -= room.size
        queue.filled.lent -= room.slots
        self._under_way -= room.size
        if not queue.under_way and not queue.held:
            del self._queues[room.share]

    def go_on(self) -> None:
        """There may be room: something has ended, was written, or came back, or nothing does any more."""
        while self._held and self._begin_next():
            pass

    def _begin_next(self) -> bool:
        for share, queue in self._queues.items():
            if queue.held and (room := self._room(share, queue, queue.held[0])) is not None:
                self._queues[share] = self._queues.pop(share)  # to the end of the round
                self._held -= 1
                self._begin(queue.held.popleft().item, room)
                return True
        return False

    def drop(self) -> list[ItemT]:
        """What is held back, which will not begin any more."""
        dropped = [asked.item for queue in self._queues.values() for asked in queue.held]
        self._held = 0
        for share, queue in list(self._queues.items()):
            queue.held.clear()
            if not queue.under_way:
                del self._queues[share]
        return dropped

    # --- room --------------------------------------------------------------------------------------

    def _room(self, share: Hashable, queue: _Queue[ItemT], asked: _Asked[ItemT]) -> Room | None:
        """What the call may begin with, which is counted from here on; None: it has to wait."""
        if not self._fits(queue, asked.size):
            return None
        run = self._memory(queue, asked)
        if run is None and self._is_worth_waiting(asked):
            return None
        slots = 0 if run is None else run.slots
        queue.under_way += asked.size
        queue.filled.lent += slots
        self._under_way += asked.size
        return Room(share, asked.size, slots, run)

    def _fits(self, queue: _Queue[ItemT], size: int) -> bool:
        backlog = self._backlog()
        if not queue.under_way:
            return backlog <= MAX_ANSWERS
        return queue.under_way + size <= MAX_OF_A_SHARE and self._under_way + backlog + size <= MAX_ANSWERS

    def _memory(self, queue: _Queue[ItemT], asked: _Asked[ItemT]) -> Run | None:
        if not asked.shareable or not self._bulk.active:
            return None
        # One that fills as much as is free gets none for its account, and hears when there is more, as others do.
        has_its_part = queue.filled.lent >= self._bulk.free
        return self._bulk.take(asked.size, queue.filled if has_its_part else None)

    def _is_worth_waiting(self, asked: _Asked[ItemT]) -> bool:
        """Whether one that got no memory may expect some."""
        bulk = self._bulk
        if not asked.shareable or not bulk.active or bulk.stuck:
            return False
        if asked.since < 0:
            asked.since = bulk.returns
        return bulk.returns - asked.since < PATIENCE
