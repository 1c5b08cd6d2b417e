"""Calls to the guest, from the thread that serves the kernel: over a link that lives in another one.

The laws:
- Every wait has an end. A link that is not there is waited for ``PATIENCE``, an answer ``ANSWER_TIME``; and who has
  waited in vain is believed: until the guest is heard from again, what comes next fails at once. An operation of many
  questions has ``OPERATION_TIME`` for all of them, since a guest may take its time with each.
- The errno says which it was: EHOSTDOWN without a link, ETIMEDOUT without an answer, EIO for an answer that is none.
- What was sent and not answered may have been done. If it changes anything it is never sent again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import trio

from host_agent.client import hello
from host_agent.guest_link import GuestLink
from host_agent.view.tree import MAX_PLACES, Tree
from protocol import codec, messages
from protocol.errors import DecodeError, LinkError, LocalProtocolError
from protocol.files import MAX_FILES_PAYLOAD, FileCall, MountReport, MountReports, MountShares, MountStage
from protocol.link import Link, Service

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

PATIENCE: Final = 5.0
"""Seconds: a guest's process that was killed is there again in less than 1, in emulation in some."""

ANSWER_TIME: Final = 15.0
"""Seconds. A sync of an emulated disk takes some; a shell that is told after a minute has been given up on before."""

OPERATION_TIME: Final = 2
"""Times ``ANSWER_TIME``. The kernel lets nobody be killed who waits for an operation that has begun."""

MAX_BACKLOG: Final = 64 << 20
"""Bytes that wait to be written: one thread asks, for 1 MiB at a time."""

_ERRNOS: Final = frozenset(errno.errorcode)

_ELSE: Final = {
    errno.ENODEV: errno.ESTALE,  # a place that has just gone
    errno.ENOSYS: errno.EOPNOTSUPP,  # this kernel would never ask for such a thing again, and say that it was done
    errno.EINTR: errno.EIO,  # programs try again for ever, here and below
    errno.EAGAIN: errno.EIO,
    errno.ENOTCONN: errno.EIO,  # what a view says that was killed
}
"""What errnos of the guest's are shown as, if they would mean something else here."""


class Waiting(Generic[ResultT]):
    """What will be answered to ``call``."""

    def __init__(self, call: FileCall[ResultT], on_silence: Callable[[], None], patience: float) -> None:
        self._call = call
        self._on_silence = on_silence
        self._patience = patience
        self._done = threading.Event()
        self._errno = 0
        self._value: Any = None
        self._payload = b""

    def wait(self) -> tuple[ResultT, bytes]:
        """Raises ``OSError``."""
        if not self._done.wait(self._patience):
            self._on_silence()
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if self._errno:
            raise OSError(self._errno, os.strerror(self._errno))
        try:
            result: ResultT = codec.decode(self._call.RESULT, self._value)
        except DecodeError as error:
            logger.warning("an answer that is not as it should be: %s", error)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        return result, self._payload

    def fail(self, number: int) -> None:
        self._errno = number
        self._done.set()

    def on_result(self, result: messages.Result | LinkError) -> None:
        """Where frames are read."""
        if isinstance(result, LinkError):
            self.fail(errno.EHOSTDOWN)
            return
        if result.errno:
            self._errno = _understood(result.errno)
        else:
            self._value, self._payload = result.value, bytes(result.payload)
        if result.loan is not None:
            result.loan.release()
        self._done.set()


def _understood(number: int) -> int:
    return _ELSE.get(number, number) if number in _ERRNOS else errno.EIO


class Guest:
    """The link, its sessions one after the other, and what the guest shows. Made and run in trio's thread; ``begin``,
    ``begin_operation``, ``epoch`` and ``tree`` are for the other one."""

    def __init__(
        self,
        socket: Path,
        on_news: Callable[[], None] = lambda: None,
        *,
        patience: float = PATIENCE,
        answer_time: float = ANSWER_TIME,
        packed: bool = False,
    ) -> None:
        """``on_news`` is called for another tree, or a session more or less. ``packed`` as for ``GuestLink``."""
        self._on_news = on_news
        self._patience, self._answer_time = patience, answer_time
        self._token = trio.lowlevel.current_trio_token()
        self._closed = False
        self._arranged = trio.Event()
        self._up = False
        self._session: Link | None = None
        self._lost_at = time.monotonic()
        self._silent_at = 0.0
        self._end_at = float("inf")
        self._waiting: dict[Waiting[Any], Callable[[Link], None]] = {}
        self._under_way: set[Waiting[Any]] = set()
        self.tree = Tree()
        self.epoch = ""
        service = Service()
        service.on_request(MountShares, self._arrange)
        self._link = GuestLink(
            socket,
            hello("agentctl-view"),
            service,
            on_up=self._on_up,
            on_down=self._on_down,
            name="view",
            max_payload=MAX_FILES_PAYLOAD,
            max_backlog=MAX_BACKLOG,
            packed=packed,
        )

    @property
    def connected(self) -> bool:
        """Whether there is a session, and what the guest shows is known."""
        return self._up

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_up)
                await self._link.run()
        finally:
            self._closed = True
            for waiting in (*self._waiting, *self._under_way):
                waiting.fail(errno.EHOSTDOWN)

    async def wait_arranged(self, timeout: float) -> bool:
        """Whether the guest has told what it shows within ``timeout`` seconds."""
        with trio.move_on_after(timeout):
            await self._arranged.wait()
        return self._arranged.is_set()

    # --- trio's thread -------------------------------------------------------------------------------

    async def _on_up(self, link: Link) -> None:
        await trio.lowlevel.checkpoint()

    async def _arrange(self, request: MountShares) -> MountReports:
        # A guest that speaks at once is heard before its session may be used, and says it once.
        link = await self._link.wait()
        # In this order: with another process's places by its predecessor's numbers, a name could be another volume's.
        self.tree = Tree(request.shares)
        if not self._up:
            self.epoch = link.peer.boot_id
            self._session = link
            self._up = True
            self._silent_at = 0.0
            waiting, self._waiting = self._waiting, {}
            for send in waiting.values():
                send(link)
        self._arranged.set()
        self._on_news()
        shown = {place.number for place in self.tree.places}
        return MountReports(
            [
                MountReport(share.id, MountStage.MOUNTED)
                if share.id in shown
                else MountReport(share.id, MountStage.FAILED, "its path cannot be shown")
                for share in request.shares[:MAX_PLACES]
            ]
        )

    def _on_down(self) -> None:
        self._up, self._session = False, None
        self._lost_at = time.monotonic()
        self._on_news()

    def _send(self, waiting: Waiting[Any], call: FileCall[Any], payload: bytes) -> None:
        if self._closed:
            waiting.fail(errno.EHOSTDOWN)
        elif self._up and self._session is not None:
            self._send_over(waiting, call, payload, self._session)
        elif time.monotonic() - self._lost_at < self._patience:
            self._waiting[waiting] = partial(self._send_over, waiting, call, payload)
        else:
            waiting.fail(errno.EHOSTDOWN)

    def _send_over(self, waiting: Waiting[Any], call: FileCall[Any], payload: bytes, link: Link) -> None:
        def on_result(result: messages.Result | LinkError) -> None:
            self._under_way.discard(waiting)
            if not isinstance(result, LinkError):
                self._silent_at = 0.0
            if isinstance(result, LinkError) and not call.CHANGES and not self._closed:
                self._lost_at = time.monotonic() if self._up else self._lost_at
                self._waiting[waiting] = partial(self._send_over, waiting, call, payload)
            else:
                waiting.on_result(result)

        self._under_way.add(waiting)
        try:
            link.call(call, payload, on_result)
        except LinkError as error:
            on_result(error)
        except LocalProtocolError as error:  # a number of more than 64 bits, more data than a frame takes
            logger.warning("what cannot be asked: %s", error)
            self._under_way.discard(waiting)
            waiting.fail(errno.EINVAL)

    async def _give_up(self) -> None:
        """Fail those who have waited for a link for too long."""
        while True:
            await trio.sleep(self._patience / 10)
            if self._waiting and time.monotonic() - self._lost_at >= self._patience:
                waiting, self._waiting = self._waiting, {}
                for each in waiting:
                    each.fail(errno.EHOSTDOWN)

    # --- the thread that serves ----------------------------------------------------------------------

    def begin_operation(self) -> None:
        """What is asked from now on is one operation, until the next begins."""
        self._end_at = time.monotonic() + OPERATION_TIME * self._answer_time

    def begin(self, call: FileCall[ResultT], payload: bytes = b"") -> Waiting[ResultT]:
        """Never waits, never raises."""
        now = time.monotonic()
        left = self._end_at - now
        if left < self._answer_time:  # that it is slow says nothing of what is asked next
            waiting = Waiting(call, lambda: None, max(left, 0.0))
        else:
            waiting = Waiting(call, self._on_silence, self._answer_time)
        if left <= 0 or (self._silent_at and self._silent_at <= now < self._silent_at + self._answer_time):
            waiting.fail(errno.ETIMEDOUT)
            return waiting
        try:
            self._token.run_sync_soon(self._send, waiting, call, payload)
        except trio.RunFinishedError:
            waiting.fail(errno.EHOSTDOWN)
        return waiting

    def _on_silence(self) -> None:
        """It may answer yet, but nobody waits for it again until it does, or for a while."""
        self._silent_at = time.monotonic()
