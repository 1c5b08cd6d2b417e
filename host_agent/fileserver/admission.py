"""Which calls with large answers may begin: answers that nobody reads yet must not fill the memory.

The laws:
- What the calls under way may bring and what the link has not written stay below ``MAX_ANSWERS`` together,
  but for one call of each share.
- A share waits for the link, or for itself, never for another: where a disk hangs, its calls stay under way.
- What is held back begins in its share's order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

ItemT = TypeVar("ItemT")

#: Bytes of answers. A guest may have 1,024 calls pending, of 1 MiB each; this many keep the link busy for 10 ms
#: and more, while the threads bring the next.
MAX_ANSWERS: Final = 32 << 20
#: Bytes that the calls of one share may be about to bring: some for each of its threads, and the next.
MAX_OF_A_SHARE: Final = 8 << 20


@dataclass(slots=True)
class _Queue(Generic[ItemT]):
    """The calls of one share."""

    under_way: int = 0  # bytes
    held: deque[tuple[int, ItemT]] = field(default_factory=deque)


class Admission(Generic[ItemT]):
    """Calls ``begin`` with each item when there is room for its answer. ``backlog``: bytes the link has to write;
    ``has_memory``: whether there is memory for so many."""

    def __init__(
        self,
        begin: Callable[[ItemT], None],
        backlog: Callable[[], int],
        has_memory: Callable[[int], bool] = lambda size: True,
    ) -> None:
        self._begin = begin
        self._backlog = backlog
        self._has_memory = has_memory
        self._queues: dict[Hashable, _Queue[ItemT]] = {}
        self._under_way = self._held = 0

    def ask(self, share: Hashable, size: int, item: ItemT) -> None:
        """Begin with ``item``, whose answer has at most ``size`` bytes (and may have one), now or later."""
        queue = self._queues.setdefault(share, _Queue())
        if queue.held or not self._fits(queue, size):
            queue.held.append((size, item))
            self._held += 1
        else:
            self._admit(queue, size, item)

    def ended(self, share: Hashable, size: int) -> None:
        """What was begun for ``share`` is over, and its answer with the link."""
        queue = self._queues[share]
        queue.under_way -= size
        self._under_way -= size
        if not queue.under_way and not queue.held:
            del self._queues[share]

    def go_on(self) -> None:
        """There may be room: something has ended, or was written."""
        if self._held:
            for queue in list(self._queues.values()):
                while queue.held and self._fits(queue, queue.held[0][0]):
                    self._held -= 1
                    self._admit(queue, *queue.held.popleft())

    def drop(self) -> list[ItemT]:
        """What is held back, which will not begin any more."""
        dropped = [item for queue in self._queues.values() for _, item in queue.held]
        self._held = 0
        for share, queue in list(self._queues.items()):
            queue.held.clear()
            if not queue.under_way:
                del self._queues[share]
        return dropped

    def _fits(self, queue: _Queue[ItemT], size: int) -> bool:
        backlog = self._backlog()
        if not queue.under_way:
            return backlog <= MAX_ANSWERS
        fits = queue.under_way + size <= MAX_OF_A_SHARE and self._under_way + backlog + size <= MAX_ANSWERS
        return fits and self._has_memory(size)

    def _admit(self, queue: _Queue[ItemT], size: int, item: ItemT) -> None:
        queue.under_way += size
        self._under_way += size
        self._begin(item)
