"""The bulk plane: payloads in memory that both sides have mapped, instead of in frames. Sans-IO.

The memory of a plane has two halves of fixed slots. Each half belongs to one side, the only one that writes to it;
a frame refers to a *run* of neighbouring slots there (``[first slot, length in bytes]``). The laws:

- A slot is free, *mine* (its owner fills it, or keeps what is in it), or *theirs* (the peer reads it); it may be
  both of the last two, and is not used again while it is one of them. Free slots are the flow control.
- The peer gives back what it was lent in FREE frames, and what came with a call by answering it. Who gives back
  what it does not have, or refers to what is no run of its half or is lent already, has broken the protocol.
- A new session begins with all that an old one lent come home, but for what the borrower says is *busy*: a thread may
  still be writing it to a disk. So a slot is never filled again while somebody reads it, whichever side died.
- Where there is no such memory, or no free run, payloads go inline: the same messages, the same order.

Belongs to one thread; only the bytes of a run or loan may be touched from others. Masks have bit n for slot n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from protocol.errors import LocalProtocolError, RemoteProtocolError

SLOT: Final = 128 * 1024
"""Bytes of a slot: what the kernel reads ahead by default."""

MARK_SIZE: Final = 16
"""Bytes by which both sides see that they have the same memory."""

MAX_RUN: Final = 1 << 20
"""Bytes of the longest run: the largest read or write that FUSE asks for."""

INLINE_BELOW: Final = 2048
"""Bytes below which a payload is cheaper inside its frame: giving a slot back is a message, too."""

FREE_AT: Final = 10
"""One part in so many of what is not being read waits, to be given back with the next frame; more is a reason for one.
Less than half of what one account may have lent (see ``SHARE``), so that its slots come back before it has to wait."""

SHARE: Final = 4
"""One account may have lent one part in so many of what is free: some remain whoever does not give back
(Choudhury and Hahne's dynamic thresholds)."""


@dataclass(slots=True)
class Account:
    """Who lends, so that one slow reader does not get all slots: a stream, or all calls together."""

    lent: int = 0


@dataclass(slots=True)
class Run:
    """Neighbouring slots of our half that are ours to fill. ``view``: their bytes; ``length``: those that count.

    It ends with being sent as data or in a result, or with ``give_back``.
    """

    bulk: Bulk
    first: int
    slots: int
    view: memoryview
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True

    @property
    def content(self) -> memoryview:
        return self.view[: self.length]

    def trim(self) -> None:
        """Give back what is behind ``length``."""
        self.bulk.trim(self)

    def give_back(self) -> None:
        """It is not needed any more, and what was lent of it has come back."""
        self.bulk.give_back(self)


class Loan:
    """A run of the peer's half that we may read until ``release``, which may be called more than once.

    ``answered``: it came with a call, whose result gives it back.
    """

    __slots__ = ("_bulk", "_mask", "_session", "answered", "view")

    def __init__(self, bulk: Bulk, mask: int, session: int, view: memoryview, answered: bool) -> None:
        self._bulk: Bulk | None = bulk
        self._mask = mask
        self._session = session
        self.view = view
        self.answered = answered

    def __len__(self) -> int:
        return len(self.view)

    def release(self) -> None:
        """Nobody here reads it any more."""
        if (bulk := self._bulk) is not None:
            self._bulk = None
            self.view = memoryview(b"")
            bulk.released(self._mask, self._session, self.answered)


class Bulk:
    """One plane's memory as one side uses it, over all its sessions. Without ``attach`` it has none."""

    def __init__(self) -> None:
        self.active = False
        """Whether both sides have agreed to use it, in this session."""
        self.on_room: Callable[[], None] | None = None
        """Called when slots have come back; it must neither wait nor raise."""
        self.on_wanted: Callable[[], object] | None = None
        """Called when somebody begins to wait for slots; as ``on_room``."""
        self.on_urgent: Callable[[], None] | None = None
        """Called when so much was released that it should be given back now; as ``on_room``."""
        self.accept: Callable[[list[int], bytes], bool] = lambda extents, mark: False
        """Of the host: find the memory that a guest offers (``messages.BulkOffer``), and ``attach`` it."""
        self._wanted = False  # somebody was told that there is no room
        self.returns = 0
        """How often slots have come back from the peer: as long as they do, it is worth waiting for more."""
        self.stuck = False
        """No slot has come back for long, though somebody wanted one."""
        self._own = self._peers = memoryview(b"")
        self._slots = self._peer_slots = 0
        # our half
        self._mine = self._theirs = 0
        self._busy = 0  # theirs since an earlier session
        self._accounts: list[Account | None] = []
        # the peer's half
        self._session = 0
        self._held = 0
        self._old: list[int] = []  # of each slot, how many loans of earlier sessions there are
        self._told = 0  # slots with such loans of which this session's peer knows
        self._frees = 0

    def attach(self, own: memoryview, peers: memoryview) -> None:
        """The memory: the half to write to and the half to read from. Not while any of it is in use."""
        if self.in_use:
            raise LocalProtocolError("memory in use cannot be exchanged")
        self._own, self._peers = own, peers
        self._slots, self._peer_slots = len(own) // SLOT, len(peers) // SLOT
        self._accounts = [None] * self._slots
        self._old = [0] * self._peer_slots

    @property
    def in_use(self) -> bool:
        """Whether anybody here has a run or a loan."""
        return bool(self._mine | self._held) or any(self._old)

    # --- sessions ----------------------------------------------------------------------------------

    def busy(self) -> bytes:
        """What is still read of the peer's half since earlier sessions: a bitmap for its ``begin``.

        To be asked once for each session, before it.
        """
        self._told = sum(1 << slot for slot, loans in enumerate(self._old) if loans)
        self._frees = 0
        return _to_bytes(self._told)

    def begin(self, busy: bytes) -> None:
        """A session may use the memory. ``busy`` is the peer's. Raises ``RemoteProtocolError``."""
        self._busy = _from_bytes(busy, self._slots)
        self._theirs = 0
        self.active, self.stuck = True, False

    def end(self) -> None:
        """The session is over; loans go on until they are released."""
        self.active = False
        self._session += 1
        for slot in _bits(self._held):
            self._old[slot] += 1
        self._held = self._told = self._frees = 0
        self._wanted = False
        for account in self._accounts:
            if account is not None:
                account.lent = 0
        self._accounts = [None] * self._slots

    # --- our half ----------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots that could be taken."""
        return self._slots - self._used.bit_count() if self.active else 0

    @property
    def _used(self) -> int:
        return self._mine | self._theirs | self._busy

    def take(self, size: int, account: Account | None = None, *, least: int = 0) -> Run | None:
        """A run for ``size`` bytes (at most ``MAX_RUN``), or, if that is not to be had, for fewer but at least
        ``least`` (0: all or nothing). None if there is none, or the account has lent its share."""
        if not self.active:
            return None
        wanted = -(-min(size, MAX_RUN) // SLOT)
        fewest = max(1, -(-least // SLOT)) if least else wanted
        if account is not None:
            # Who has lent nothing gets at least one, while there is one: many streams have too small a share each.
            wanted = min(wanted, max(self.free // SHARE - account.lent, not account.lent))
        free = ~self._used & ((1 << self._slots) - 1)
        while wanted >= fewest and wanted > 0:
            if starts := _runs(free, wanted):
                return self._taken(starts, wanted)
            wanted -= 1
        self._want()
        return None

    def _want(self) -> None:
        if not self._wanted:
            self._wanted = True
            if self.on_wanted is not None:
                self.on_wanted()

    def has_room(self, size: int) -> bool:
        """Whether ``take`` would give a run for ``size`` bytes. If not, ``on_room`` is called when it may again."""
        free = ~self._used & ((1 << self._slots) - 1)
        if _runs(free, max(1, -(-min(size, MAX_RUN) // SLOT))):
            return True
        self._want()
        return False

    def _taken(self, starts: int, slots: int) -> Run:
        # Single slots from the top, long runs from the bottom: of those the end is often not needed (``trim``), and is
        # where the next one begins.
        first = starts.bit_length() - 1 if slots == 1 else (starts & -starts).bit_length() - 1
        self._mine |= _mask(first, slots)
        return Run(self, first, slots, self._own[first * SLOT : (first + slots) * SLOT])

    def give_back(self, run: Run) -> None:
        """(Of ``Run``.)"""
        self._mine &= ~_mask(run.first, run.slots)
        run.slots = 0
        run.view = memoryview(b"")
        self._tell_room()

    def trim(self, run: Run) -> None:
        """(Of ``Run``.)"""
        slots = -(-run.length // SLOT)
        self._mine &= ~(_mask(run.first, run.slots) & ~_mask(run.first, slots))
        run.slots, run.view = slots, run.view[: slots * SLOT]
        self._tell_room()

    def lend(self, run: Run, account: Account | None = None) -> None:
        """``run`` was sent, as data or in a result: it is the peer's now, and what is behind its length is free."""
        slots = -(-run.length // SLOT)
        self._theirs |= _mask(run.first, slots)
        if account is not None:
            account.lent += slots
            self._accounts[run.first : run.first + slots] = [account] * slots
        surplus = run.slots > slots
        self._mine &= ~_mask(run.first, run.slots)
        run.slots, run.view = 0, memoryview(b"")
        if surplus:
            self._tell_room()

    def show(self, run: Run) -> None:
        """``run`` was sent with a call: until its result, the peer reads it and we keep it."""
        self._theirs |= _mask(run.first, -(-run.length // SLOT))

    def shown(self, run: Run) -> None:
        """The result of the call has come."""
        self._theirs &= ~_mask(run.first, -(-run.length // SLOT))

    def freed(self, bitmap: bytes) -> None:
        """The peer gave back. Raises ``RemoteProtocolError`` for what it did not have."""
        mask = _from_bytes(bitmap, self._slots)
        if not self.active or mask & ~(self._theirs | self._busy):
            raise RemoteProtocolError("slots were given back that had not been lent")
        # What is both was kept by us over the session's end, and is lent again with a call, whose result gives it back.
        self.returns += 1
        self.stuck = False
        old = mask & self._busy
        self._busy &= ~old
        self._theirs &= ~(mask & ~old)
        for slot in _bits(mask & ~old):
            if (account := self._accounts[slot]) is not None:
                account.lent -= 1
                self._accounts[slot] = None
        self._tell_room()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits to be told of room."""
        return self._wanted

    def _tell_room(self) -> None:
        if self._wanted and self.active and self.on_room is not None:
            self._wanted = False
            self.on_room()

    # --- the peer's half ---------------------------------------------------------------------------

    def receive(self, reference: list[int], *, answered: bool = False) -> Loan:
        """What the peer refers to. Raises ``RemoteProtocolError`` unless it can be."""
        first, length = reference if len(reference) == 2 else (0, 0)
        slots = -(-length // SLOT)
        if not self.active or not 0 < length <= MAX_RUN or not 0 <= first <= self._peer_slots - slots:
            raise RemoteProtocolError(f"a reference to {reference!r:.40}, which is no run of slots")
        mask = _mask(first, slots)
        if self._held & mask:
            raise RemoteProtocolError("a slot was lent that is lent already")
        self._held |= mask
        start = first * SLOT
        view = self._peers[start : start + length].toreadonly()
        return Loan(self, mask, self._session, view, answered)

    def released(self, mask: int, session: int, answered: bool) -> None:
        """(Of ``Loan``.)"""
        if session == self._session:
            self._held &= ~mask
            if not answered:
                self._frees |= mask
        else:
            for slot in _bits(mask):
                self._old[slot] -= 1
                if not self._old[slot] and self._told >> slot & 1:
                    self._told &= ~(1 << slot)
                    self._frees |= 1 << slot
        if self.urgent and self.on_urgent is not None:
            self.on_urgent()

    @property
    def urgent(self) -> bool:
        """Whether so much was released that a frame of its own is due."""
        if not self._frees or not self.active:
            return False
        return self._frees.bit_count() * FREE_AT >= self._peer_slots - (self._held | self._told).bit_count()

    def take_frees(self) -> bytes:
        """What to give back now, as a bitmap; b"" for nothing."""
        if not self.active or not self._frees:
            return b""
        frees, self._frees = self._frees, 0
        return _to_bytes(frees)


def _mask(first: int, slots: int) -> int:
    return ((1 << slots) - 1) << first


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


def _runs(free: int, length: int) -> int:
    """A mask of where runs of ``length`` free slots begin."""
    done = 1
    while done < length and free:
        step = min(done, length - done)
        free &= free >> step
        done += step
    return free


def _to_bytes(mask: int) -> bytes:
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _from_bytes(bitmap: bytes, slots: int) -> int:
    if len(bitmap) * 8 > slots + 7:
        raise RemoteProtocolError(f"a bitmap of {len(bitmap)} bytes for {slots} slots")
    mask = int.from_bytes(bitmap, "little")
    if mask >> slots:
        raise RemoteProtocolError("a bitmap of slots that do not exist")
    return mask
