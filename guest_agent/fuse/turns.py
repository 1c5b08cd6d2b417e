"""Whose call goes next: the calls of each share in their order, and the shares in turn.

The laws:
- A share has no more under way than is still free, of calls and of bytes alike. One alone gets half; when n of them
  hang (a disk of the host's that does not answer) each ends up with 1/(n+1), and as much is left for the others.
  (The dynamic threshold of switches that share a memory: Choudhury and Hahne, 1998.)
- Nothing overtakes what waits of the same share. Shares that wait get one call each, round and round.
- What waits of one share is bounded in bytes by whoever makes it: ``Queue.gate`` says when to take no more.

Sans-IO but for the gates; one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Final, Generic, Protocol, TypeVar

import trio

MAX_WAITING: Final = 32 << 20
"""Bytes of one share's payloads that wait to be sent. The kernel sends 64 MiB at once of what programs have mapped
and written (``abi.MAX_BACKGROUND`` times ``abi.MAX_WRITE``), and 1 MiB for each thread in write(2), of any number
of threads; what is not taken from it waits there, without a copy."""

FEW_WAITING: Final = MAX_WAITING // 2
"""Bytes at which more is taken again."""


class Gate:
    """Open, or closed for now."""

    def __init__(self) -> None:
        self._inside: set[trio.CancelScope] = set()
        self._opened = trio.Event()
        self._opened.set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        """Whoever is inside is cancelled: out at its next checkpoint."""
        self._opened = trio.Event()
        for scope in self._inside:
            scope.cancel()

    async def wait(self) -> None:
        """Until it is open."""
        await self._opened.wait()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A block that ends early when the gate is closed."""
        with trio.CancelScope() as scope:
            self._inside.add(scope)
            try:
                if not self.is_open:
                    scope.cancel()
                yield
            finally:
                self._inside.discard(scope)


class Item(Protocol):
    """A call."""

    @property
    def share(self) -> int: ...

    @property
    def size(self) -> int:
        """Bytes of its payload."""


ItemT = TypeVar("ItemT", bound=Item)


class Queue(Generic[ItemT]):
    """The calls of one share: those that wait, and how much is under way."""

    __slots__ = ("bytes", "calls", "gate", "items", "waiting")

    def __init__(self) -> None:
        self.items: deque[ItemT] = deque()
        self.waiting = 0
        """Bytes of those in the queue."""
        self.calls = 0
        self.bytes = 0
        self.gate = Gate()

    def came(self, size: int) -> None:
        self.waiting += size
        if self.waiting > MAX_WAITING and self.gate.is_open:
            self.gate.close()

    def left(self, size: int) -> None:
        self.waiting -= size
        if self.waiting <= FEW_WAITING and not self.gate.is_open:
            self.gate.open()


class Turns(Generic[ItemT]):
    """Of all shares. ``max_calls`` and ``max_bytes`` may be under way (of bytes one call more)."""

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._queues: dict[int, Queue[ItemT]] = {}
        self._calls = self._bytes = 0
        self.waiting = 0
        """Calls."""

    def __iter__(self) -> Iterator[ItemT]:
        """What waits, in the order of each share."""
        return chain.from_iterable(queue.items for queue in self._queues.values())

    def gate(self, share: int) -> Gate:
        """Closed while too much of ``share`` waits."""
        return self._queue(share).gate

    def begin(self, item: ItemT) -> bool:
        """Count ``item`` as under way; False, and nothing done, if it has to wait."""
        queue = self._queues.get(item.share) or self._queue(item.share)
        if queue.items or not self._has_room(queue):
            return False
        size = item.size
        queue.calls += 1
        queue.bytes += size
        self._calls += 1
        self._bytes += size
        return True

    def wait(self, item: ItemT) -> None:
        queue = self._queue(item.share)
        queue.items.append(item)
        queue.came(item.size)
        self.waiting += 1

    def next(self) -> ItemT | None:
        """The one whose turn it is, which is under way now; None while nobody may go."""
        for share, queue in self._queues.items():
            if queue.items and self._has_room(queue):
                # To the end of the round.
                self._queues[share] = self._queues.pop(share)
                item = queue.items.popleft()
                queue.left(item.size)
                self.waiting -= 1
                queue.calls += 1
                queue.bytes += item.size
                self._calls += 1
                self._bytes += item.size
                return item
        return None

    def end(self, item: ItemT) -> None:
        """``item`` is not under way any more."""
        queue, size = self._queues[item.share], item.size
        queue.calls -= 1
        queue.bytes -= size
        self._calls -= 1
        self._bytes -= size

    def end_all(self, items: Iterable[ItemT]) -> None:
        """None of ``items`` is, and all wait again, before whatever does already."""
        for item in reversed(list(items)):
            self.end(item)
            queue = self._queue(item.share)
            queue.items.appendleft(item)
            queue.came(item.size)
            self.waiting += 1

    def remove(self, item: ItemT) -> None:
        """``item`` waits no more."""
        queue = self._queue(item.share)
        queue.items.remove(item)
        queue.left(item.size)
        self.waiting -= 1

    def clear(self, keep: Callable[[ItemT], bool]) -> list[ItemT]:
        """Let nothing wait but what is to be kept; returns all that waited."""
        before = list(self)
        for queue in self._queues.values():
            queue.items.clear()
            queue.left(queue.waiting)
        self.waiting = 0
        for item in before:
            if keep(item):
                self.wait(item)
        return before

    def _queue(self, share: int) -> Queue[ItemT]:
        if (queue := self._queues.get(share)) is None:
            queue = self._queues[share] = Queue()
        return queue

    def _has_room(self, queue: Queue[ItemT]) -> bool:
        return self._calls + queue.calls < self._max_calls and self._bytes + queue.bytes < self._max_bytes
