"""Runs this side's handlers for what the peer asks.

The law: every request gets exactly one answer and every offered stream one too, whatever the handler
does: return, raise, be cancelled, or forget. Handlers run in one nursery, which ends before the link.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from protocol import messages
from protocol.errors import (
    DecodeError,
    ErrorCode,
    LinkError,
    OpenRefused,
    RemoteProtocolError,
    RpcError,
    StreamReset,
)
from protocol.muxstream import Driver, Incoming, MuxStream
from protocol.service import BoundRequest, Service
from protocol.session import Lapsed, Session

log = logging.getLogger(__name__)

# Notices received and not yet handled. When there are more, nothing is read until the handler catches up.
MAX_NOTICES: Final = 64


@dataclass(slots=True)
class _Job:
    """A request that is being handled; ``code`` is why ``scope`` would be cancelled."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    code: ErrorCode = ErrorCode.CANCELLED


class Serving:
    """The handlers of one link at work. All but the service are the link's."""

    def __init__(
        self,
        service: Service,
        driver: Driver,
        wait_for_room: Callable[[], Awaitable[Session]],
    ) -> None:
        self._service = service
        self._driver = driver
        self._session, self._flush = driver.session, driver.flush
        self._wait_for_room = wait_for_room
        self._jobs: dict[int, _Job] = {}
        self._offers: dict[int, Incoming] = {}
        self._notices: deque[Callable[[], Awaitable[None]]] = deque()
        self._come, self._taken = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._stopped = trio.Event()

    @property
    def idle(self) -> bool:
        """Whether no request and no stream has a handler running."""
        return not self._jobs and not self._offers

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until ``stop``."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await self._handle_notices()
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Cancel all handlers, and wait until they are gone."""
        self._nursery.cancel_scope.cancel()
        self._taken.unpark_all()
        await self._stopped.wait()

    def on_broken(self, error: LinkError) -> None:
        """The link is over: offers cannot be answered any more."""
        for offer in self._offers.values():
            offer.on_broken(error)

    # --- notices -----------------------------------------------------------------------------------

    def on_notify(self, event: messages.Notify) -> None:
        """Hand a notice to its handler. Raises ``RemoteProtocolError`` if it has the wrong shape."""
        try:
            if self._service.take_notice(event.topic, event.args):
                return
            call = self._service.bind_notice(event.topic, event.args)
        except DecodeError as error:
            raise RemoteProtocolError(str(error)) from error
        if call is not None:
            self._notices.append(call)
            self._come.unpark_all()

    @property
    def notices_done(self) -> bool:
        """Whether ``wait_for_notices`` would not wait."""
        return len(self._notices) <= MAX_NOTICES

    async def wait_for_notices(self) -> None:
        """Return when no more than ``MAX_NOTICES`` wait, or the link is over."""
        while len(self._notices) > MAX_NOTICES and not self._session.over:
            await self._taken.park()

    async def _handle_notices(self) -> None:
        while True:
            while not self._notices:
                await self._come.park()
            call = self._notices.popleft()
            self._taken.unpark_all()
            try:
                await call()
            except Exception:
                log.exception("link.notice-failed")

    # --- requests ----------------------------------------------------------------------------------

    def on_request(self, event: messages.Request) -> None:
        try:
            bound = self._service.bind_request(event.method, event.args)
        except RpcError as error:
            self._fail(event.id, error)
            return
        job = self._jobs[event.id] = _Job()
        self._nursery.start_soon(self._serve, event.id, bound, job)

    def on_cancel(self, event: messages.Cancel) -> None:
        """The peer gave up."""
        self._cancel(event.id, ErrorCode.CANCELLED)

    def on_lapsed(self, event: Lapsed) -> None:
        """The peer's deadline has passed."""
        self._cancel(event.id, ErrorCode.TIMEOUT)

    def _cancel(self, number: int, code: ErrorCode) -> None:
        if (job := self._jobs.get(number)) is not None:
            job.code = code
            job.scope.cancel()

    async def _serve(self, number: int, bound: BoundRequest, job: _Job) -> None:
        error = await self._attempt(number, bound, job)
        del self._jobs[number]
        if error is not None:
            self._fail(number, error)

    async def _attempt(self, number: int, bound: BoundRequest, job: _Job) -> RpcError | None:
        """Run a handler and send its reply; or return why there is none."""
        method = bound.message.METHOD
        try:
            with job.scope:
                value = await bound.run()
                session = await self._wait_for_room()
                session.reply(number, value)
                self._flush()
                return None
            return RpcError(job.code, f"{method} was stopped before it was done")
        except RpcError as error:
            return error
        except LinkError as error:  # of another link that the handler uses, or of this one
            return RpcError(error.code, str(error))
        except Exception as error:
            log.exception("link.request-failed method=%s", method)
            return RpcError(ErrorCode.INTERNAL, f"{method} failed: {type(error).__name__}: {error}")

    def _fail(self, number: int, error: RpcError) -> None:
        if not self._session.over:
            self._session.fail(number, error.code, error.message, error.hint)
            self._flush()

    # --- streams -----------------------------------------------------------------------------------

    def on_open(self, event: messages.Open, streams: dict[int, MuxStream]) -> None:
        """Start the handler of an offered stream; the one that it may accept is in ``streams`` before it runs."""
        try:
            handler, at_once = self._service.bind_stream(event.kind, event.args)
        except OpenRefused as error:
            stream = streams[event.stream] = MuxStream(self._driver, event.stream)
            stream.abandon()
            if self._session.knows(event.stream):
                self._session.refuse(event.stream, error.code, error.message, error.hint)
            return
        incoming = Incoming(self._driver, event.stream)
        streams[event.stream] = incoming.stream
        if not self._session.knows(event.stream):
            return  # cut again in the same breath; nobody answers any more
        if at_once is not None and at_once(incoming):
            return
        incoming.scope = trio.CancelScope()
        self._offers[event.stream] = incoming
        self._nursery.start_soon(self._serve_stream, event.kind, handler, incoming, incoming.scope)

    def on_reset(self, number: int, error: StreamReset) -> None:
        """The peer has cut a stream; if it was only offered, its handler is stopped."""
        if (offer := self._offers.get(number)) is not None:
            offer.on_broken(error)

    async def _serve_stream(
        self,
        kind: str,
        handler: Callable[[Incoming], Awaitable[None]],
        incoming: Incoming,
        scope: trio.CancelScope,
    ) -> None:
        try:
            with scope:
                await handler(incoming)
            incoming.finish(ErrorCode.CANCELLED, f"the handler of {kind} is done with it")
        except OpenRefused as error:
            incoming.finish(error.code, error.message, error.hint)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("link.stream-broken kind=%s error=%s", kind, error)
            incoming.finish(ErrorCode.RESET, str(error))
        except Exception as error:
            log.exception("link.stream-failed kind=%s", kind)
            incoming.finish(ErrorCode.INTERNAL, f"{kind} failed: {type(error).__name__}: {error}")
        finally:
            del self._offers[incoming.number]
