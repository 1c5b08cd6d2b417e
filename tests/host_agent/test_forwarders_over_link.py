"""Ports and the docker socket through a real link: host agent, protocol and a guest, in one process."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent.forwarders import ForwardRunner, UnixForwarder
from protocol.api import DialTcp, DialUnix, Event, ForwardState, Listener, Listeners, Proto, Target
from protocol.errors import ErrorCode, LinkClosed
from protocol.link import Link
from protocol.messages import Hello
from protocol.muxstream import Incoming, MuxStream
from protocol.service import Service
from protocol.session import Role
from tests.free_ports import free_port

Program = Callable[[MuxStream], Awaitable[None]]


@dataclass
class Guest:
    """The guest's side: the programs that listen in it, and the session in which they are told."""

    programs: dict[int | str, Program] = field(default_factory=dict)
    link: Link | None = None

    def service(self) -> Service:
        service = Service()
        service.on_stream(DialTcp, lambda target, incoming: self._dial(target.port, incoming))
        service.on_stream(DialUnix, lambda target, incoming: self._dial(target.path, incoming))
        return service

    async def _dial(self, place: int | str, incoming: Incoming) -> None:
        program = self.programs.get(place)
        if program is None:
            await incoming.refuse(ErrorCode.REFUSED, "connection refused")
        else:
            await program(await incoming.accept())

    async def tell(self, added: Sequence[int], removed: Sequence[int] = (), *, full: bool = False) -> None:
        """Send a notice about ports, and wait until the host has done what follows from it."""
        assert self.link is not None
        notice = Listeners(full, [listener(port) for port in added], [listener(port) for port in removed])
        await self.link.notify(notice)
        await trio.testing.wait_all_tasks_blocked(0.02)


def listener(port: int) -> Listener:
    return Listener(Proto.TCP, "0.0.0.0", port, "docker.service")


@dataclass
class Host:
    """The host's side, as the daemon composes it: the runner outlives the links."""

    guest: Guest
    nursery: trio.Nursery
    events: list[Event] = field(default_factory=list)
    link: Link | None = None

    def __post_init__(self) -> None:
        self.runner = ForwardRunner(self.dial, self.events.append)

    async def dial(self, target: Target) -> MuxStream:
        if self.link is None:
            raise LinkClosed("the guest agent is not connected")
        return await self.link.open(target)

    async def connect(self) -> trio.CancelScope:
        """A new session with the guest. Cancelling what is returned cuts it off without a word."""
        ours, theirs = trio.testing.memory_stream_pair()
        service = Service()
        service.on_notice(Listeners, self.runner.on_listeners)
        scope = trio.CancelScope()

        async def session(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    async with trio.open_nursery() as starting:
                        self.link = Link(ours, Role.HOST, service, Hello(name="host"))
                        self.guest.link = Link(theirs, Role.GUEST, self.guest.service(), Hello(name="guest"))
                        starting.start_soon(nursery.start, self.link.run)
                        starting.start_soon(nursery.start, self.guest.link.run)
                    task_status.started()
            self.link = None
            self.runner.link_lost()

        await self.nursery.start(session)
        return scope


@asynccontextmanager
async def machine() -> AsyncIterator[tuple[Host, Guest]]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            guest = Guest()
            host = Host(guest, nursery)
            await nursery.start(host.runner.run)
            yield host, guest
            nursery.cancel_scope.cancel()


@pytest.fixture
def port() -> int:
    return free_port()


async def echo(stream: MuxStream) -> None:
    """Say everything again, and end after the other side has."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def exchange(stream: trio.abc.HalfCloseableStream, request: bytes) -> bytes:
    """Send a request while reading the answer, and half-close after it."""
    answer = bytearray()

    async def send() -> None:
        await stream.send_all(request)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for chunk in stream:
            answer += chunk
    return bytes(answer)


async def assert_reset(client: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.receive_some()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ECONNRESET


async def test_a_megabyte_goes_there_and_back_and_ends_in_order(port: int) -> None:
    async with machine() as (host, guest):
        guest.programs[port] = echo
        await host.connect()
        await guest.tell([port], full=True)
        payload = os.urandom(1 << 20)
        async with await trio.open_tcp_stream("localhost", port) as client:
            assert await exchange(client, payload) == payload


async def test_a_port_follows_its_listener(port: int) -> None:
    async with machine() as (host, guest):
        guest.programs[port] = echo
        await host.connect()
        await guest.tell([], full=True)
        await guest.tell([port])
        assert [row.state for row in host.runner.rows()] == [ForwardState.LISTENING]
        async with await trio.open_tcp_stream("localhost", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        await guest.tell([], [port])
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        assert [event.kind for event in host.events] == ["port-listening", "port-closed"]


async def test_a_listener_that_has_died_meanwhile_resets_its_clients(port: int) -> None:
    async with machine() as (host, guest):
        await host.connect()
        await guest.tell([port], full=True)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await assert_reset(client)


async def test_a_reset_crosses_the_link_both_ways(port: int) -> None:
    seen: list[BaseException | None] = []
    heard = trio.Event()

    async def program(stream: MuxStream) -> None:
        if await stream.receive_some() == b"cut me off":
            await stream.reset(ErrorCode.RESET, "connection reset")
            return
        try:
            await stream.receive_some()
        except trio.BrokenResourceError as error:
            seen.append(error.__cause__)
        heard.set()

    async with machine() as (host, guest):
        guest.programs[port] = program
        await host.connect()
        await guest.tell([port], full=True)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"cut me off")
            await assert_reset(client)
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"I cut you off")
        await trio.testing.wait_all_tasks_blocked(0.02)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await client.aclose()
        await heard.wait()
        assert [type(error).__name__ for error in seen] == ["StreamReset"]


async def test_a_program_that_does_not_read_stops_its_client_and_nobody_else(port: int) -> None:
    async def stuck(stream: MuxStream) -> None:
        await trio.sleep_forever()

    async with machine() as (host, guest):
        guest.programs[port] = stuck
        await host.connect()
        await guest.tell([port], full=True)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            sent = 0
            block = bytes(1 << 20)
            with trio.move_on_after(0.5) as patience:
                while sent < 256 << 20:
                    await client.send_all(block)
                    sent += len(block)
            assert patience.cancelled_caught, f"{sent} bytes went nowhere"
            guest.programs[port] = echo
            async with await trio.open_tcp_stream("127.0.0.1", port) as other:
                assert await exchange(other, b"hello") == b"hello"


async def test_a_lost_link_resets_clients_and_the_next_one_serves_the_same_port(port: int) -> None:
    async with machine() as (host, guest):
        guest.programs[port] = echo
        session = await host.connect()
        await guest.tell([port], full=True)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
            session.cancel()
            await assert_reset(client)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await assert_reset(client)
        await host.connect()
        await guest.tell([port], full=True)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        assert [event.kind for event in host.events] == ["port-listening"], "it was open all the time"


async def test_two_hundred_connections_share_a_link(port: int) -> None:
    async with machine() as (host, guest):
        guest.programs[port] = echo
        await host.connect()
        await guest.tell([port], full=True)
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
                for _ in range(200)
            ]
            for number, client in enumerate(clients):
                await client.send_all(b"%d" % number)
            for number, client in enumerate(clients):
                assert await client.receive_some() == b"%d" % number


async def test_dockers_socket_leads_to_the_guests(tmp_path: Path) -> None:
    async with machine() as (host, guest):
        guest.programs["/run/docker.sock"] = echo
        await host.connect()
        path = tmp_path / "docker.sock"
        await host.nursery.start(UnixForwarder(path, DialUnix("/run/docker.sock"), host.dial).run)
        async with await trio.open_unix_socket(path) as client:
            assert await exchange(client, b"GET /_ping HTTP/1.1\r\n\r\n") == b"GET /_ping HTTP/1.1\r\n\r\n"
