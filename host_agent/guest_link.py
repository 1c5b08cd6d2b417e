"""The host's end of a link to the guest: one session after another over QEMU's socket, for ever; or over what else
leads to the same agent (``carry``), one at a time.

The law: the link is allowed to go away at any time (the guest agent was killed, the guest reboots) and
whoever needs it waits a stated time for its return instead of failing at once. What a session knew is
void when it ends; the next one begins by configuring the guest again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from host_agent.groups import collapsed
from protocol.api import Target, Transport
from protocol.bulk import Bulk
from protocol.errors import AgentctlProtocolError, LinkError
from protocol.frames import MAX_PAYLOAD
from protocol.lane import Lane
from protocol.link import Link, MuxStream, OnOpened, SendEarly, SerialChannel, Service
from protocol.messages import Hello
from protocol.muxstream import Traffic
from protocol.packedport import PackedPort
from protocol.serial import SocketPort
from protocol.session import MAX_BACKLOG, Role
from protocol.succession import Succession

logger = logging.getLogger(__name__)

#: How long a connection of a user waits for a guest agent that is just being started again, seconds.
#: A killed one is back in under 1 s with KVM and in 5-8 s under emulation.
PATIENCE = 20.0

#: Between two attempts, seconds. There is nothing to wait on: QEMU makes its socket when it gets there.
RECONNECT_DELAY = 0.1


class Observer(Protocol):
    """Who looks after what carries the link."""

    def began(self, transport: Transport) -> None:
        """A session may be used."""

    def ended(self, reason: str) -> None:
        """It may not any more; ``reason`` is a clause."""

    async def port_is_free(self) -> None:
        """Returns when a session may begin over QEMU's socket."""


class GuestLink:
    """Keeps a session with the guest agent whenever there is one to be had.

    ``on_up`` runs at the start of each session, before anybody else may use it; ``on_down`` at its end.
    """

    def __init__(
        self,
        socket: Path,
        hello: Hello,
        service: Service,
        *,
        on_up: Callable[[Link], Awaitable[None]],
        on_down: Callable[[], None],
        name: str = "control",
        max_payload: int = MAX_PAYLOAD,
        max_backlog: int = MAX_BACKLOG,
        pause_above: int | None = None,
        bulk: Bulk | None = None,
        lane: Lane | None = None,
        packed: bool = False,
    ) -> None:
        """``name`` is for logs; the limits, in bytes, ``bulk`` and ``lane`` are those of ``Link``. ``packed``: the way
        may be a long one, and what travels is packed if the other side knows of that."""
        self._name = name
        self._packed = packed
        self.traffic = Traffic()
        """What streams have carried, in all sessions."""
        self._open_link = partial(
            Link,
            max_payload=max_payload,
            max_backlog=max_backlog,
            pause_above=pause_above,
            bulk=bulk,
            lane=lane,
            traffic=self.traffic,
        )
        self._socket = socket
        self._hello = hello
        self._service = service
        self._on_up = on_up
        self._on_down = on_down
        self._link: Link | None = None
        self._over = Transport.NONE
        self._living = Succession()
        self._establishing = trio.CancelScope()
        self.observer: Observer | None = None
        self._changed = trio.Event()
        self.sessions = 0

    @property
    def current(self) -> Link | None:
        """The session of now, or None between two."""
        return self._link

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        while True:
            try:
                transport = await trio.open_unix_socket(str(self._socket))
            except OSError:
                await trio.sleep(RECONNECT_DELAY)
                continue
            async with transport:
                await self._sessions(SocketPort(transport, "QEMU closed the port"), Transport.VIRTIO_SERIAL)
            await trio.sleep(RECONNECT_DELAY)

    async def carry(self, transport: trio.SocketStream, over: Transport) -> None:
        """Sessions over something else that leads to the agent: until that ends, or virtio-serial has the link."""
        await self._sessions(SocketPort(transport, "the connection has ended"), over)

    async def _sessions(self, transport: SocketPort, over: Transport) -> None:
        """Sessions over one connection, until it ends."""
        channel = SerialChannel(PackedPort(transport) if self._packed else transport)
        is_port = over is Transport.VIRTIO_SERIAL
        while True:
            try:
                stream = await (self._establish_when_free(channel) if is_port else channel.establish())
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                logger.info("%s channel lost: %s", self._name, error)
                return
            if not is_port and self._over is Transport.VIRTIO_SERIAL:
                return
            if not await self._living.run(partial(self._session, stream, over)) and not is_port:
                return
            # A guest that refuses what every session begins with is asked again, and not in a busy loop.
            await trio.sleep(RECONNECT_DELAY)

    async def _establish_when_free(self, channel: SerialChannel) -> trio.abc.Stream:
        """A session over the port. It is tried for as long as it takes, beside one over something else."""
        while True:
            if self.observer is not None:
                await self.observer.port_is_free()
            with trio.CancelScope() as self._establishing:
                return await channel.establish()

    async def _session(self, stream: trio.abc.Stream, over: Transport) -> None:
        reason = "it was ended"
        try:
            with collapsed():
                async with trio.open_nursery() as nursery:
                    link = self._open_link(stream, Role.HOST, self._service, self._hello)
                    await nursery.start(link.run)
                    await self._on_up(link)
                    self.sessions += 1
                    self._publish(link, over)
                    if self.observer is not None:
                        self.observer.began(over)
                    if over is not Transport.VIRTIO_SERIAL:
                        self._establishing.cancel()  # whether the port is free may have changed
        except AgentctlProtocolError as error:
            reason = str(error)
            logger.info("%s session ended: %s", self._name, error)
        finally:
            if self._link is not None:
                self._publish(None)
                if self.observer is not None:
                    self.observer.ended(reason)
                self._on_down()

    def _publish(self, link: Link | None, over: Transport = Transport.NONE) -> None:
        self._link, self._over = link, over
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, timeout: float = PATIENCE) -> Link:
        """The current session, or the next; raises ``LinkError`` if none comes within ``timeout`` seconds."""
        with trio.move_on_after(timeout):
            while self._link is None:
                await self._changed.wait()
        if self._link is None:
            raise LinkError(f"the guest agent has not been reachable for {timeout:.0f} s")
        return self._link

    def dial_now(self, target: Target, on_answer: OnOpened) -> SendEarly | None:
        """``dial`` for who cannot wait: None if there is no session now, or it is busy."""
        return None if self._link is None else self._link.open_now(target, on_answer)

    async def dial(self, target: Target) -> MuxStream:
        """Open a stream to ``target``. Raises ``OpenRefused`` or ``LinkError``."""
        link = await self.wait()
        return await link.open(target)
