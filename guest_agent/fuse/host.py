"""Asks the host, across sessions that come and go.

The laws:
- What is asked is asked again in the next session, as it was (``unique`` and all) and in its order, until
  it is answered: the host does nothing twice for one ``unique``.
- While the host is away, callers wait, for ``PATIENCE`` in all; then all that wait get EIO, and so does at
  once whoever asks until it is back. ``lasting`` calls (a forgotten node, a released lock) are kept for it
  even then, though nobody waits.
- Never more than ``MAX_CALLS`` calls and about ``MAX_FLYING`` bytes are on their way; the rest queues here.
- A signal (INTERRUPT) changes nothing while there is a session: answers take milliseconds, and a read that
  fails for a signal that kills nobody breaks programs. Without one, it ends with EINTR what was never sent
  or changes nothing; what may have been done already goes on waiting for its outcome.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Generator
from itertools import chain
from typing import Any, Final, Generic, Protocol, TypeVar

import trio

from guest_agent.fuse.operation import Resume, Wait
from protocol import codec
from protocol.errors import LinkError
from protocol.files import FileCall
from protocol.link import OnResult
from protocol.messages import Result
from protocol.session import MAX_CALLS

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

PATIENCE: Final = 30.0
"""Seconds that callers wait for an absent host: longer than any restart of its side (a keeper's backing off
included), shorter than the 120 s at which the kernel's watchdog takes a waiting process for hung."""

MAX_FLYING: Final = 64 << 20
"""Bytes of payloads sent and not answered: a quarter of what the link may hold back, and a second of what
virtio-serial moves."""


class Caller(Protocol):
    """Of ``protocol.link.Link``, what is needed here."""

    def call(self, call: FileCall[Any], payload: bytes, on_result: OnResult) -> None: ...


class Ask(Generic[ResultT]):
    """A call, from being asked to being answered: a ``Wait``. Awaited it is the result; raises ``OSError``."""

    __slots__ = ("_host", "_resume", "call", "interrupted", "lasting", "payload", "received", "sent")

    def __init__(self, host: Host, call: FileCall[ResultT], payload: bytes, lasting: bool) -> None:
        self.call: Any = call  # every call has ``share`` and ``unique``, and mypy has no word for it
        self.payload = payload
        self.lasting = lasting
        self.sent = False
        """In any session: it may have been done."""
        self.interrupted = False
        self.received = b""
        """The result's payload."""
        self._host = host
        self._resume: Resume | None = None

    def __await__(self) -> Generator[Wait, Any, ResultT]:
        outcome = yield self
        if outcome.__class__ is int:
            raise OSError(outcome, "")
        if outcome.errno:
            raise OSError(outcome.errno, "")
        self.received = outcome.payload
        result: ResultT = codec.decode(self.call.RESULT, outcome.value)
        return result

    def begin(self, resume: Resume) -> None:
        self._resume = resume
        self._host.enter(self)

    def on_result(self, result: Result | LinkError) -> None:
        if result.__class__ is Result:
            self._host.answered(self)
            self.finish(result)
        # Else the session is over, and the host asks again.

    def finish(self, outcome: Result | LinkError | int) -> None:
        """Tell who waits, if anybody still does. An int is an errno of our own."""
        if (resume := self._resume) is not None:
            self._resume = None
            resume(outcome)

    @property
    def interruptible(self) -> bool:
        return self.interrupted and not (self.sent and self.call.CHANGES)


class Host:
    """The host of all shares, whether it is there or not."""

    def __init__(self) -> None:
        self._link: Caller | None = None
        self._patient = True
        self._sent: dict[Ask[Any], None] = {}  # an ordered set
        self._queue: deque[Ask[Any]] = deque()
        self._flying = 0
        self._came, self._left = trio.Event(), trio.Event()

    # --- asking --------------------------------------------------------------------------------------

    def ask(self, call: FileCall[ResultT], payload: bytes = b"", *, lasting: bool = False) -> Ask[ResultT]:
        """To be awaited by an operation. ``payload`` must not change."""
        return Ask(self, call, payload, lasting)

    def tell(self, call: FileCall[Any], *, lasting: bool = True) -> None:
        """Ask with nobody waiting for the answer; it reaches the host however long that takes. Without
        ``lasting`` a host that is away for long never hears of it, and nothing piles up for it."""
        self.enter(Ask(self, call, b"", lasting))

    def enter(self, ask: Ask[Any]) -> None:
        """(For ``Ask``.) Send it as soon as there is a session, room, and nothing before it."""
        if self._link is not None and not self._queue and self._has_room():
            self._send(ask)
        elif self._patient or ask.lasting:
            self._queue.append(ask)
            if not self._patient:
                ask.finish(errno.EIO)
        else:
            ask.finish(errno.EIO)

    def answered(self, ask: Ask[Any]) -> None:
        """(For ``Ask``.)"""
        del self._sent[ask]
        self._flying -= len(ask.payload)
        if self._queue:
            self._pump()

    def interrupt(self, share: int, unique: int) -> None:
        """Whoever waits for the calls of request ``unique`` has had a signal."""
        for ask in chain(self._sent, self._queue):
            if ask.call.share == share and ask.call.unique | 1 == unique | 1:
                ask.interrupted = True
        if self._link is None:
            self._end_interrupted()

    # --- sessions ------------------------------------------------------------------------------------

    def attach(self, link: Caller) -> None:
        """The host is there, over ``link``, and serves; nothing if it was already."""
        if self._link is link:
            return
        if self._link is not None:
            self._lose()
        self._link = link
        self._patient = True
        self._left = trio.Event()
        self._came.set()
        self._pump()

    def detach(self, link: Caller) -> None:
        """The session over ``link`` has ended."""
        if self._link is link:
            self._lose()

    async def keep_patience(self) -> None:
        """Fail what waits when the host has been away for too long; until cancelled."""
        while True:
            with trio.move_on_after(PATIENCE) as waiting:
                await self._came.wait()
            if waiting.cancelled_caught:
                log.warning("host.absent seconds=%g waiting=%d", PATIENCE, len(self._queue))
                self.give_up()
                await self._came.wait()
            await self._left.wait()

    def give_up(self) -> None:
        """Fail everything that waits, and from now on everything at once, until the host is back."""
        if self._link is not None:
            return
        self._patient = False
        waiting, self._queue = self._queue, deque(ask for ask in self._queue if ask.lasting)
        for ask in waiting:
            ask.finish(errno.EIO)

    def _lose(self) -> None:
        self._link = None
        self._queue.extendleft(reversed(self._sent))
        self._sent.clear()
        self._flying = 0
        self._came = trio.Event()
        self._left.set()
        self._end_interrupted()

    def _end_interrupted(self) -> None:
        ended = [ask for ask in self._queue if ask.interruptible]
        for ask in ended:
            if not ask.lasting:
                self._queue.remove(ask)
            ask.finish(errno.EINTR)

    # --- sending -------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        return len(self._sent) < MAX_CALLS and self._flying < MAX_FLYING

    def _pump(self) -> None:
        while self._queue and self._link is not None and self._has_room():
            self._send(self._queue.popleft())

    def _send(self, ask: Ask[Any]) -> None:
        assert self._link is not None
        self._sent[ask] = None
        self._flying += len(ask.payload)
        try:
            self._link.call(ask.call, ask.payload, ask.on_result)
        except LinkError:
            self._lose()
        except Exception:
            # Not one that a frame can say: a bug, and its caller's loss alone.
            log.exception("host.call call=%.200r", ask.call)
            self.answered(ask)
            ask.finish(errno.EIO)
        else:
            ask.sent = True
