"""The composition root of the guest agent: one control link after the other, for as long as it runs.

The law: nothing a host does or fails to do ends the agent. A session that breaks is logged, and the
next one begins with nothing of it left: its streams, processes and requests were its own. What
outlives sessions is what the machine is: the picture of its ports and its default user.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from guest_agent import dial, execute, fdstore
from guest_agent.bulk_memory import GuestPlane, open_region
from guest_agent.ports import PortDetector
from guest_agent.system import System
from guest_agent.transports import OpenTransport
from protocol.build import digest
from protocol.errors import LinkError
from protocol.link import Link, Role, SerialChannel, Service
from protocol.messages import Hello
from protocol.region import CONTROL

log = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds before a transport that broke is opened again, and after a session that never came to be
(a host of another version asks again at once, and for ever)."""


def make_hello() -> Hello:
    """Who we are. ``configure`` is only a capability of root's."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    capabilities = ["dial", "exec", "ports", *(["configure"] if os.geteuid() == 0 else [])]
    return Hello(digest=digest(), boot_id=boot_id, capabilities=capabilities, name="guest")


class Agent:
    """What the machine is, and the service that every session offers of it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.ports = PortDetector()
        self._system = System(nursery, lambda: self.ports.detection)
        self._service = Service()
        self._system.register(self._service)
        dial.register(self._service)
        execute.register(self._service, lambda: self._system.default_user)
        self._hello = make_hello()
        self._plane = GuestPlane(CONTROL, open_region())

    async def serve(self, open_transport: OpenTransport) -> None:
        """Sessions for ever, over a transport that is opened again whenever it breaks."""
        while True:
            try:
                transport = await open_transport()
                fdstore.notify("READY=1\nSTATUS=waiting for the host")
                async with transport:
                    channel = SerialChannel(transport)
                    while True:
                        if not await self._session(await channel.establish()):
                            await trio.sleep(PAUSE)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, LinkError) as error:
                log.warning("transport.lost error=%r", error)
            await trio.sleep(PAUSE)

    async def _session(self, stream: trio.abc.Stream) -> bool:
        """One session, to its end; False if there were not even greetings."""
        hello = self._plane.offered(self._hello)
        link = Link(stream, Role.GUEST, self._service, hello, bulk=self._plane.bulk)
        greeted = False
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(_run_and_end, link, nursery.cancel_scope)
                greeted = True
                log.info("session.begin peer=%s digest=%s", link.peer.name, link.peer.digest)
                await self.ports.announce(link.notify)
        except* LinkError as errors:
            log.info("session.end reason=%s", errors.exceptions[0])
        except* Exception as errors:
            log.error("session.failed", exc_info=errors)
        return greeted


async def _run_and_end(
    link: Link, session: trio.CancelScope, task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run ``link``; once it is over, in good order or not, so is all of its session."""
    await link.run(task_status)
    session.cancel()


@asynccontextmanager
async def stopped_by_signals() -> AsyncIterator[None]:
    """SIGTERM and SIGINT cancel the block; leaving it so is an orderly end."""
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:

            async def watch() -> None:
                async for number in received:
                    log.info("agent.stop signal=%s", signal.Signals(number).name)
                    fdstore.notify("STOPPING=1")
                    nursery.cancel_scope.cancel()
                    return

            nursery.start_soon(watch)
            yield
            nursery.cancel_scope.cancel()


async def run(open_transport: OpenTransport) -> None:
    """The agent, until a signal ends it."""
    async with stopped_by_signals(), trio.open_nursery() as nursery:
        agent = Agent(nursery)
        nursery.start_soon(agent.ports.run)
        await agent.serve(open_transport)
