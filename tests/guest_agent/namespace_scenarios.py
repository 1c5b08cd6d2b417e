"""Scenarios of port detection, each run in a process and network namespace of its own.

``python namespace_scenarios.py NAME`` prints what happened as one JSON object. Nobody else listens or
connects in a fresh namespace, so dumps and notices can be counted exactly.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import trio

from guest_agent.listeners import Snapshot
from guest_agent.ports import OpenWakes, PortDetector, open_polling
from guest_agent.sockdiag import Dumper, open_dumper
from guest_agent.tracefs import open_wakes
from protocol.api import Listener, Listeners

QUIET = 0.3
"""Seconds after which a detector with nothing to do has done all it will."""

LISTEN_AND_CLOSE = "import socket; [socket.create_server(('127.0.0.1', 0)).close() for _ in range(50)]"


def loopback_up() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14s", b"lo", 0x1, b""))  # SIOCSIFFLAGS, IFF_UP


def server(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address == "::1")
    listener.bind((address, 0))
    listener.listen()
    return listener


class Peer:
    """Follows the notices of one session as a host does."""

    def __init__(self) -> None:
        self.known: set[Listener] = set()
        self.fulls = self.notices = 0
        self._news = trio.Event()

    async def notify(self, notice: Listeners) -> None:
        self.notices += 1
        self.fulls += notice.full
        self.known = (set() if notice.full else self.known - set(notice.removed)) | set(notice.added)
        self._news.set()
        self._news = trio.Event()

    async def sees(self, *ports: int) -> float:
        """Wait until exactly these ports are known; returns how long that took, in seconds."""
        started = trio.current_time()
        with trio.fail_after(10):
            while {listener.port for listener in self.known} != set(ports) or not self.fulls:
                await self._news.wait()
        return trio.current_time() - started


@asynccontextmanager
async def detection(source: OpenWakes) -> AsyncIterator[tuple[PortDetector, Dumper, Peer]]:
    detector, peer = PortDetector(), Peer()
    async with open_dumper() as dumper, trio.open_nursery() as nursery:
        nursery.start_soon(detector.follow, dumper.listeners, source)
        nursery.start_soon(detector.announce, peer.notify)
        await peer.sees()
        yield detector, dumper, peer
        nursery.cancel_scope.cancel()


async def dump() -> dict[str, object]:
    async with open_dumper() as dumper:
        nothing = await dumper.listeners()
        with closing(server("127.0.0.1")) as four, closing(server("::")) as six, socket.socket() as unbound:
            client = socket.create_connection(four.getsockname())
            accepted, _ = four.accept()
            unbound.bind(("127.0.0.1", 0))
            both = await dumper.listeners()
            client.close()
            accepted.close()
            expected = sorted([("127.0.0.1", four.getsockname()[1]), ("::", six.getsockname()[1])])
        after = await dumper.listeners()
    return {"nothing": len(nothing), "both": addresses(both), "expected": expected, "after": len(after)}


def addresses(snapshot: Snapshot) -> list[tuple[str, int]]:
    return sorted((listener.address, listener.port) for listener in snapshot)


async def many() -> dict[str, object]:
    servers = [server("127.0.0.1") for _ in range(800)]
    async with open_dumper() as dumper:
        found = await dumper.listeners()
    ports = {listener.getsockname()[1] for listener in servers}
    for listener in servers:
        listener.close()
    return {"same": {listener.port for listener in found} == ports}


async def mapped() -> dict[str, object]:
    """An IPv6 socket on a mapped IPv4 address, as Java makes them."""
    with closing(socket.socket(socket.AF_INET6)) as listener:
        listener.bind(("::ffff:127.0.0.1", 0))
        listener.listen()
        async with open_dumper() as dumper:
            return {"addresses": [address for address, _ in addresses(await dumper.listeners())]}


async def follow(source: OpenWakes) -> dict[str, object]:
    delays = []
    async with detection(source) as (detector, _, peer):
        for address in ("127.0.0.1", "0.0.0.0", "::", "::1"):
            listener = server(address)
            delays.append(await peer.sees(listener.getsockname()[1]))
            listener.close()
            delays.append(await peer.sees())
        return {"detection": detector.detection, "fulls": peer.fulls, "slowest": max(delays)}


async def follow_tracefs() -> dict[str, object]:
    return await follow(open_wakes)


async def follow_polling() -> dict[str, object]:
    return await follow(open_polling)


@asynccontextmanager
async def container() -> AsyncIterator[None]:
    """Listens and stops 50 times in a namespace of its own, and lives on meanwhile: of a process that
    has gone nobody knows the namespace."""
    program = LISTEN_AND_CLOSE + "; print(flush=True); input()"
    process = await trio.lowlevel.open_process(
        ["unshare", "--net", sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        await process.stdout.receive_some()
        yield
        await process.stdin.send_all(b"\n")
    await process.wait()


async def storms() -> dict[str, object]:
    """What must cost nothing: silence, accepted connections, and listeners of other namespaces."""
    async with detection(open_wakes) as (_, dumper, peer):
        with closing(server("127.0.0.1")) as listener:
            await peer.sees(listener.getsockname()[1])
            await trio.sleep(QUIET)
            counts = [dumper.dumps]
            await trio.sleep(QUIET)
            counts.append(dumper.dumps)
            for _ in range(300):
                with socket.create_connection(listener.getsockname()), listener.accept()[0]:
                    pass
            await trio.sleep(QUIET)
            counts.append(dumper.dumps)
            async with container():
                await trio.sleep(QUIET)
                counts.append(dumper.dumps)
            notices = peer.notices
        await peer.sees()
    return {"counts": counts, "notices": notices}


async def churn() -> dict[str, object]:
    """A process listens, closes and exits as fast as it can; then one listener is left."""
    async with detection(open_wakes) as (_, dumper, peer):
        await trio.run_process([sys.executable, "-c", LISTEN_AND_CLOSE])
        with closing(server("::1")) as listener:
            await peer.sees(listener.getsockname()[1])
        await peer.sees()
        return {"dumps": dumper.dumps}


async def unsure_wakes() -> dict[str, object]:
    """An instance that is removed under the detector's feet: it goes on by polling."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[object]:
        raise PermissionError(1, "no tracefs for you")
        yield

    detector, peer = PortDetector(), Peer()
    async with open_dumper() as dumper, trio.open_nursery() as nursery:
        nursery.start_soon(detector.follow, dumper.listeners, broken, open_polling)
        nursery.start_soon(detector.announce, peer.notify)
        with closing(server("127.0.0.1")) as listener:
            await peer.sees(listener.getsockname()[1])
        await peer.sees()
        nursery.cancel_scope.cancel()
    return {"detection": detector.detection}


def main(name: str) -> None:
    loopback_up()
    print(json.dumps(trio.run(globals()[name])))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main(sys.argv[1])
