from __future__ import annotations

import errno
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from guest_agent import datagrams
from host_agent.udp_forwarder import LeastUsed, Room, UdpForwarder, listen_udp
from protocol.api import DialUdp
from protocol.datagrams import MAX_DATAGRAM
from protocol.errors import LinkClosed
from protocol.lane import Lane
from protocol.link import Hello, Link, OnOpened, Role, SendEarly, Service

# --- sans-IO -------------------------------------------------------------------------------------------


def test_the_longest_unused_goes_first() -> None:
    table = LeastUsed[str](idle=60)
    table.add("a", "A", 0)
    table.add("b", "B", 1)
    assert table.use("a", 2) == "A"
    assert len(table) == 2
    assert table.pop() == "B"
    assert table.use("b", 4) is None
    assert (table.pop(), table.pop()) == ("A", None)


def test_what_is_not_used_expires_and_what_is_does_not() -> None:
    table = LeastUsed[str](idle=60)
    assert table.deadline() is None
    table.add("a", "A", 0)
    table.add("b", "B", 10)
    table.use("a", 30)
    assert table.deadline() == 70
    assert table.expire(69) == []
    assert table.expire(70) == ["B"]
    assert table.expire(90) == ["A"]
    assert table.deadline() is None


def test_what_is_removed_does_not_expire() -> None:
    table = LeastUsed[str](idle=60)
    table.add("a", "A", 0)
    table.remove("a")
    table.remove("a")
    assert table.expire(1000) == []


# --- binding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "names"),
    [("localhost", ["127.0.0.1", "::1"]), ("0.0.0.0", ["0.0.0.0", "::"]), ("127.0.0.2", ["127.0.0.2"])],
)
def test_all_addresses_have_one_port(address: str, names: list[str]) -> None:
    with closing_all(listen_udp(address, 0)) as sockets:
        assert [sock.getsockname()[0] for sock in sockets] == names
        assert len({sock.getsockname()[1] for sock in sockets}) == 1


def test_a_taken_port_is_an_error_and_nothing_is_left_bound() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as taken:
        taken.bind(("::1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(OSError) as failure:
            listen_udp("localhost", port)
        assert failure.value.errno == errno.EADDRINUSE
        with closing_all(listen_udp("127.0.0.1", port)):
            pass


@contextmanager
def closing_all(sockets: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


# --- a guest agent's datagrams over a real link -----------------------------------------------------------


@dataclass(slots=True)
class Ports:
    """A forwarder, the guest's address that it leads to, and the link."""

    forwarder: UdpForwarder
    port: int
    target: DialUdp
    dials: int = 0
    link: Link | None = None

    def dial_now(self, target: DialUdp, on_answer: OnOpened) -> SendEarly | None:
        self.dials += 1
        return None if self.link is None else self.link.open_now(target, on_answer)


@asynccontextmanager
async def linked(lane: Lane) -> AsyncIterator[Link]:
    service = Service()
    datagrams.register(service)
    host_end, guest_end = trio.testing.memory_stream_pair()
    host = Link(host_end, Role.HOST, Service(), Hello(name="host"), lane=lane)
    guest = Link(guest_end, Role.GUEST, service, Hello(name="guest"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.run)
        await nursery.start(host.run)
        yield host
        with suppress(LinkClosed):
            await host.goodbye()


@asynccontextmanager
async def forwarding(
    port: int, *, address: str = "127.0.0.1", host: str = "localhost", idle: float = 60, limit: int = 9
) -> AsyncIterator[Ports]:
    """The guest's ``port`` on a port of the host's localhost."""
    lane = Lane()
    sockets = listen_udp(host, 0)
    target = DialUdp(address, port)
    ports: Ports
    forwarder = UdpForwarder(
        sockets,
        lambda: (target,),
        lambda target, answer: ports.dial_now(target, answer),
        lane,
        idle=idle,
        room=Room(limit),
    )
    ports = Ports(forwarder, sockets[0].getsockname()[1], target)
    async with linked(lane) as ports.link, trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        nursery.start_soon(forwarder.serve, nursery)
        await trio.testing.wait_all_tasks_blocked()
        yield ports
        forwarder.close()
        nursery.cancel_scope.cancel()
    lane.close()


@asynccontextmanager
async def udp(address: str = "127.0.0.1", port: int = 0) -> AsyncIterator[trio.socket.SocketType]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
        await sock.bind((address, port))
        yield sock


async def until(condition: object) -> None:
    assert callable(condition)
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


async def exchange(server: trio.socket.SocketType, client: trio.socket.SocketType, ask: bytes) -> bytes:
    """What the client gets for ``ask`` from a server that answers with its double."""
    with trio.fail_after(5):
        await client.send(ask)
        asked, sender = await server.recvfrom(65536)
        await server.sendto(asked * 2, sender)
        answer: bytes = await client.recv(65536)
    return answer


@pytest.mark.skipif(sys.platform != "linux", reason="where an address of one's own is any of 127.0.0.0/8")
@pytest.mark.parametrize("asked", ["127.0.0.1", "127.0.0.2", "::1"])
async def test_who_asked_an_address_is_answered_from_it(asked: str) -> None:
    """A connected socket hears nothing else."""
    async with udp() as server, forwarding(server.getsockname()[1], host="0.0.0.0") as ports:
        async with udp("::1" if ":" in asked else "127.0.0.1") as client, udp("127.0.0.1") as other:
            await client.connect((asked, ports.port))
            assert await exchange(server, client, b"hello") == b"hellohello"
            await other.connect(("127.0.0.3", ports.port))
            assert await exchange(server, other, b"hi") == b"hihi"
            assert await exchange(server, client, b"again") == b"againagain"
        assert ports.forwarder.associations == 2


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_each_client_gets_its_own_answers(address: str) -> None:
    async with (
        udp() as server,
        forwarding(server.getsockname()[1]) as ports,
        udp(address) as one,
        udp(address) as two,
    ):
        for client in (one, two):
            await client.connect((address, ports.port))
        for ask in (b"a", b"", b"x" * 1000):
            assert await exchange(server, one, b"1" + ask) == (b"1" + ask) * 2
            assert await exchange(server, two, b"2" + ask) == (b"2" + ask) * 2
        assert (ports.forwarder.associations, ports.dials) == (2, 2)


@pytest.mark.parametrize("size", [16 * 1024, MAX_DATAGRAM // 2])
async def test_large_datagrams_arrive_whole(size: int) -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        assert await exchange(server, client, b"x" * size) == b"x" * 2 * size


async def test_the_largest_datagram_arrives() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.sendto(bytes(MAX_DATAGRAM), ("127.0.0.1", ports.port))
        with trio.fail_after(5):
            assert await server.recv(65536) == bytes(MAX_DATAGRAM)


async def test_what_ipv6_alone_can_carry_is_dropped_and_the_next_arrives() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp("::1") as client:
        await client.sendto(bytes(MAX_DATAGRAM + 1), ("::1", ports.port))
        await client.sendto(b"next", ("::1", ports.port))
        with trio.fail_after(5):
            assert await server.recv(65536) == b"next"


async def test_what_comes_before_the_stream_is_open_waits_in_order() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        for number in range(8):
            await client.send(b"%d" % number)
        with trio.fail_after(5):
            assert [await server.recv(9) for _ in range(8)] == [b"%d" % number for number in range(8)]
        assert ports.dials == 1


async def test_a_server_that_is_not_there_ends_the_association_and_one_that_comes_is_found() -> None:
    async with udp() as probe:
        port = probe.getsockname()[1]
    async with forwarding(port) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        await client.send(b"anybody?")
        await until(lambda: ports.dials == 1 and ports.forwarder.associations == 0)
        async with udp(port=port) as server:
            assert await exchange(server, client, b"now") == b"nownow"


async def test_an_address_that_cannot_be_dialled_ends_the_association() -> None:
    async with forwarding(9, address="nowhere") as ports, udp() as client:
        await client.sendto(b"?", ("127.0.0.1", ports.port))
        await until(lambda: ports.dials == 1 and ports.forwarder.associations == 0)


async def test_idle_associations_expire_and_the_client_goes_on() -> None:
    async with udp() as server, forwarding(server.getsockname()[1], idle=0.05) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        assert await exchange(server, client, b"a") == b"aa"
        await until(lambda: ports.forwarder.associations == 0)
        assert await exchange(server, client, b"b") == b"bb"
        assert ports.dials == 2


async def test_the_least_used_client_gives_way() -> None:
    async with udp() as server, forwarding(server.getsockname()[1], limit=2) as ports:
        for _ in range(5):
            async with udp() as client:
                await client.connect(("127.0.0.1", ports.port))
                assert await exchange(server, client, b"a") == b"aa"
        assert ports.forwarder.associations == 2
        assert ports.dials == 5


def test_who_has_the_most_gives_way_to_who_has_less() -> None:
    """So no port, and no flood of made-up clients, takes all there is."""

    class Port:
        def __init__(self, associations: int) -> None:
            self.associations = associations

        def give_way(self) -> None:
            self.associations -= 1

    room = Room(10)
    flooded, other = Port(9), Port(0)
    room.enter(flooded)  # type: ignore[arg-type]
    room.enter(other)  # type: ignore[arg-type]
    for _ in range(5):
        room.make()
        other.associations += 1
    assert (flooded.associations, other.associations) == (5, 5)
    room.leave(flooded)  # type: ignore[arg-type]
    room.make()
    assert other.associations == 5


async def test_without_a_link_datagrams_are_dropped_until_there_is_one() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        link, ports.link = ports.link, None
        await client.send(b"lost")
        await until(lambda: ports.dials == 1)
        assert ports.forwarder.associations == 0
        ports.link = link
        assert await exchange(server, client, b"a") == b"aa"


async def test_a_lost_link_ends_its_associations_and_the_next_link_has_new_ones() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        assert await exchange(server, client, b"a") == b"aa"
        first = ports.link
        assert first is not None
        ports.link = None
        await first.goodbye()
        await until(lambda: ports.forwarder.associations == 0)
        lane = Lane()
        async with linked(lane) as ports.link, trio.open_nursery() as nursery:
            nursery.start_soon(lane.run)
            assert await exchange(server, client, b"b") == b"bb"
            nursery.cancel_scope.cancel()
        lane.close()


async def test_a_flood_does_not_stop_what_comes_after_it() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        for _ in range(500):
            await client.send(bytes(8000))
        await until(lambda: ports.dials == 1)
        received = 0
        with trio.move_on_after(0.3):
            while True:
                await server.recv(65536)
                received += 1
        assert received >= 1
        assert await exchange(server, client, b"after") == b"afterafter"


async def test_a_closed_port_refuses_at_once() -> None:
    async with udp() as server, forwarding(server.getsockname()[1]) as ports, udp() as client:
        await client.connect(("127.0.0.1", ports.port))
        assert await exchange(server, client, b"a") == b"aa"
        ports.forwarder.close()
        assert ports.forwarder.associations == 0
        await client.send(b"b")
        with pytest.raises(ConnectionRefusedError), trio.fail_after(5):
            await client.recv(9)
        ports.forwarder.close()
