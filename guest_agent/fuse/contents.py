"""Contents of small files, brought before they are asked for.

To open and read a small file costs one message, and a tree of 1,000 of them 1,000, one after the other. Who reads
files of a directory goes on with others of it: so what comes next is asked for ahead, many files in one message
(``protocol.files.ReadMany``), and READ is answered from here. A file that was read to its end is dropped, since the
kernel has it.

The laws:
- What is here the host has promised, and it is in one order with what takes that back: a ``Changed``, an own change or
  the end of the session drops a file, also one that is on its way.
- Asked for is what comes after a file in the order (``pieces.Order``) in which the guest goes through directories: as
  they are listed, until two files that are read one after the other follow each other in another order. First
  ``FIRST`` files, and then, whenever half of what came has been read, twice as many as before, those of the directories
  that come next included. So who reads a single file costs ``FIRST`` others, and who reads here and there no more than
  that. Of a host that is far away it is more at first, and also what is before that file.
- ``MAX_HELD`` bytes, ``MAX_CALLS`` messages under way, and nothing is here ``IDLE`` seconds after the last READ.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, islice
from typing import Final, Protocol

from guest_agent.fuse.arrival import Arrival
from guest_agent.fuse.directories import File
from guest_agent.fuse.host import Ask
from guest_agent.fuse.operation import Idle, Timers, spawn
from guest_agent.fuse.pieces import Order
from protocol.files import MAX_CONTENT, MAX_DATA, Changed, ReadMany
from protocol.files import Contents as Given

MAX_HELD: Final = 64 << 20
"""Bytes of contents."""
MAX_CALLS: Final = 4
"""Messages on their way: on the host they take as many of a share's 6 threads."""
IDLE: Final = 10.0
"""Seconds."""
FIRST: Final = 4
"""Files that are asked for after the first one."""
MOST: Final = 256
"""Files in one message."""
MOST_AT_FIRST: Final = 64
"""The same in another directory, once one has been read to its end."""
FIRST_BYTES: Final = 128 << 10
"""Bytes of the first such files together: 5 ms of virtio-serial..."""
MOST_FIRST_BYTES: Final = 512 << 10
"""...and of a host that is far away: 40 ms at 100 Mbit/s."""
MAX_RUNS: Final = 64
"""Directories that are being read, one after the other or at once."""
NEAR: Final = 4
"""How far apart, in an order, are files that are read one after the other at the most (between them are some that are
not small)."""
LOOKED_AT: Final = 4
"""Files that are looked at for each that is asked for at the most: many are large, or were read already."""


class Asker(Protocol):
    """The host."""

    caller: int

    @property
    def is_far(self) -> bool: ...

    def ask(self, call: ReadMany) -> Ask[Given]: ...

    def scaled(self, count: int, most: int) -> int: ...


class Siblings(Protocol):
    """Of ``directories.Directories``, what is needed here."""

    def directory_of(self, node: int) -> int:
        """0 if it is not known."""

    def following(self, node: int, order: Order) -> Iterator[File]:
        """The regular files after ``node`` in its directory."""

    def files_of(self, node: int, order: Order) -> Iterator[File] | None:
        """The regular files of a directory; None if they are not known."""

    def directories_after(self, node: int, order: Order) -> Iterator[int]:
        """The directories after this one in that which it is in."""


class _Pace:
    """How fast files are being read, in one directory and those that follow it."""

    __slots__ = ("asking", "beyond", "left", "next", "previous", "run", "window")

    def __init__(self, window: int = 0) -> None:
        self.window = window
        """How many were asked for at once."""
        self.left = 0
        """How many came and were not read."""
        self.asking = False
        self.previous = 0
        """The node that was read last."""
        self.run: _Run
        """From where is asked for more..."""
        self.beyond: Iterator[int] | None = None
        """...and the directories after that."""
        self.next = 0
        """The first of these, if it is not listed yet."""

    @property
    def is_read(self) -> bool:
        """Whether it is of use to ask for more."""
        return not self.asking and self.left <= self.window // 2

    @property
    def is_over(self) -> bool:
        return not self.asking and self.left <= 0

    def go_on_from(self, run: _Run) -> None:
        self.run, self.beyond, self.next = run, None, 0


class _Run:
    """How the files of a directory are being read."""

    __slots__ = ("directory", "files", "pace", "seen", "tried")

    def __init__(self, directory: int, pace: _Pace) -> None:
        self.directory = directory
        self.pace = pace
        self.files: Iterator[File] = iter(())
        """Those that are asked for next."""
        self.seen: set[int] = set()
        """Nodes that were asked for or read."""
        self.tried = False
        """Whether another order was looked for."""


class _Coming(Arrival):
    """An answer on its way."""

    __slots__ = ("nodes", "run")

    def __init__(self, run: _Run, nodes: list[int], host: Asker) -> None:
        super().__init__(host)
        self.run = run
        self.nodes = nodes


class Contents:
    """Of one mount."""

    def __init__(
        self, host: Asker, share: int, siblings: Siblings, timers: Timers, uniques: Iterator[int]
    ) -> None:
        self._host = host
        self._share = share
        self._siblings = siblings
        self._idle = Idle(timers, IDLE, self._clear, lambda: self._runs or self._here)
        self._uniques = uniques
        self._here: OrderedDict[int, tuple[bytes, _Pace]] = OrderedDict()
        """By node, least recently used first."""
        self._coming: dict[int, _Coming] = {}
        """By node: what is believed of answers on their way."""
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        """By directory, oldest first."""
        self._order = Order.LISTED
        """How files were read lately."""
        self._calls = 0
        self._held = 0
        self._renewed = _Pace()
        self._renewed.asking = True
        """Of what came by itself, after which nothing is asked for."""

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self._held

    def __contains__(self, node: int) -> bool:
        """Whether ``read`` may have what a READ asks for."""
        return node in self._here or node in self._coming

    # --- what is read ----------------------------------------------------------------------------------

    async def read(self, unique: int, node: int, offset: int, size: int) -> bytes | None:
        """What request ``unique`` is to be answered with: ``size`` bytes of a file, fewer at its end. None: the host
        must be asked."""
        if (coming := self._coming.get(node)) is not None:
            await coming.until(unique)
        if (here := self._here.get(node)) is None:
            return None
        data, pace = here
        if offset + size >= len(data):
            self._take(node)
        else:
            self._here.move_to_end(node)
        if not offset:
            self._idle.used()
            pace.previous = node
            self._ask(pace)
        return data if size >= len(data) and not offset else data[offset : offset + size]

    def give(self, node: int, data: bytes) -> None:
        """The host has told it without being asked."""
        self.drop(node)
        self._here[node] = data, self._renewed
        self._held += len(data)
        self._renewed.left += 1
        self._make_room()
        self._idle.watch()

    def missed(self, node: int) -> None:
        """The beginning of a file is read, and is not here."""
        directory = self._siblings.directory_of(node)
        if not directory:
            return
        self._idle.used()
        run = self._runs.get(directory)
        if run is None or (node in run.seen and run.pace.left <= 0):
            run = self._begin(directory)  # the latter: it is read once more, and so will the others be
        pace = run.pace
        if pace.previous and (not pace.window or not pace.is_read):
            self._try_orders(run, node)
        run.seen.add(node)
        pace.previous = node
        if pace.is_read:
            run.files = self._siblings.following(node, self._order)
            if self._host.is_far and not pace.window:
                # In which order is not known yet, and those before it cost less than to wait for one of them.
                run.files = chain(run.files, self._siblings.files_of(directory, self._order) or ())
            pace.go_on_from(run)
            self._ask(pace)

    def _begin(self, directory: int) -> _Run:
        before = next(reversed(self._runs.values()), None)
        pace = _Pace()
        if before is not None and before.pace.is_over:
            pace.window = min(before.pace.window, MOST_AT_FIRST // 2)
        self._idle.watch()
        return self._follow(directory, pace)

    def _follow(self, directory: int, pace: _Pace) -> _Run:
        run = self._runs[directory] = _Run(directory, pace)
        self._runs.move_to_end(directory)
        if len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)
        return run

    def _try_orders(self, run: _Run, node: int) -> None:
        """What came is not what is read. Is there an order in which ``node`` follows what was read before it?"""
        if run.tried or run.pace.asking:
            return
        run.tried = True
        for order in (self._order, *Order):
            near = islice(self._siblings.following(run.pace.previous, order), NEAR)
            if any(file == node for file, _ in near):
                if order is not self._order:
                    self._order = order
                    run.pace.window = run.pace.left = 0
                return

    # --- what is asked for -----------------------------------------------------------------------------

    def _ask(self, pace: _Pace) -> None:
        if pace.is_read and self._calls < MAX_CALLS and (nodes := self._next(pace)):
            spawn(self._bring(_Coming(pace.run, nodes, self._host)))

    def _next(self, pace: _Pace) -> list[int]:
        """The nodes that are to be asked for now."""
        room = MAX_DATA if pace.window else self._host.scaled(FIRST_BYTES, MOST_FIRST_BYTES)
        window = min(2 * pace.window, MOST) or self._host.scaled(FIRST, MOST_AT_FIRST)
        nodes: list[int] = []
        for _ in range(LOOKED_AT * window):
            run = pace.run
            if (file := next(run.files, None)) is None:
                if not self._go_on(pace):
                    break
                continue
            node, size = file
            if not 0 < size <= MAX_CONTENT or node in run.seen or node in self:
                continue
            if size > room:
                run.files = chain((file,), run.files)
                break
            room -= size
            nodes.append(node)
            run.seen.add(node)
            if len(nodes) == window:
                break
        if nodes:
            pace.window = window
        return nodes

    def _go_on(self, pace: _Pace) -> bool:
        """To the next directory: if several files have been read, and it is known."""
        if pace.window <= FIRST:
            return False
        if pace.beyond is None:
            pace.beyond = self._siblings.directories_after(pace.run.directory, self._order)
        directory = pace.next = pace.next or next(pace.beyond, 0)
        files = self._siblings.files_of(directory, self._order) if directory else None
        if files is None:
            return False
        run = self._runs.get(directory)
        if run is None or run.pace.is_over:
            run = self._follow(directory, pace)
        elif run.pace is not pace:
            return False
        run.files = files
        pace.run, pace.next = run, 0
        return True

    async def _bring(self, coming: _Coming) -> None:
        pace, nodes = coming.run.pace, coming.nodes
        self._coming.update(dict.fromkeys(nodes, coming))
        pace.asking = True
        self._calls += 1
        call = ReadMany(self._share, next(self._uniques), coming.run.directory, nodes, MAX_DATA)
        try:
            given = await (ask := self._host.ask(call))
            self._keep(coming, given.sizes, ask.received)
        except OSError:
            pass  # who reads the files hears of it
        finally:
            self._calls -= 1
            pace.asking = False
            for node in nodes:
                if self._coming.get(node) is coming:
                    del self._coming[node]
            coming.end()

    def _keep(self, coming: _Coming, sizes: list[int], payload: bytes) -> None:
        if len(sizes) != len(coming.nodes) or sum(_length(size) for size in sizes) != len(payload):
            raise OSError(errno.EIO, "not contents")
        end = 0
        for node, size in zip(coming.nodes, sizes, strict=True):
            start, end = end, end + _length(size)
            if size >= 0 and self._coming.get(node) is coming:
                self._here[node] = payload[start:end], coming.run.pace
                self._held += size
                coming.run.pace.left += 1
        self._make_room()

    def _make_room(self) -> None:
        while self._held > MAX_HELD:
            self._take(next(iter(self._here)))

    def interrupt(self, unique: int) -> None:
        """The caller of request ``unique`` has had a signal."""
        for coming in self._coming.values():
            coming.leave(unique)

    # --- what is dropped -------------------------------------------------------------------------------

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        self.drop(*changed.nodes)

    def drop(self, *nodes: int) -> None:
        """These files have changed."""
        for node in nodes:
            self._coming.pop(node, None)
            if node in self._here:
                self._take(node)

    def void(self) -> None:
        """Nothing is promised any more, nor what is still to come."""
        self._coming.clear()
        self._clear()

    def _clear(self) -> None:
        self._here.clear()
        self._runs.clear()
        self._held = 0

    def _take(self, node: int) -> None:
        data, pace = self._here.pop(node)
        self._held -= len(data)
        pace.left -= 1


def _length(size: int) -> int:
    """Of what a file has in the payload; of one that is not given, that is ``~size``."""
    return size if size >= 0 else ~size
