"""A host agent that answers what a test has made up, on an instance's real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from host_agent.api_server import Answers, ApiServer
from host_agent.events import EventLog
from host_agent.forwarders import Dial
from host_agent.paths import InstancePaths
from protocol.api import (
    Forward,
    Forwards,
    ForwardState,
    InstanceStatus,
    Mount,
    Mounts,
    MountSpec,
    MountState,
    Owner,
    PortSettings,
    Proto,
    SocketRows,
    Stage,
    Usage,
)

STATUS = InstanceStatus(
    *("default", Stage.RUNNING, "ready", "", "kvm", 2, 1 << 30, 1 << 34, "img", 5, 6, 7.0, 0, True),
    *("d", "d", "/docker.sock", "agentctl"),
)
WEB = Forward(Proto.TCP, "::", 80, "localhost", 8080, ForwardState.LISTENING)
HOME = Mount(MountSpec("/home/me", "/home/me"), MountState.MOUNTED)


@dataclass
class Agent:
    """What a made-up host agent knows."""

    status: InstanceStatus = STATUS
    rows: list[Forward] = field(default_factory=lambda: [WEB])
    mounts: list[Mount] = field(default_factory=lambda: [HOME])
    events: EventLog = field(default_factory=lambda: EventLog(lambda: 7.0))
    usage: list[Usage] = field(default_factory=lambda: [Usage(0, 0)])
    """What it says, one after the other; the last for ever."""
    owners_asked: int = 0
    dial: Dial | None = None
    port_settings: PortSettings = field(default_factory=PortSettings)
    sockets: SocketRows = field(default_factory=lambda: SocketRows([]))
    on_forwards: Callable[[], None] = lambda: None

    def answers(self) -> Answers:
        async def status() -> InstanceStatus:
            await trio.lowlevel.checkpoint()
            return self.status

        async def mounts() -> Mounts:
            await trio.lowlevel.checkpoint()
            return Mounts(self.mounts)

        def forwards() -> Forwards:
            self.on_forwards()
            return Forwards(list(self.rows))

        async def usage() -> Usage:
            await trio.lowlevel.checkpoint()
            return self.usage.pop(0) if len(self.usage) > 1 else self.usage[0]

        async def owners() -> list[Owner]:
            await trio.lowlevel.checkpoint()
            self.owners_asked += 1
            return [Owner(row.proto, row.guest_address, row.guest_port, "nginx", "web") for row in self.rows]

        async def never(*_: object) -> object:
            raise NotImplementedError

        async def sockets() -> SocketRows:
            await trio.lowlevel.checkpoint()
            return self.sockets

        known: dict[str, Any] = {"port_settings": lambda: self.port_settings, "sockets": sockets}
        known |= {
            "status": status,
            "mounts": mounts,
            "forwards": forwards,
            "usage": usage,
            "owners": owners,
        }
        if self.dial is not None:
            known["dial"] = self.dial
        return Answers(**{**dict.fromkeys(Answers.__slots__, never), **known})  # type: ignore[arg-type]


@asynccontextmanager
async def running(paths: InstancePaths, agent: Agent) -> AsyncIterator[ApiServer]:
    """Answers of ``agent`` on its socket; its end is sudden unless it says farewell."""
    server = ApiServer(paths.agent_socket, agent.answers(), agent.events)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()
