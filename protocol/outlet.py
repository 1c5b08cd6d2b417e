"""What a link writes: taken from its session by a task, or at once, where that needs no waiting.

The law: bytes go out in the order in which the session gave them. What was taken from the session and is not written
goes before all else; at once is written only while the task rests and nothing waits, and only as much as a
transport takes whole or not at all. With a fence nothing goes out before what it marks has passed, ``MAX_HELD`` at the
most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import trio

from protocol.frames import Buffer
from protocol.session import Session

log = logging.getLogger(__name__)

BROKEN: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What a transport that has failed raises."""

PROMPT_SIZE: Final = 16 * 1024
"""Bytes that are written where they are queued, without waking the task. A turn of trio costs 30 us, and 500 in an
emulated guest, more than all else that a small call needs; a socket or port takes this much whole or not at all."""

MAX_HELD: Final = 1.0
"""Seconds for a fence to let something out: many times what a busy disk takes for what may be on its way, and little to
those who wait for a heartbeat (20 s). Who is not there by then may be away for long, and all would stand still."""

HELD_FIRST, HELD_MOST = 0.0005, 0.004
"""Seconds between two looks at a fence, twice as long each time: a round trip to the host takes 0.2 ms natively and 2
in an emulated guest, where a look is a turn of trio, and not to be had for nothing by what is waited for."""


class Told(Protocol):
    """Who learns of the outlet's progress: the link. None of it may wait or raise."""

    def taken(self, drained: list[int]) -> list[Drained]:
        """Something was taken from the session, all data of the streams ``drained`` with it: who is to be told so."""

    def written(self) -> None:
        """It was written."""


class Drained(Protocol):
    """Who waits for his data to be on its way."""

    def on_sendable(self) -> None: ...


class Fence(Protocol):
    """What the peer must see before it hears more. Asked before each write, so it should cost next to nothing."""

    def mark(self) -> int:
        """What there is of that now, as a number that only grows; 0 for nothing."""

    def passed(self, mark: int) -> bool:
        """Whether the peer sees all that was there at ``mark``; of 0 it always does."""


class Outlet:
    """Writes what ``session`` has to say to ``transport``."""

    def __init__(
        self, session: Session, transport: trio.abc.Stream, told: Told, fence: Fence | None = None
    ) -> None:
        self._session = session
        self._fence = fence
        self._in_vain = 0  # the mark that did not pass in time: nothing is held until it does
        self._transport = transport
        self._told = told
        self._send_now: Callable[[Buffer], bool] | None = getattr(transport, "send_nowait", None)
        self._wakeup, self._emptied = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._rests = False  # the task has nothing to do
        self._unsent: Buffer = b""
        self._writing = 0  # bytes of a write that was begun and has not ended
        self._drained: list[Drained] = []
        self.gone = False
        """Nothing is written any more."""

    @property
    def backlog(self) -> int:
        """Bytes that were taken from the session and are not written."""
        return len(self._unsent) + self._writing

    # --- the task ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write until cancelled. Raises what the transport raises."""
        while True:
            # Taken, then marked: what the session has to say later may speak of what comes later.
            self._unsent = self._unsent or self._take()
            if self._fence is not None and self._unsent:
                await self.held(self._fence)
            data, self._unsent = self._unsent, b""
            self._tell_drained()
            if data:
                self._writing = len(data)
                await self._transport.send_all(data)
                self._writing = 0
                self._told.written()
            else:
                self._emptied.unpark_all()
                self._rests = True
                try:
                    await self._wakeup.park()
                finally:
                    self._rests = False

    def wake(self) -> None:
        """The task has something to do."""
        self._rests = False
        self._wakeup.unpark_all()

    def leave(self) -> None:
        """Nothing is written any more; nobody need wait for it."""
        self.gone = True
        self._emptied.unpark_all()

    async def emptied(self) -> None:
        """Return when all is written, or nothing will be."""
        while (self._session.has_output or self._unsent or self._writing) and not self.gone:
            await self._emptied.park()

    async def held(self, fence: Fence) -> None:
        """Return when what the fence marks now has passed, or has had its time."""
        if not self._is_held(fence):
            return
        mark, since, pause = fence.mark(), trio.current_time(), HELD_FIRST
        while not fence.passed(mark):
            if trio.current_time() - since >= MAX_HELD:
                log.warning("outlet.held_in_vain seconds=%g mark=%d", MAX_HELD, mark)
                self._in_vain = mark
                return
            await trio.sleep(pause)
            pause = min(HELD_MOST, pause * 2)

    def _is_held(self, fence: Fence) -> bool:
        return fence.mark() != 0 and fence.passed(self._in_vain)

    def last_words(self) -> bytes:
        """What is left to be said, once the task has ended; b"" if it ended in the middle of a write."""
        return b"" if self._writing else b"".join([self._unsent, *self._session.data_to_send().buffers])

    def _take(self) -> bytes:
        """What the session has to say, as much as is written at a time; b"" for nothing."""
        buffers, drained = self._session.data_to_send()
        if told := self._told.taken(drained):
            self._drained += told
        return b"".join(buffers)

    def _tell_drained(self) -> None:
        """After what they had to say has gone: it may be the last that was before what they say next."""
        if self._drained:
            drained, self._drained = self._drained, []
            for stream in drained:
                stream.on_sendable()

    # --- at once -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """After anything was done to the session: have what it has to say written."""
        if self._session.has_output and not self._write_now():
            self.wake()

    def _write_now(self) -> bool:
        """Write what is queued if the task has nothing to do, it is little, and the transport takes it at once."""
        if self._send_now is None or not self._rests or self._session.backlog > PROMPT_SIZE:
            return False
        if self._fence is not None and self._is_held(self._fence):
            return False
        if not (data := self._unsent or self._take()):
            return True
        if not self._send(data):
            return False
        self._tell_drained()
        self._told.written()
        return True

    def express(self, number: int, data: bytes) -> bool:
        """Send data of a stream at once; False if something is to go before it, or there is no credit."""
        if self._send_now is None or not self._rests or self._unsent or len(data) > PROMPT_SIZE:
            return False
        if self._fence is not None and self._is_held(self._fence):
            return False
        if (frame := self._session.express(number, data)) is None:
            return False
        if not self._send(frame):
            self.wake()
        return True

    def _send(self, data: Buffer) -> bool:
        """Whether ``data`` was written; if not, it is the next to be."""
        assert self._send_now is not None
        self._unsent = data
        try:
            if len(data) > PROMPT_SIZE or not self._send_now(data):
                return False
        except BROKEN:
            return False  # the task will meet it as well, and says so
        self._unsent = b""
        return True
