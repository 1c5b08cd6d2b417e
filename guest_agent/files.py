"""``python3 -m guest_agent.files``: the agent of the files plane, which serves the host's folders to the guest.

A process of its own beside the guest agent, so that no port, stream or command ever stands in the way of a
file. Imports little: each second of a boot in an emulated guest is one that somebody waits.

The law: no host, present, absent or of another version, and no single share ends this process; and its end,
if it is not an orderly one, ends no mount (``fdstore``). Sessions come and go; mounts and what waits on them stay.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Final

import trio

from guest_agent import fdstore
from guest_agent.bulk_memory import GuestPlane, open_region
from guest_agent.fence import FILE as FENCE_FILE
from guest_agent.fence import Unfenced, open_writer
from guest_agent.fuse.distance import Distance
from guest_agent.fuse.host import Host
from guest_agent.fuse.landing import Landing
from guest_agent.fuse.mounts import Mounts
from guest_agent.fuse.notifier import Notifiers
from guest_agent.transports import PORTS, OpenTransport, run_agent
from protocol.build import digest
from protocol.errors import LinkError
from protocol.files import (
    MAX_FILES_PAYLOAD,
    Changed,
    MountReports,
    MountShares,
    NamesGone,
    Renewed,
    in_use,
    owner,
)
from protocol.lane import Lane
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.region import FILES

log = logging.getLogger(__name__)

FILES_PORT: Final = PORTS / "org.agentctl.files"

MAX_BACKLOG: Final = 256 << 20
"""Bytes waiting to be written at which the host is at fault: four times what is ever asked at once."""

PAUSE: Final = 0.5
"""Seconds before a transport that broke is opened again, and after a session that never came to be."""

LANDING: Final = 2.0
"""Seconds at the end for what was answered for and waits for the host; a round trip is enough."""

READY_AFTER: Final = 60.0
"""Seconds without a host after which the boot goes on all the same: what needs the shares fails by name."""


class FilesAgent:
    """The mounts, and the sessions that serve them one after the other."""

    def __init__(self, nursery: trio.Nursery, *, vm: bool = True, fence: Unfenced | None = None) -> None:
        self._vm = vm
        self._host = Host(distance=None if vm else Distance(), fence=fence)
        self._plane = GuestPlane(FILES, open_region() if vm else None)
        self._plane.populate()
        self._lane = Lane()
        nursery.start_soon(self._lane.run)
        self._notifiers = Notifiers()
        self._mounts = Mounts(self._host, self._notifiers, nursery, Landing(self._plane.bulk), self._lane)
        self._arranged = trio.Event()
        self._boot_id = boot_id()
        nursery.start_soon(self._notifiers.run)
        nursery.start_soon(self._host.keep_patience)
        nursery.start_soon(self._host.watch_the_signalled)
        self._mounts.adopt(fdstore.take())
        self._host.ask_again_for(
            self._host.fence.left, self._mounts.in_use
        )  # before what their kernels ask now

    async def serve(self, open_transport: OpenTransport, pause: float = PAUSE) -> None:
        """Sessions for ever, over a transport that is opened again whenever it breaks, after ``pause`` seconds."""
        while True:
            try:
                async with await open_transport() as transport:
                    channel = SerialChannel(transport)
                    while True:
                        if not await self._session(await channel.establish()):
                            await trio.sleep(PAUSE)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, LinkError) as error:
                log.warning("transport.lost error=%r", error)
            await trio.sleep(pause)

    async def tell_ready(self) -> None:
        """Let the boot go on: once the shares are there, or it is clear that they will not be soon."""
        with trio.move_on_after(READY_AFTER) as waiting:
            await self._arranged.wait()
        if waiting.cancelled_caught:
            log.warning("ready.without_host seconds=%g", READY_AFTER)
        fdstore.notify("READY=1")

    async def settle(self) -> None:
        """Before sessions end: until the host has all that was answered for. A successor would have no mount of it."""
        self._host.answers_ahead = False
        with trio.move_on_after(LANDING):
            while self._host.is_ahead:
                await trio.sleep(0.005)

    async def stop(self) -> None:
        """Take all mounts off, in good order; nothing waits for the host any more."""
        fdstore.notify("STOPPING=1")
        self._host.give_up()
        await self._mounts.unmount_all()

    async def _session(self, stream: trio.abc.Stream) -> bool:
        """One session, to its end; False if there were not even greetings."""
        service = Service()
        link = Link(
            stream,
            Role.GUEST,
            service,
            self._plane.offered(self._hello()),
            bulk=self._plane.bulk,
            lane=self._lane,
            max_payload=MAX_FILES_PAYLOAD,
            max_backlog=MAX_BACKLOG,
        )
        service.on_request(MountShares, partial(self._mount_shares, link))
        service.on_notice(NamesGone, self._mounts.drop_names)
        service.on_notice_at_once(Changed, self._mounts.take_back)
        service.on_notice_at_once(Renewed, self._mounts.renew)
        greeted = False
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                greeted = True
                log.info("session.begin peer=%s digest=%s", link.peer.name, link.peer.digest)
        except* LinkError as errors:
            log.info("session.end reason=%s", errors.exceptions[0])
        except* Exception as errors:
            log.error("session.failed", exc_info=errors)
        finally:
            self._host.detach(link)
            self._mounts.void_promises()
        return greeted

    def _hello(self) -> Hello:
        """For a session that begins now."""
        said = ["files", in_use(self._mounts.in_use | self._host.shares)]
        if not self._vm:  # whose users are the host's
            said.append(owner(os.geteuid(), os.getegid()))
        return Hello(digest=digest(), boot_id=self._boot_id, capabilities=said, name="guest-files")

    async def _mount_shares(self, link: Link, request: MountShares) -> MountReports:
        # From here on calls may be sent, and must: a mount inside of a share is looked up in that one.
        self._host.attach(link)
        reports = await self._mounts.arrange(request.shares)
        self._arranged.set()
        return MountReports(reports, time.time_ns())


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def run(open_transport: OpenTransport, *, vm: bool = True, fence: Path = FENCE_FILE) -> None:
    """The agent, until a signal ends it. ``vm``: with memory that is shared with the host, and a boot that waits.
    ``fence``: what the guest agent of the same machine reads."""
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            agent = FilesAgent(nursery, vm=vm, fence=open_writer(fence, spooled=vm))
            async with trio.open_nursery() as sessions:
                # Elsewhere nothing is opened until somebody comes.
                sessions.start_soon(agent.serve, open_transport, PAUSE if vm else 0)
                if vm:
                    sessions.start_soon(agent.tell_ready)
                log.info("agent.stop signal=%s", signal.Signals(await anext(aiter(received))).name)
                await agent.settle()
                sessions.cancel_scope.cancel()
            await agent.stop()
        nursery.cancel_scope.cancel()


def main(arguments: list[str]) -> int:
    # Where there is no VM the fence may be elsewhere: AGENTCTL_FENCE names it.
    fence = Path(os.environ.get("AGENTCTL_FENCE", FENCE_FILE))
    return run_agent(arguments, "guest_agent.files", FILES_PORT, partial(run, fence=fence))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
