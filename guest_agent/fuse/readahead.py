"""Large files, read ahead of the guest's kernel.

The kernel reads a large file 1 MiB at a time and asks for the next when a program comes to this one, so the host, the
link, this agent and the program take turns. Who reads on and on is therefore expected to: the next READs are sent to
the host before the kernel asks, and their answers stay where they are, mostly in memory that is shared with the host
(``protocol.bulk``), until it does.

The laws:
- What is here is as old as pages of the kernel's might be, and goes with them: with each drop of the file's data,
  own change and ``Changed``, with an answer about the file that promises nothing (from that the kernel may learn that
  its pages are old without a drop), and with the end of the session. What is on its way then is not given, either.
- Asked for is what follows two READs of the same size that followed each other, of ``LEAST`` bytes and more: one such
  READ, and twice as many with each one that is given from here, up to ``MOST``. Nobody who reads here and there pays.
- ``MAX_HELD`` bytes of all mounts together, which leaves most of the shared memory to others, and nothing ``IDLE``
  seconds after the last READ and the last that has come. Of a host that is far away, with which none is shared, both
  are more, in proportion; but over a way that takes ``SLOW`` seconds for a piece, fewer and fewer.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from guest_agent.fuse.arrival import Arrival
from guest_agent.fuse.host import Ask
from guest_agent.fuse.operation import Idle, Timers, spawn
from protocol.api import Done
from protocol.bulk import Loan
from protocol.files import Changed, Read

LEAST: Final = 128 << 10
"""Bytes of a READ that is worth it."""
MOST: Final = 4
"""READs ahead of one file."""
MAX_HELD: Final = 4 << 20
"""Bytes, here or on their way, of all mounts: a quarter of the memory that the host lends from."""
MOST_FAR: Final = 16
MAX_HELD_FAR: Final = 32 << 20
"""The same of a host that is far away: 160 MB/s at 100 ms, of two files that are read at once."""
MAX_STREAMS: Final = 64
"""Files of which is known how they are read."""
IDLE: Final = 1.0
"""Seconds."""

SLOW: Final = 2.0
"""Seconds from asking for a piece to its coming. What is asked for then only waits in front of all else on the way: a
link whose heartbeat is late by 20 s is taken for dead, and 32 MiB at 1 MB/s are more."""

_SIZE: Final = slice(8, 16)
"""Of an ``ATTR``."""


class Asker(Protocol):
    """The host, of all mounts."""

    caller: int
    read_ahead: int
    """Bytes that are read ahead."""

    def ask(self, call: Read) -> Ask[Done]: ...

    def scaled(self, count: int, most: int) -> int: ...


class Known(Protocol):
    """Of ``directories.Directories``, what is needed here."""

    def attributes(self, node: int) -> bytes | None:
        """An ``ATTR``, if it is promised."""


class _Piece:
    """What was asked for ahead. It counts as held from being asked for until it is given, or let go when it comes."""

    __slots__ = ("arrival", "data", "is_here", "is_wanted", "offset", "size")

    def __init__(self, offset: int, size: int, host: Asker) -> None:
        self.offset, self.size = offset, size
        self.arrival = Arrival(host)
        self.data: bytes | Loan = b""
        self.is_here = False
        self.is_wanted = True

    @property
    def is_over(self) -> bool:
        """Nobody needs to wait for it."""
        return self.is_here or not self.is_wanted


class _Stream:
    """How a file is being read. ``next``: where the next READ is expected, of ``size`` bytes; ``follows``: the last one
    was. ``ahead``: how many are to be asked for."""

    __slots__ = ("ahead", "follows", "is_slow", "next", "pieces", "size")

    def __init__(self) -> None:
        self.next = self.size = self.ahead = 0
        self.follows = self.is_slow = False
        self.pieces: deque[_Piece] = deque()


class Readahead:
    """Of one mount."""

    def __init__(
        self,
        host: Asker,
        share: int,
        known: Known,
        timers: Timers,
        uniques: Iterator[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._host = host
        self._known = known
        self._share = share
        self._idle = Idle(timers, IDLE, self._let_idle_go, lambda: self._streams)
        self._uniques = uniques
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        """By node, the one that was read last at the end."""
        self._awaited: dict[int, tuple[int, _Piece]] = {}
        """By the unique of the request that waits, with the node."""
        self._coming = 0  # pieces on their way

    # --- what is read ----------------------------------------------------------------------------------

    async def read(self, unique: int, node: int, offset: int, size: int) -> bytes | Loan | None:
        """What request ``unique`` is to be answered with; None: the host must be asked."""
        stream = self._streams.get(node)
        if stream is None:
            stream = self._begin(node)
        else:
            self._streams.move_to_end(node)
        is_next = offset == stream.next and size == stream.size and size >= LEAST
        stream.next, stream.size, stream.follows = offset + size, size, is_next
        if not is_next and not self._is_rest(stream, offset, size):
            self._let_go(stream)
            return None
        self._idle.used()
        if not stream.pieces:
            return None
        piece = stream.pieces.popleft()
        if not stream.is_slow:
            stream.ahead = min(2 * stream.ahead, self._host.scaled(MOST, MOST_FAR))
        if piece.is_over:
            given = self._given(piece, size)
            self._go_on(node, stream)
            return given
        self._go_on(node, stream)
        self._awaited[unique] = node, piece
        await piece.arrival.until(unique)
        del self._awaited[unique]
        return self._given(piece, size)

    def asked(self, node: int) -> None:
        """The host has been asked for what ``read`` had not."""
        stream = self._streams.get(node)
        if stream is not None and not stream.pieces:
            self._go_on(node, stream)

    def _is_rest(self, stream: _Stream, offset: int, size: int) -> bool:
        """The last READ of a file is as long as the file."""
        return bool(stream.pieces) and stream.pieces[0].offset == offset and size < stream.pieces[0].size

    def _given(self, piece: _Piece, size: int) -> bytes | Loan | None:
        """None for what did not come, was dropped meanwhile, or is more than was asked for."""
        if not piece.is_wanted:
            return None
        if not piece.is_here or len(piece.data) > size:
            self._drop(piece)
            return None
        data, piece.data, piece.is_wanted = piece.data, b"", False
        self._release(piece)
        return data

    def _begin(self, node: int) -> _Stream:
        stream = self._streams[node] = _Stream()
        if len(self._streams) > MAX_STREAMS:
            _, oldest = self._streams.popitem(last=False)
            self._let_go(oldest)
        return stream

    # --- what is asked for -----------------------------------------------------------------------------

    def _go_on(self, node: int, stream: _Stream) -> None:
        if not stream.follows:
            return  # it was at its end
        stream.ahead = stream.ahead or 1
        offset = stream.pieces[-1].offset + stream.size if stream.pieces else stream.next
        attr = self._known.attributes(node)
        most, held = self._host.scaled(MOST, MOST_FAR), self._host.scaled(MAX_HELD, MAX_HELD_FAR)
        end = offset + most * stream.size if attr is None else int.from_bytes(attr[_SIZE], "little")
        while (
            offset < end and len(stream.pieces) < stream.ahead and self._host.read_ahead + stream.size <= held
        ):
            piece = _Piece(offset, stream.size, self._host)
            stream.pieces.append(piece)
            self._host.read_ahead += piece.size
            self._coming += 1
            spawn(self._bring(node, stream, piece))
            offset += stream.size
        self._idle.watch()

    async def _bring(self, node: int, stream: _Stream, piece: _Piece) -> None:
        began = self._clock()
        ask = self._host.ask(Read(self._share, next(self._uniques), node, piece.offset, piece.size))
        ask.may_lend = True
        try:
            await ask
            piece.data = ask.received if ask.lent is None else ask.lent
            piece.is_here = True
        except OSError:
            piece.is_wanted = False  # who reads it hears of that
        stream.is_slow = self._clock() - began > SLOW
        if stream.is_slow:
            stream.ahead = max(1, stream.ahead // 2)
        self._coming -= 1
        self._idle.used()
        if not piece.is_wanted:
            self._release(piece)
        piece.arrival.end()

    def _release(self, piece: _Piece) -> None:
        self._host.read_ahead -= piece.size
        if piece.data.__class__ is Loan:
            piece.data.release()

    # --- what is dropped -------------------------------------------------------------------------------

    def changed(self, changed: Changed) -> None:
        """The host says so."""
        self.drop(*changed.nodes)

    def drop(self, *nodes: int) -> None:
        """The data of these files may not be what it was."""
        if self._streams:
            for node in nodes:
                if (stream := self._streams.pop(node, None)) is not None:
                    self._let_go(stream)
        for node, piece in self._awaited.values():
            if node in nodes:
                self._drop(piece)

    def void(self) -> None:
        """Nothing is told any more, nor of what is still to come."""
        self.drop(*self._streams, *(node for node, _ in self._awaited.values()))

    def _let_idle_go(self) -> None:
        """Over a slow way a piece may take seconds to come: who reads it waits for it, and would ask for it again."""
        if self._coming:
            self._idle.watch()
        else:
            self.void()

    def interrupt(self, unique: int) -> None:
        """The caller of request ``unique`` has had a signal."""
        if unique in self._awaited:
            self._awaited[unique][1].arrival.leave(unique)

    def _let_go(self, stream: _Stream) -> None:
        stream.ahead = 0
        while stream.pieces:
            self._drop(stream.pieces.popleft())

    def _drop(self, piece: _Piece) -> None:
        """If it is on its way still, that is the end of it when it comes."""
        if piece.is_wanted:
            piece.is_wanted = False
            if piece.is_here:
                self._release(piece)
