"""The composition root of the guest agent: one control link after the other, for as long as it runs.

In a VM they come over its port, and over SSH from a host that has lost it (``ssh_door``): one session lives at a time,
the newest, since only who is reached can have begun it.

The law: nothing a host does or fails to do ends the agent. A session that breaks is logged, and the
next one begins with nothing of it left: its streams, processes and requests were its own. What
outlives sessions is what the machine is: the picture of its ports, its default user, and its sockets that lead
to the host. On a machine that is not a VM of ours (``remote``) nothing is answered that would change the machine.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum, auto
from pathlib import Path

import trio

from guest_agent import datagrams, dial, execute, fdstore, ssh_door
from guest_agent.bulk_memory import GuestPlane, open_region
from guest_agent.clock import Clock
from guest_agent.data_disk import DataDisk
from guest_agent.docker_settings import DockerSettings
from guest_agent.entrances import Entrances
from guest_agent.fence import FILE as FENCE_FILE
from guest_agent.fence import Reader, open_reader
from guest_agent.foreign import ForeignPrograms
from guest_agent.host_network import HostNetwork
from guest_agent.owners import OwnerService
from guest_agent.ports import PortDetector
from guest_agent.remote.rundir import RunDirError
from guest_agent.spawn import find_account
from guest_agent.system import HERE, IN_VM, System
from guest_agent.transports import OpenTransport
from guest_agent.usage import Look, UsageService
from guest_agent.view_process import ViewProcess
from protocol.api import GetGuestInfo
from protocol.build import digest
from protocol.errors import LinkError
from protocol.link import Link, Role, SerialChannel, Service
from protocol.messages import Hello
from protocol.region import CONTROL
from protocol.succession import Succession

log = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds before a transport that broke is opened again, and after a session that never came to be
(a host of another version asks again at once, and for ever)."""

DOOR_AFTER = 5.0
"""Seconds for the port to show that it works, before another way is opened beside it: a boot has other things to do,
and a host waits longer before it takes that way."""

READY_AFTER = 60.0
"""Seconds for a host to come and say how its network is used, and what dockerd's settings are; then Docker is let go
ahead without."""


class Outcome(Enum):
    """How a session was over."""

    ENDED = auto()
    NO_GREETING = auto()  # it never came to be
    SUCCEEDED = auto()  # by a newer one, over another transport


def make_hello(*, vm: bool = True) -> Hello:
    """Who we are. ``configure`` is only a capability of root's, in a VM."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    capabilities = ["dial", "exec", "ports", *(["configure"] if vm and os.geteuid() == 0 else [])]
    if not vm:
        from protocol import packedfile  # which a VM does not wait for

        capabilities += ["packed-copies"] if packedfile.is_there() else []
    return Hello(digest=digest(), boot_id=boot_id, capabilities=capabilities, name="guest")


class Agent:
    """What the machine is, and the service that every session offers of it."""

    def __init__(self, nursery: trio.Nursery, *, vm: bool = True, fence: Reader | None = None) -> None:
        self._nursery = nursery
        self._fence = fence
        self.ports = PortDetector()
        self._system = System(
            nursery,
            lambda: self.ports.detection,
            port_dumps=lambda: self.ports.dumps,
            data=IN_VM if vm else HERE,
        )
        self._service = Service()
        self._prepared = (trio.Event(), trio.Event())
        self._sessions = Succession()
        self._greeted = trio.Event()
        if vm:
            self._offer_configuration()
        self._service.on_request(GetGuestInfo, self._system.guest_info)
        dial.register(self._service)
        datagrams.register(self._service)
        execute.register(self._service, lambda: self._system.default_user)
        OwnerService().register(self._service)
        UsageService(Look(data=IN_VM if vm else HERE)).register(self._service)
        self.entrances = Entrances(lambda: find_account(self._system.default_user))
        self.entrances.register(self._service)
        self._hello = make_hello(vm=vm)
        self._plane = GuestPlane(CONTROL, open_region() if vm else None)

    def _offer_configuration(self) -> None:
        """What the host may do to a machine that is its own; of others it is told that there is no such request."""
        self._system.register(self._service)
        Clock().register(self._service)
        DataDisk().register(self._service)
        network, docker = self._prepared
        HostNetwork(network.set).register(self._service)
        DockerSettings(docker.set).register(self._service)
        ViewProcess(self._nursery).register(self._service)
        ForeignPrograms().register(self._service)

    async def serve(
        self, open_transport: OpenTransport, pause: float = PAUSE, *, passing: bool = False
    ) -> None:
        """Sessions for ever, over a transport that is opened again whenever it breaks, after ``pause`` seconds.

        ``passing``: one on which a session was succeeded by another's is closed. (A port stays what it is.)
        """
        while True:
            try:
                transport = await open_transport()
                fdstore.notify("STATUS=waiting for the host")
                async with transport:
                    channel = SerialChannel(transport)
                    while True:
                        outcome = await self._session(await channel.establish())
                        if passing and outcome is Outcome.SUCCEEDED:
                            break
                        if outcome is Outcome.NO_GREETING:
                            await trio.sleep(PAUSE)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, LinkError) as error:
                log.warning("transport.lost error=%r", error)
            await trio.sleep(pause)

    async def serve_door(self, folder: Path) -> None:
        """Sessions over stdio that is handed over in ``folder``."""
        with trio.move_on_after(DOOR_AFTER):
            await self._greeted.wait()
        try:
            async with ssh_door.opened(folder) as door:
                await self.serve(door.open_transport, 0, passing=True)
        except* (OSError, RunDirError) as errors:
            log.warning("door.none error=%r", errors.exceptions[0])

    async def report_readiness(self) -> None:
        """Tell systemd, which lets Docker start, once what Docker reads as it starts is there."""
        with trio.move_on_after(READY_AFTER) as waiting:
            for prepared in self._prepared:
                await prepared.wait()
        if waiting.cancelled_caught:
            log.warning("ready.without_host seconds=%g", READY_AFTER)
        fdstore.notify("READY=1")

    async def _session(self, stream: trio.abc.Stream) -> Outcome:
        """One session, to its end."""
        greeted = False

        async def live() -> None:
            nonlocal greeted
            hello = self._plane.offered(self._hello)
            link = Link(stream, Role.GUEST, self._service, hello, bulk=self._plane.bulk, fence=self._fence)
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(_run_and_end, link, nursery.cancel_scope)
                    greeted = True
                    self._greeted.set()
                    log.info("session.begin peer=%s digest=%s", link.peer.name, link.peer.digest)
                    with self.entrances.session(link):
                        await self.ports.announce(link.notify)
            except* LinkError as errors:
                log.info("session.end reason=%s", errors.exceptions[0])
            except* Exception as errors:
                log.error("session.failed", exc_info=errors)

        if not await self._sessions.run(live):
            log.info("session.succeeded")
            return Outcome.SUCCEEDED
        return Outcome.ENDED if greeted else Outcome.NO_GREETING


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


async def run(
    open_transport: OpenTransport, *, vm: bool = True, door: Path | None = None, fence: Path = FENCE_FILE
) -> None:
    """The agent, until a signal ends it. ``vm``: the machine is the host's own, for it to configure; ``door``: the
    folder in which it may be handed another transport (``ssh_door``); ``fence``: where the files agent says what the
    host is to see before it hears more."""
    async with stopped_by_signals(), trio.open_nursery() as nursery:
        agent = Agent(nursery, vm=vm, fence=open_reader(fence))
        nursery.start_soon(agent.ports.run)
        if vm:
            nursery.start_soon(agent.report_readiness)
        await nursery.start(agent.entrances.run)
        if door is not None:
            nursery.start_soon(agent.serve_door, door)
        await agent.serve(open_transport, PAUSE if vm else 0)  # where nothing is opened until somebody comes
