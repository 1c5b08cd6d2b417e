"""The other way round: sockets of the guest that lead to what listens on the host, such as an SSH agent or a database.

The guest listens (``guest_agent.entrances``) and opens a stream for each connection. The law: where that leads is
decided here and by nothing the guest says. It names a socket of its own; one that is not on our list at this moment
is refused, whatever it is called. Nothing waits for the guest to open them, which may take as long as a folder does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from host_agent.socket_rules import tcp_address
from protocol.api import DialHost, ForwardState, OpenHostEntrances, SocketForward, SocketRow
from protocol.errors import AgentctlProtocolError, ErrorCode, RpcError
from protocol.link import Link, Service
from protocol.messages import clip
from protocol.muxstream import Incoming
from protocol.pump import pump

logger = logging.getLogger(__name__)

#: Connections of all of them together, an eighth of the link's streams. The guest's agent keeps to it, too.
MAX_CONNECTIONS = 256

#: For a connection on this machine, seconds.
CONNECT_TIME = 10.0

#: How often the guest is told again, seconds: it then opens what has lost its name, or found it taken before.
AGAIN = 5.0

#: Characters of a name that the guest made up, in the log, and of a reason that it has.
MAX_SHOWN = 200

NOT_ALLOWED = "no rule of this machine leads there"
WAITING = "waiting for the guest agent"


class ReverseForwards:
    """All of them: told to each session's guest, and the only ones that it may ask for."""

    def __init__(self, forwards: Sequence[SocketForward] = ()) -> None:
        self._wanted = {forward.guest: forward for forward in forwards}
        self._link: Link | None = None
        self._reasons: dict[str, str] | None = None
        self._complaint = ""
        # There is something to tell; and it has been told, or there was nobody.
        self._changed, self._told = trio.Event(), trio.Event()
        self._slots = trio.CapacityLimiter(MAX_CONNECTIONS)

    def register(self, service: Service) -> None:
        """Answer the guest's ``DialHost`` streams."""
        service.on_stream(DialHost, self._dial)

    async def run(self) -> None:
        """Tell the guest what to listen on, which may be less than it does, until cancelled."""
        try:
            while True:
                with trio.move_on_after(AGAIN if self._wanted else math.inf):
                    await self._changed.wait()
                self._changed = trio.Event()
                with self._telling():
                    if self._link is not None:
                        await self._tell(self._link)
        finally:
            with self._telling():
                pass  # nor will anybody be told what was to come

    @contextmanager
    def _telling(self) -> Iterator[None]:
        told, self._told = self._told, trio.Event()
        try:
            yield
        finally:
            told.set()

    def link_up(self, link: Link) -> trio.Event:
        """There is a new session. Returns what is set when ``run`` has told its guest."""
        self._link, self._reasons = link, None
        self._changed.set()
        return self._told

    def link_lost(self) -> None:
        """The session is over. What the guest listens on stays, and its clients wait there."""
        self._link = self._reasons = None

    def replace(self, forwards: Sequence[SocketForward]) -> trio.Event:
        """Have these instead, from now on. Established connections end by themselves.

        Returns what is set when ``run`` has told the guest, or if there is no session.
        """
        self._wanted, self._reasons = {forward.guest: forward for forward in forwards}, None
        self._changed.set()
        return self._told

    async def _tell(self, link: Link) -> None:
        wanted, complaint = self._wanted, ""
        try:
            answer = await link.request(OpenHostEntrances(list(wanted)))
            reasons = {path: reason[:MAX_SHOWN] for path, reason in answer.reasons.items() if path in wanted}
        except RpcError as error:
            complaint = clip(error.message)
            reasons = dict.fromkeys(wanted, error.message[:MAX_SHOWN])
        except AgentctlProtocolError as error:  # the next session is told as it begins
            logger.info("the guest was not told of reverse forwards: %s", error)
            return
        if complaint not in ("", self._complaint):
            logger.warning("the guest does not open reverse forwards: %s", complaint)
        self._complaint = complaint
        if wanted is self._wanted and link is self._link:
            self._reasons = reasons

    def row(self, forward: SocketForward) -> SocketRow:
        """How one of them is doing."""
        if self._reasons is None:
            return SocketRow(forward, ForwardState.PENDING, WAITING)
        reason = self._reasons.get(forward.guest, "")
        return SocketRow(forward, ForwardState.CONFLICT if reason else ForwardState.LISTENING, reason)

    async def _dial(self, target: DialHost, incoming: Incoming) -> None:
        if (forward := self._wanted.get(target.entrance)) is None:
            logger.warning("the guest asked for %r, to which no rule leads", target.entrance[:MAX_SHOWN])
            await incoming.refuse(ErrorCode.DENIED, NOT_ALLOWED)
            return
        try:
            self._slots.acquire_on_behalf_of_nowait(incoming)
        except trio.WouldBlock:
            await incoming.refuse(ErrorCode.LIMIT, f"there are {MAX_CONNECTIONS} connections already")
            return
        try:
            await _carry(forward.host, incoming)
        finally:
            self._slots.release_on_behalf_of(incoming)


async def _carry(host: str, incoming: Incoming) -> None:
    try:
        with trio.fail_after(CONNECT_TIME):
            connection = await _connect(host)
    except (OSError, trio.TooSlowError) as error:
        logger.info("the guest was not connected to %s: %s", host, str(error) or "it does not answer")
        await incoming.refuse(ErrorCode.REFUSED, f"{host} of the host does not answer")
        return
    async with connection:
        await pump(await incoming.accept(), connection)


async def _connect(host: str) -> trio.SocketStream:
    if (address := tcp_address(host)) is not None:
        return await trio.open_tcp_stream(*address)
    return await trio.open_unix_socket(host)
