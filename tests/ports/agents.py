"""Both agents' ports without a VM, each a process; run by ``tests.ports.harness``.

    python -m tests.ports.agents guest SOCKET
    python -m tests.ports.agents host SOCKET

The guest's is the whole agent, in the network namespace that it is started in. The host's composes link, table and
forwarders as the daemon does. Each answers a line on its standard input with a line of JSON about itself.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from guest_agent.agent import Agent
from host_agent.client import hello
from host_agent.forwarders import ForwardRunner
from host_agent.guest_link import GuestLink
from host_agent.instance_agent import raise_descriptor_limit
from protocol.api import Event, Listeners
from protocol.lane import Lane
from protocol.link import Link, Service
from protocol.serial import SocketPort


async def answer(about: Callable[[], dict[str, Any]]) -> None:
    """Until the standard input ends: a process whose test has died must not stay."""
    stream = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    async for _ in stream:
        gc.collect()
        living = {
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "threads": threading.active_count(),
        }
        print(json.dumps({**living, **about()}), flush=True)


def loopback_up() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14s", b"lo", 0x1, b""))  # SIOCSIFFLAGS, IFF_UP


async def guest(path: Path) -> None:
    loopback_up()
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)

    async def accept() -> trio.abc.Stream:
        connection, _ = await listener.accept()
        return SocketPort(trio.SocketStream(connection))

    async with trio.open_nursery() as nursery:
        agent = Agent(nursery)
        nursery.start_soon(agent.ports.run)
        nursery.start_soon(agent.serve, accept)
        await answer(lambda: {"detection": agent.ports.detection, "dumps": agent.ports.dumps})
        nursery.cancel_scope.cancel()


async def host(path: Path) -> None:
    raise_descriptor_limit()

    async def on_up(link: Link) -> None:
        """There is nothing to configure."""

    lane = Lane()
    said: list[Event] = []
    service = Service()
    link = GuestLink(
        path, hello("test-host"), service, on_up=on_up, on_down=lambda: runner.link_lost(), lane=lane
    )
    runner = ForwardRunner(link.dial, said.append, dial_now=link.dial_now, lane=lane)
    service.on_notice(Listeners, runner.on_listeners)

    def about() -> dict[str, Any]:
        rows = runner.rows()
        told = [event.message for event in said if event.kind == "port-limit"]
        said.clear()
        return {
            "states": Counter(row.state for row in rows),
            "reasons": Counter(row.reason for row in rows),
            "limits": told,
            "sessions": link.sessions,
        }

    async with trio.open_nursery() as nursery:
        await nursery.start(runner.run)
        nursery.start_soon(lane.run)
        nursery.start_soon(link.run)
        await answer(about)
        nursery.cancel_scope.cancel()


def main(arguments: list[str]) -> None:
    match arguments:
        case ["guest", path]:
            trio.run(guest, Path(path))
        case ["host", path]:
            trio.run(host, Path(path))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
