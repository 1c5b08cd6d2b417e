"""The product's data path without a VM: the host agent's forwarder and the guest agent, each a process.

    python -m tests.bench.ports.ours guest SOCKET
    python -m tests.bench.ports.ours host SOCKET PORT TARGET

The guest's agent is the whole one but for its detection of ports, which would find this host's. It listens at
the unix socket where QEMU would, so nothing is in between that a VM would not have. The host's side composes
link and forwarder as the daemon does: ``PORT`` of localhost leads to ``TARGET`` of the guest's. Each runs until
it is killed.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import trio

from guest_agent.agent import Agent
from host_agent.client import hello
from host_agent.forwarders import Forwarder, listen_localhost
from host_agent.guest_link import GuestLink
from protocol.api import DialTcp
from protocol.lane import Lane
from protocol.link import Link, Service
from protocol.serial import SocketPort


async def guest(path: Path) -> None:
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)

    async def accept() -> trio.abc.Stream:
        connection, _ = await listener.accept()
        return SocketPort(trio.SocketStream(connection))

    async with trio.open_nursery() as nursery:
        await Agent(nursery).serve(accept)


async def host(path: Path, port: int, target: int) -> None:
    async def on_up(link: Link) -> None:
        """There is nothing to configure."""

    lane = Lane()
    link = GuestLink(path, hello("agentctl-bench"), Service(), on_up=on_up, on_down=lambda: None, lane=lane)
    forwarder = Forwarder(
        listen_localhost(port),
        lambda: (DialTcp("127.0.0.1", target),),
        link.dial,
        dial_now=link.dial_now,
        lane=lane,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        nursery.start_soon(link.run)
        nursery.start_soon(forwarder.serve, nursery)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["guest", path]:
            trio.run(guest, Path(path))
        case ["host", path, port, target]:
            trio.run(host, Path(path), int(port), int(target))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
