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
from protocol.api import Listener, Listeners, Proto

QUIET = 0.3
"""Seconds after which a detector with nothing to do has done all it will."""

LISTEN_AND_CLOSE = "import socket; [socket.create_server(('127.0.0.1', 0)).close() for _ in range(50)]"


BIND_AND_CLOSE = "import socket\nfor _ in range(50):\n with socket.socket(type=socket.SOCK_DGRAM) as s: s.bind(('127.0.0.1', 5300))\n"


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
async def container(what: str = LISTEN_AND_CLOSE) -> AsyncIterator[None]:
    """Listens and stops 50 times in a namespace of its own, and lives on meanwhile: of a process that
    has gone nobody knows the namespace."""
    program = what + "\nprint(flush=True); input()"
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


def udp_server(address: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))
    return server


async def udp_dump() -> dict[str, object]:
    async with open_dumper() as dumper:
        with (
            closing(udp_server("127.0.0.1", 51820)),
            closing(udp_server("::1", 5353)),
            closing(udp_server("127.0.0.1", 0)),
            closing(udp_server("127.0.0.1", 5354)) as connected,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            connected.connect(("127.0.0.1", 9))
            client.sendto(b"?", ("127.0.0.1", 51820))
            found = await dumper.listeners()
            of_tcp = await dumper.listeners(frozenset({Proto.TCP}))
        after = await dumper.listeners()
    assert {listener.proto for listener in found} == {Proto.UDP}
    return {"found": addresses(found), "of_tcp": addresses(of_tcp), "after": addresses(after)}


async def follow_udp(source: OpenWakes) -> dict[str, object]:
    delays = []
    async with detection(source) as (detector, _, peer):
        for address in ("127.0.0.1", "0.0.0.0", "::", "::1"):
            with closing(udp_server(address, 5300)):
                delays.append(await peer.sees(5300))
            delays.append(await peer.sees())
        return {"detection": detector.detection, "fulls": peer.fulls, "slowest": max(delays)}


async def follow_udp_tracefs() -> dict[str, object]:
    return await follow_udp(open_wakes)


async def follow_udp_polling() -> dict[str, object]:
    return await follow_udp(open_polling)


def ask(bound: bool) -> None:
    """As a client of DNS does it; glibc's binds a netlink socket besides."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink,
    ):
        netlink.bind((0, 0))
        if bound:
            client.bind(("", 0))
        client.sendto(b"?", ("127.0.0.1", 5300))


async def udp_storms() -> dict[str, object]:
    """What must cost nothing: clients of UDP, and servers of other namespaces; and what must cost little."""
    async with detection(open_wakes) as (_, dumper, peer):
        with closing(udp_server("127.0.0.1", 5300)):
            await peer.sees(5300)
            await trio.sleep(QUIET)
            counts = [dumper.dumps]
            for _ in range(300):
                ask(bound=False)
            await trio.sleep(QUIET)
            counts.append(dumper.dumps)
            async with container(BIND_AND_CLOSE):
                await trio.sleep(QUIET)
                counts.append(dumper.dumps)
            started = trio.current_time()
            for _ in range(100):
                ask(bound=True)
                await trio.sleep(0.005)
            await trio.sleep(QUIET)
            counts.append(dumper.dumps)
            seconds, notices = trio.current_time() - started, peer.notices
        await peer.sees()
    return {"counts": counts, "notices": notices, "seconds": seconds}


async def udp_connected() -> dict[str, object]:
    """A server that talks to its first client only, as iperf3 and socat do, is there until it closes."""
    told: list[list[tuple[str, int]]] = []
    async with detection(open_wakes) as (_, _, peer):
        server = udp_server("0.0.0.0", 5300)
        await peer.sees(5300)
        server.connect(("127.0.0.1", 9))
        with closing(udp_server("127.0.0.1", 5301)):  # so that the truth is read
            await peer.sees(5300, 5301)
            told.append(addresses(frozenset(peer.known)))
        await peer.sees(5300)
        notices = peer.notices
        server.close()
        await peer.sees()
        # A client may choose its port, too; nobody serves there.
        with closing(udp_server("127.0.0.1", 5302)) as client:
            client.connect(("127.0.0.1", 9))
            with closing(udp_server("127.0.0.1", 5301)):
                await peer.sees(5301)
            await peer.sees()
    return {"told": told, "notices": notices}


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
