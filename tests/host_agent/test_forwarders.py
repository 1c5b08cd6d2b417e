"""The forwarders against real sockets of the loopback interface; the guest is in memory or a socket, too."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from host_agent import binding, forwarders
from host_agent.errors import UserError
from host_agent.forwarders import (
    Connections,
    Forwarder,
    ForwardRunner,
    UnixForwarder,
    Waiting,
    listen_localhost,
)
from host_agent.rules import (
    LOCALHOST,
    MAX_UNIX_PATH,
    Decision,
    Forwarding,
    HostAddress,
    HostSocket,
    Static,
)
from host_agent.unix_listening import listen_unix
from protocol.api import DialTcp, DialUnix, Event, ForwardState, Listener, Listeners, Proto, Target
from protocol.errors import ErrorCode, LinkClosed, OpenRefused
from protocol.lane import READABLE, Lane
from protocol.link import Hello, Incoming, Link, MuxStream, OnOpened, Role, SendEarly, Service
from protocol.serial import SocketPort
from protocol.splice import abort
from tests.descriptors import open_descriptors
from tests.free_ports import free_port

Server = Callable[[trio.abc.HalfCloseableStream], object]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


HOSTS = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]
FAMILY: dict[str, Any] = (
    {"family": socket.AF_INET6, "dualstack_ipv6": True} if has_ipv6() else {"family": socket.AF_INET}
)
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


@pytest.fixture
def port() -> int:
    return free_port()


@contextmanager
def other_program(address: str, port: int, *, dual: bool = False) -> Iterator[socket.socket]:
    """A listener that is not ours, made as most servers make theirs (SO_REUSEADDR)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family, dualstack_ipv6=dual) as server:
        yield server


class Guest:
    """What is dialled: each target is served by a function, or refused."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.servers: dict[Target, Callable[[trio.abc.HalfCloseableStream], object]] = {}
        self.dialled: list[Target] = []
        self.default: object = None
        self._nursery = nursery

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        self.dialled.append(target)
        server = self.servers.get(target, self.default)
        if isinstance(server, BaseException):
            raise server
        if server is None:
            raise OpenRefused(ErrorCode.REFUSED, "connection refused")
        ours, theirs = await _socket_pair()
        self._nursery.start_soon(server, theirs)  # type: ignore[arg-type]
        return ours


async def _socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """A TCP connection within this process: unlike a pair of memory streams it can be reset."""
    async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listener:
        address = listener.socket.getsockname()
        ours = await trio.open_tcp_stream(address[0], address[1])
        return ours, await listener.accept()


async def echo(stream: trio.abc.HalfCloseableStream) -> None:
    """Say everything again, and only after the other side has ended, end as well."""
    async with stream:
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()


TARGET = DialTcp("127.0.0.1", 80)


@asynccontextmanager
async def forwarding(
    port: int, server: object = echo, targets: Sequence[Target] = (TARGET,)
) -> AsyncIterator[tuple[Forwarder, Guest]]:
    """A forwarder on ``port``. Fails rather than hangs."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            guest = Guest(nursery)
            guest.default = server
            forwarder = Forwarder(listen_localhost(port), lambda: targets, guest.dial)
            nursery.start_soon(forwarder.serve, nursery)
            yield forwarder, guest
            nursery.cancel_scope.cancel()
            forwarder.close()


async def exchange(stream: trio.abc.HalfCloseableStream, request: bytes) -> bytes:
    """Send a request and half-close, then read the whole answer."""
    await stream.send_all(request)
    await stream.send_eof()
    return b"".join([chunk async for chunk in stream])


def cause(error: BaseException) -> int | None:
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


# --- binding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", HOSTS)
async def test_a_port_answers_on_both_families_of_localhost(port: int, address: str) -> None:
    async with forwarding(port):
        async with await trio.open_tcp_stream(address, port) as client:
            assert await exchange(client, b"hello") == b"hello"


async def test_a_port_is_not_exposed_to_the_network(port: int) -> None:
    async with forwarding(port) as (forwarder, _):
        names = {listener.socket.getsockname()[0] for listener in forwarder._listeners}
        assert names == set(HOSTS)


@needs_ipv6
@pytest.mark.parametrize(("taken", "free"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
async def test_a_port_that_is_taken_in_one_family_is_bound_in_none(port: int, taken: str, free: str) -> None:
    with other_program(taken, port):
        with pytest.raises(OSError) as caught:
            listen_localhost(port)
        assert caught.value.errno == errno.EADDRINUSE
        with other_program(free, port):
            pass  # nothing of ours was left behind


@pytest.mark.parametrize(
    ("address", "dual"),
    [("0.0.0.0", False), *([("::", False), ("::", True)] if has_ipv6() else [])],
)
async def test_a_wildcard_listener_of_another_program_is_in_the_way(
    port: int, address: str, dual: bool
) -> None:
    with other_program(address, port, dual=dual):
        with pytest.raises(OSError) as caught:
            listen_localhost(port)
        assert caught.value.errno == errno.EADDRINUSE


async def test_a_port_whose_last_connection_is_in_time_wait_can_be_taken(port: int) -> None:
    with other_program("127.0.0.1", port) as server:
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first keeps the port in TIME_WAIT
        assert client.recv(1) == b""
        client.close()
    for listener in listen_localhost(port):
        listener.socket.close()


def may_bind_any_port() -> bool:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 1))
    except PermissionError:
        return False
    return True


async def test_a_privileged_port_is_refused_to_an_ordinary_user() -> None:
    if may_bind_any_port():
        pytest.skip("this user may bind any port")
    with pytest.raises(PermissionError):
        listen_localhost(1)


async def test_a_host_without_ipv6_is_served_on_ipv4(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = binding.bind

    def bind(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
        if ":" in address:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(address, port, kind)

    monkeypatch.setattr(binding, "bind", bind)
    (listener,) = listen_localhost(port)
    assert listener.socket.getsockname() == ("127.0.0.1", port)
    listener.socket.close()


# --- carrying --------------------------------------------------------------------------------------


async def test_the_guest_may_answer_after_the_client_has_ended(port: int) -> None:
    async def answer(stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            request = b"".join([chunk async for chunk in stream])
            await stream.send_all(request.upper() * 100_000)

    async with forwarding(port, answer):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert await exchange(client, b"ten bytes!") == b"TEN BYTES!" * 100_000


async def test_the_client_may_go_on_after_the_guest_has_ended(port: int) -> None:
    received = bytearray()
    done = trio.Event()

    async def talk_first(stream: trio.abc.HalfCloseableStream) -> None:
        async with stream:
            await stream.send_all(b"bye")
            await stream.send_eof()
            async for chunk in stream:
                received.extend(chunk)
            done.set()

    async with forwarding(port, talk_first):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert b"".join([chunk async for chunk in client]) == b"bye"
            await client.send_all(b"still here")
            await client.send_eof()
            await done.wait()
    assert received == b"still here"


async def test_a_reset_by_the_guest_is_a_reset_for_the_client(port: int) -> None:
    async def cut(stream: trio.abc.HalfCloseableStream) -> None:
        assert await stream.receive_some() == b"hello"
        await abort(stream, ErrorCode.RESET, "test")

    async with forwarding(port, cut):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"hello")
            with pytest.raises(trio.BrokenResourceError) as caught:
                await client.receive_some()
            assert cause(caught.value) == errno.ECONNRESET


async def test_a_reset_by_the_client_is_a_reset_for_the_guest(port: int) -> None:
    failed = trio.Event()

    async def listen(stream: trio.abc.HalfCloseableStream) -> None:
        assert await stream.receive_some() == b"hello"
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert cause(caught.value) == errno.ECONNRESET
        await stream.aclose()
        failed.set()

    async with forwarding(port, listen):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"hello")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await abort(client, ErrorCode.RESET, "test")
        await failed.wait()


async def test_a_guest_that_does_not_read_stops_the_client(port: int) -> None:
    reading = trio.Event()

    async def slow(stream: trio.abc.HalfCloseableStream) -> None:
        await reading.wait()
        await echo(stream)

    async with forwarding(port, slow):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            sent = 0
            block = bytes(1 << 20)
            with trio.move_on_after(0.5) as patience:
                while sent < 256 << 20:
                    await client.send_all(block)
                    sent += len(block)
            assert patience.cancelled_caught, f"{sent} bytes went nowhere"
            reading.set()


@pytest.mark.parametrize(
    "failure",
    [OpenRefused(ErrorCode.REFUSED, "connection refused"), LinkClosed("the link is over"), OSError("odd")],
)
async def test_a_connection_that_cannot_be_carried_is_reset(port: int, failure: Exception) -> None:
    async with forwarding(port, failure):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await client.receive_some()
            assert cause(caught.value) == errno.ECONNRESET


async def test_a_bug_in_one_connection_is_logged_and_leaves_the_others_alone(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with forwarding(port) as (_, guest):
        guest.default = ValueError("a bug")
        with caplog.at_level(logging.ERROR):
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                with pytest.raises(trio.BrokenResourceError):
                    await client.receive_some()
        assert "ValueError: a bug" in caplog.text
        guest.default = echo
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert await exchange(client, b"hello") == b"hello"


OTHER = DialTcp("::1", 80)


async def test_the_next_target_is_tried_when_the_first_has_just_died(port: int) -> None:
    async with forwarding(port, None, (TARGET, OTHER)) as (_, guest):
        guest.servers[OTHER] = echo
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        assert guest.dialled == [TARGET, OTHER]


async def test_the_next_target_is_not_tried_after_another_kind_of_refusal(port: int) -> None:
    async with forwarding(port, OpenRefused(ErrorCode.LIMIT, "too many"), (TARGET, OTHER)) as (_, guest):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some()
        assert guest.dialled == [TARGET]


async def test_a_closed_port_refuses_at_once_and_its_connections_live_on(port: int) -> None:
    async with forwarding(port) as (forwarder, _):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"before")
            assert await client.receive_some() == b"before"
            forwarder.close()
            for address in HOSTS:
                with pytest.raises(ConnectionRefusedError), socket.create_connection((address, port)):
                    pass
            assert await exchange(client, b"after") == b"after"


async def test_two_hundred_connections_at_once_leave_nothing_behind(port: int) -> None:
    before = len(open_descriptors())
    async with forwarding(port):
        async with AsyncExitStack() as stack:
            clients = []
            for _ in range(200):
                client = await trio.open_tcp_stream("127.0.0.1", port)
                clients.append(await stack.enter_async_context(client))
            for number, client in enumerate(clients):
                await client.send_all(b"%d" % number)
            for number, client in enumerate(clients):
                assert await client.receive_some() == b"%d" % number
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert len(open_descriptors()) <= before + 2


async def test_beyond_the_limit_of_connections_clients_wait_for_a_place(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One place for the connection and one for each family's pending accept.
    monkeypatch.setattr(forwarders, "MAX_CONNECTIONS", len(HOSTS))
    async with forwarding(port) as (_, guest):
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(guest.dialled) == 1
        for client in clients:
            assert await exchange(client, b"hello") == b"hello"
            await client.aclose()


class ExhaustedListener:
    """Stands for a listening socket in a process that has no descriptor left for a while."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[float] = []

    async def accept(self) -> trio.SocketStream:
        self.calls.append(trio.current_time())
        if len(self.calls) <= self.failures:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise trio.ClosedResourceError


async def test_a_process_without_descriptors_pauses_and_goes_on(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = ExhaustedListener(failures=3)
    forwarder = Forwarder([listener], tuple, Guest.dial)  # type: ignore[list-item, arg-type]
    async with trio.open_nursery() as nursery:
        await forwarder.serve(nursery)
    assert listener.calls == pytest.approx([0, 0.2, 0.4, 0.6])
    assert "Too many open files" in caplog.text


# --- unix sockets ----------------------------------------------------------------------------------

DOCKER = DialUnix("/run/docker.sock")


@asynccontextmanager
async def unix_forwarding(path: Path, server: object = echo) -> AsyncIterator[Guest]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            guest = Guest(nursery)
            guest.default = server
            await nursery.start(UnixForwarder(path, DOCKER, guest.dial).run)
            yield guest
            nursery.cancel_scope.cancel()


async def test_a_unix_socket_leads_into_the_guest_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    async with unix_forwarding(path) as guest:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with await trio.open_unix_socket(path) as client:
            assert await exchange(client, b"hello") == b"hello"
        assert guest.dialled == [DOCKER]
    assert os.listdir(tmp_path) == []


async def test_a_unix_connection_that_cannot_be_carried_ends(tmp_path: Path) -> None:
    async with unix_forwarding(tmp_path / "s", None):
        async with await trio.open_unix_socket(tmp_path / "s") as client:
            assert await client.receive_some() == b""


async def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with unix_forwarding(path):
        async with await trio.open_unix_socket(path) as client:
            assert await exchange(client, b"hello") == b"hello"


async def test_a_socket_that_answers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(UserError, match="another process listens"):
            listen_unix(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert os.listdir(tmp_path) == ["docker.sock"]


async def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    path.write_text("precious")
    with pytest.raises(UserError, match="is not a socket"):
        listen_unix(path)
    assert path.read_text() == "precious"


async def test_a_path_too_long_for_the_system_is_explained(tmp_path: Path) -> None:
    room = MAX_UNIX_PATH - len(os.fsencode(tmp_path)) - 1
    if room < 12:
        pytest.skip("the temporary directory's own path is too long")
    listen_unix(tmp_path / ("x" * room)).socket.close()
    with pytest.raises(UserError, match=f"{MAX_UNIX_PATH + 1} bytes") as caught:
        listen_unix(tmp_path / ("x" * (room + 1)))
    assert "AGENTCTL_HOME" in caught.value.hint


async def test_the_path_of_a_successor_is_not_unlinked(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    async with unix_forwarding(path):
        path.unlink()
        successor = listen_unix(path)
    assert path.is_socket()
    successor.socket.close()


async def test_a_name_that_was_taken_away_comes_back_and_connections_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarders, "LOOK", 0.01)
    path = tmp_path / "docker.sock"
    async with unix_forwarding(path):
        async with await trio.open_unix_socket(path) as client:
            path.unlink()
            with trio.fail_after(20):
                while not path.exists():
                    await trio.sleep(0.005)
            async with await trio.open_unix_socket(path) as another:
                assert await exchange(another, b"hello") == b"hello"
            assert await exchange(client, b"hello") == b"hello"
    assert os.listdir(tmp_path) == []


async def test_a_forwarder_that_was_closed_leaves_a_later_socket_of_that_name_alone(tmp_path: Path) -> None:
    """Also one that has got the same inode number, which is free once nobody listens."""
    path = tmp_path / "s"
    async with trio.open_nursery() as nursery:
        forwarder = Forwarder([listen_unix(path)], lambda: (), Guest(nursery).dial, path=path)
        forwarder.close()
        successor = listen_unix(path)
        forwarder.close()
        assert path.is_socket()
        successor.socket.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the name is shortened through /proc")
async def test_a_short_name_at_the_end_of_a_long_path(tmp_path: Path) -> None:
    """The name that the socket has at first, .PID, is longer."""
    room = MAX_UNIX_PATH - len(os.fsencode(tmp_path)) - len("//s")
    folder = tmp_path / ("d" * room)
    folder.mkdir()
    async with unix_forwarding(folder / "s"):
        async with await trio.open_unix_socket(folder / "s") as client:
            assert await exchange(client, b"hello") == b"hello"
    assert os.listdir(folder) == []


async def test_a_directory_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        listen_unix(tmp_path / "missing" / "docker.sock")


@needs_ipv6
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_an_address_on_an_interface_that_is_not_there(kind: socket.SocketKind) -> None:
    """Python asks getaddrinfo(3), whose errors have numbers of their own."""
    with pytest.raises(OSError) as caught:
        binding.bind_all("fe80::1%none0", 8080, kind)
    assert caught.value.errno == errno.EADDRNOTAVAIL


# --- the runner ------------------------------------------------------------------------------------


@asynccontextmanager
async def running(server: object = echo) -> AsyncIterator[tuple[ForwardRunner, list[Event], Guest]]:
    """A runner with a guest in which everything listens on 0.0.0.0."""
    events: list[Event] = []
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            guest = Guest(nursery)
            guest.default = server
            runner = ForwardRunner(guest.dial, events.append)
            await nursery.start(runner.run)
            yield runner, events, guest
            nursery.cancel_scope.cancel()


def local(port: int) -> HostAddress:
    return HostAddress(Proto.TCP, "localhost", port)


def on(port: int) -> Listener:
    return Listener(Proto.TCP, "0.0.0.0", port, "docker.service")


async def test_a_listener_of_the_guest_answers_on_localhost_until_it_goes(port: int) -> None:
    async with running() as (runner, events, guest):
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("localhost", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        assert guest.dialled == [DialTcp("127.0.0.1", port)]
        await runner.on_listeners(Listeners(False, [], [on(port)]))
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        assert [(event.kind, event.fields["port"]) for event in events] == [
            ("port-listening", str(port)),
            ("port-closed", str(port)),
        ]


async def test_an_event_comes_when_the_port_can_be_reached_already(port: int) -> None:
    reached: list[str] = []

    def connect(event: Event) -> None:
        with socket.create_connection(("127.0.0.1", port)):
            reached.append(event.kind)

    async with trio.open_nursery() as nursery:
        runner = ForwardRunner(Guest(nursery).dial, connect)
        await nursery.start(runner.run)
        await runner.on_listeners(Listeners(True, [on(port)]))
        nursery.cancel_scope.cancel()
    assert reached == ["port-listening"]


async def test_a_taken_port_is_taken_over_when_it_becomes_free(
    port: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as (runner, events, _):
        with other_program("0.0.0.0", port):
            await runner.on_listeners(Listeners(True, [on(port)]))
            assert [row.state for row in runner.rows()] == [ForwardState.CONFLICT]
            await trio.sleep(10)
            assert [event.kind for event in events] == ["port-conflict"]
            assert "in use on the host" in events[0].fields["reason"]
        await trio.sleep(5)
        assert [row.state for row in runner.rows()] == [ForwardState.LISTENING]
        assert [event.kind for event in events] == ["port-conflict", "port-listening"]


async def test_a_lost_link_keeps_the_port_and_its_clients_until_the_next_session(port: int) -> None:
    async with running() as (runner, _, guest):
        await runner.on_listeners(Listeners(True, [on(port)]))
        runner.link_lost()
        back = trio.Event()

        async def wait_for_the_link(target: Target) -> trio.abc.HalfCloseableStream:
            await back.wait()
            return await guest.dial(target)

        runner._dial = wait_for_the_link
        runner._forwarders[local(port)]._dial = wait_for_the_link
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"hello")
            await trio.testing.wait_all_tasks_blocked(0.01)
            await runner.on_listeners(Listeners(True, [on(port)]))
            back.set()
            assert await exchange(client, b" again") == b"hello again"


async def test_a_session_that_does_not_name_a_port_any_more_closes_it(
    port: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as (runner, _, _):
        await runner.on_listeners(Listeners(True, [on(port)]))
        runner.link_lost()
        await runner.on_listeners(Listeners(True, []))
        await trio.sleep(2)
        assert runner.rows() == []
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


async def test_a_runner_that_ends_closes_its_ports_and_resets_its_connections(port: int) -> None:
    with trio.fail_after(20):
        async with running() as (runner, _, _):
            await runner.on_listeners(Listeners(True, [on(port)]))
            client = await trio.open_tcp_stream("127.0.0.1", port)
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        await client.aclose()
        for listener in listen_localhost(port):
            listener.socket.close()
        await runner.on_listeners(Listeners(True, [on(port)]))
        assert runner.rows() == []


async def test_two_hundred_ports_open_and_close_at_once() -> None:
    before = len(open_descriptors())
    async with running() as (runner, events, _):
        ports = [on(port) for port in range(30_000, 30_200)]
        await runner.on_listeners(Listeners(True, ports))
        states = [row.state for row in runner.rows()]
        assert len(states) == 200
        opened = states.count(ForwardState.LISTENING)
        assert opened > 150, "others of this machine may have a few of them"
        assert len(open_descriptors()) >= before + opened * len(HOSTS)
        await runner.on_listeners(Listeners(False, [], ports))
        assert len(open_descriptors()) <= before + 2
        assert [event.kind for event in events].count("port-closed") == 200


async def test_a_conflict_says_who_has_the_port(port: int) -> None:
    async with running() as (runner, events, _):
        with other_program("127.0.0.1", port):
            await runner.on_listeners(Listeners(True, [on(port)]))
        assert "in use on the host by another forward of this VM" in events[0].fields["reason"]


async def test_a_port_for_the_lan_is_on_every_address_of_both_families(port: int) -> None:
    everywhere = HostAddress(Proto.TCP, "0.0.0.0", port)
    async with running() as (runner, events, _):
        runner.change_rules(lambda listener: Forwarding(everywhere), [])
        await runner.on_listeners(Listeners(True, [on(port)]))
        for host in HOSTS:
            async with await trio.open_tcp_stream(host, port) as client:
                assert await exchange(client, b"hello") == b"hello"
        names = {listener.socket.getsockname()[0] for listener in runner._forwarders[everywhere]._listeners}
        assert names == {"0.0.0.0", "::"} if len(HOSTS) == 2 else {"0.0.0.0"}
        assert events[0].fields == {"port": str(port), "address": "0.0.0.0", "proto": "tcp"}


async def test_one_address_of_the_host_is_only_that_one(port: int) -> None:
    async with running() as (runner, _, _):
        runner.change_rules(lambda listener: Forwarding(HostAddress(Proto.TCP, "127.0.0.2", port)), [])
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.2", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


async def test_a_port_of_the_guest_may_be_a_socket_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    async with running() as (runner, events, guest):
        runner.change_rules(lambda listener: Forwarding(HostSocket(str(path))), [])
        await runner.on_listeners(Listeners(True, [on(80)]))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with await trio.open_unix_socket(str(path)) as client:
            assert await exchange(client, b"hello") == b"hello"
        assert guest.dialled == [DialTcp("127.0.0.1", 80)]
        assert events[0].fields == {"path": str(path)}
        await runner.on_listeners(Listeners(False, [], [on(80)]))
        assert not path.exists()


async def test_a_socket_whose_name_is_taken_away_has_it_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "web.sock"
    async with running() as (runner, events, _):
        runner.change_rules(lambda listener: Forwarding(HostSocket(str(path))), [])
        await runner.on_listeners(Listeners(True, [on(80)]))
        path.unlink()
        await trio.sleep(forwarders.LOOK + 0.1)
        assert path.is_socket()
        assert [event.kind for event in events] == ["port-listening"], "that is no news"
        path.unlink()
        path.write_text("somebody else's")
        await trio.sleep(forwarders.LOOK)
        assert [row.state for row in runner.rows()] == [ForwardState.CONFLICT]
        path.unlink()
        await trio.sleep(forwarders.LOOK)
        assert [event.kind for event in events] == ["port-listening", "port-conflict", "port-listening"]
        assert path.is_socket()


async def test_a_socket_that_is_out_of_reach_does_not_keep_its_forward_open(
    port: int, tmp_path: Path
) -> None:
    """Its folder has become something else; the others of the same notice come and go as they should."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def decide(listener: Listener) -> Decision:
        socket_end = HostSocket(str(folder / "web.sock"))
        return Forwarding(
            socket_end if listener.port == 80 else HostAddress(Proto.TCP, LOCALHOST, listener.port)
        )

    async with running() as (runner, events, _):
        runner.change_rules(decide, [])
        await runner.on_listeners(Listeners(True, [on(80), on(port)]))
        (folder / "web.sock").unlink()
        folder.rmdir()
        folder.write_text("a file now")
        await runner.on_listeners(Listeners(False, [], [on(80), on(port)]))
        assert runner.rows() == []
        assert [event.kind for event in events] == [*["port-listening"] * 2, *["port-closed"] * 2]
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        await runner.on_listeners(Listeners(False, [on(port)]))
        assert [row.state for row in runner.rows()] == [ForwardState.LISTENING]
    assert folder.read_text() == "a file now"


async def test_what_is_in_the_way_of_a_socket_is_said_and_left_alone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "web.sock"
    path.write_text("precious")
    async with running() as (runner, _, _):
        runner.change_rules(lambda listener: Forwarding(HostSocket(str(path))), [])
        await runner.on_listeners(Listeners(True, [on(80)]))
        (row,) = runner.rows()
        assert (row.state, row.host_address) == (ForwardState.CONFLICT, str(path))
        assert row.reason.startswith(f"{path} exists and is not a socket")
        assert path.read_text() == "precious"
        path.unlink()
        await trio.sleep(10)
        assert path.is_socket()


async def test_a_server_for_datagrams_has_its_port_and_loses_it(port: int) -> None:
    listener = Listener(Proto.UDP, "0.0.0.0", port)
    async with prompt(True) as (runner, _, _):
        await runner.on_listeners(Listeners(True, [listener]))
        assert [row.state for row in runner.rows()] == [ForwardState.LISTENING]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            await runner.on_listeners(Listeners(False, [], [listener]))
            other.bind(("127.0.0.1", port))
        assert runner.rows() == []


async def test_a_static_port_is_open_as_soon_as_it_runs(port: int) -> None:
    events: list[Event] = []
    async with trio.open_nursery() as nursery:
        guest = Guest(nursery)
        guest.default = echo
        runner = ForwardRunner(guest.dial, events.append)
        runner.change_rules(
            lambda listener: Forwarding(local(1)), [Static(local(1), Proto.TCP, "127.0.0.1", 1)]
        )
        runner.change_rules(
            lambda listener: Forwarding(local(port)), [Static(local(port), Proto.TCP, "127.0.0.1", 80)]
        )
        assert runner.rows() == []
        await nursery.start(runner.run)
        assert [event.kind for event in events] == ["port-listening"]
        async with await trio.open_tcp_stream("localhost", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        assert guest.dialled == [DialTcp("127.0.0.1", 80)]
        nursery.cancel_scope.cancel()


# --- without a task --------------------------------------------------------------------------------


class LinkedGuest:
    """A guest behind a real link, over a socket as QEMU has it: so streams are opened and carried on the lane."""

    def __init__(self, nursery: trio.Nursery, lane: Lane) -> None:
        self.programs: dict[int, Callable[[Incoming], Awaitable[None]]] = {}
        self.dialled: list[tuple[str, Target]] = []
        self.offers: list[Incoming] = []
        self.link: Link | None = None
        self.back = trio.Event()
        self._nursery = nursery
        self._lane = lane
        self._scope = trio.CancelScope()

    async def begin(self) -> None:
        """A new session."""
        pair = socket.socketpair()
        for end in pair:
            end.setblocking(False)
        ours, theirs = [SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in pair]
        service = Service()
        service.on_stream(DialTcp, lambda target, incoming: self.programs[target.port](incoming))
        link = Link(ours, Role.HOST, Service(), Hello(), lane=self._lane)
        guest = Link(theirs, Role.GUEST, service, Hello())
        self._scope, started = trio.CancelScope(), trio.Event()

        async def session() -> None:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    async with trio.open_nursery() as starting:
                        starting.start_soon(nursery.start, link.run)
                        starting.start_soon(nursery.start, guest.run)
                    self.link = link
                    started.set()

        self._nursery.start_soon(session)
        await started.wait()
        self.back.set()
        self.back = trio.Event()

    def lose(self) -> None:
        self.link = None
        self._scope.cancel()

    def dial_now(self, target: Target, on_answer: OnOpened) -> SendEarly | None:
        self.dialled.append(("now", target))
        return None if self.link is None else self.link.open_now(target, on_answer)

    async def dial(self, target: Target) -> MuxStream:
        self.dialled.append(("task", target))
        while self.link is None:
            await self.back.wait()
        return await self.link.open(target)

    # --- programs

    async def echo(self, incoming: Incoming) -> None:
        await echo(await incoming.accept())

    async def refuse(self, incoming: Incoming) -> None:
        await incoming.refuse(ErrorCode.REFUSED, "connection refused")

    async def hold(self, incoming: Incoming) -> None:
        """Neither accept nor refuse, until the test does."""
        self.offers.append(incoming)
        await trio.sleep_forever()


@asynccontextmanager
async def prompt(on_lane: bool) -> AsyncIterator[tuple[ForwardRunner, LinkedGuest, trio.CancelScope]]:
    """A runner that needs no task for a connection, and what ends it. No descriptor is left."""
    before = set(os.listdir("/dev/fd"))
    lane = Lane()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.run)
            guest = LinkedGuest(nursery, lane)
            await guest.begin()
            runner = ForwardRunner(
                guest.dial, lambda event: None, dial_now=guest.dial_now, lane=lane if on_lane else None
            )
            running, ended = trio.CancelScope(), trio.Event()

            async def run(task_status: trio.TaskStatus[None]) -> None:
                with running:
                    await runner.run(task_status)
                ended.set()

            await nursery.start(run)
            yield runner, guest, running
            running.cancel()
            await ended.wait()
            assert not runner._carried._pumps
            assert not runner._carried._waiting
            guest.lose()
            await trio.testing.wait_all_tasks_blocked()
            assert not lane._watched
            nursery.cancel_scope.cancel()
    lane.close()
    assert not set(os.listdir("/dev/fd")) - before


ON_LANE = pytest.mark.parametrize(
    "on_lane", [True, False], ids=["accepted on the lane", "accepted by a task"]
)


async def assert_reset(client: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.receive_some()
    assert cause(caught.value) == errno.ECONNRESET
    await client.aclose()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.sleep(0.001)


def places(runner: ForwardRunner, port: int) -> int:
    """Connections that the forwarder may have besides those it has. Each family may hold one for its next client."""
    return runner._forwarders[local(port)]._slots.value


@ON_LANE
async def test_a_connection_needs_no_task(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))
        await trio.testing.wait_all_tasks_blocked()
        assert runner._connections is not None
        tasks = len(runner._connections.child_tasks)
        for _ in range(3):
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                await client.send_all(b"before")
                assert await client.receive_some() == b"before"
                assert len(runner._connections.child_tasks) == tasks
                assert await exchange(client, b" and after") == b" and after"
        assert guest.dialled == [("now", DialTcp("127.0.0.1", port))] * 3


@ON_LANE
async def test_what_the_client_said_before_the_answer_is_carried(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"early")
            await client.send_eof()
            await until(lambda: guest.offers)
            stream = await guest.offers[0].accept()
            assert b"".join([data async for data in stream]) == b"early"
            await stream.send_all(b"late")
            await stream.send_eof()
            assert b"".join([bytes(data) async for data in client]) == b"late"


@ON_LANE
async def test_a_refusal_leaves_it_to_a_task_that_tries_all_targets(port: int, on_lane: bool) -> None:
    lane = Lane()
    first, second = DialTcp("127.0.0.1", port), DialTcp("127.0.0.1", port + 1)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.run)
            guest = LinkedGuest(nursery, lane)
            await guest.begin()
            guest.programs = {first.port: guest.refuse, second.port: guest.echo}
            forwarder = Forwarder(
                listen_localhost(port),
                lambda: (first, second),
                guest.dial,
                dial_now=guest.dial_now,
                lane=lane if on_lane else None,
            )
            nursery.start_soon(forwarder.serve, nursery)
            for _ in range(2):
                guest.dialled.clear()
                async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                    assert await exchange(client, b"hello") == b"hello"
                assert guest.dialled == [("now", first), ("task", first), ("task", second)]
            guest.programs[second.port] = guest.refuse
            await assert_reset(await trio.open_tcp_stream("127.0.0.1", port))
            forwarder.close()
            nursery.cancel_scope.cancel()
    lane.close()


@ON_LANE
async def test_without_a_link_a_task_waits_for_the_next(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))
        guest.lose()
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await until(lambda: len(guest.dialled) == 2)
            await guest.begin()
            assert await exchange(client, b"hello") == b"hello"
        assert [way for way, _ in guest.dialled] == ["now", "task"]


@ON_LANE
async def test_a_link_lost_while_a_stream_is_opened_leaves_it_to_a_task(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await until(lambda: guest.offers)
            guest.lose()
            await until(lambda: len(guest.dialled) == 2)
            guest.programs[port] = guest.echo
            await guest.begin()
            assert await exchange(client, b"hello") == b"hello"
        assert [way for way, _ in guest.dialled] == ["now", "task"]
        await until(lambda: places(runner, port) >= forwarders.MAX_CONNECTIONS - len(HOSTS))


@ON_LANE
async def test_the_loss_of_the_link_resets_what_is_carried(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(5)]
        for client in clients:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
        guest.lose()
        for client in clients:
            await assert_reset(client)
        assert not runner._carried._pumps


@ON_LANE
@pytest.mark.parametrize("answer", ["accept", "refuse", "never"])
async def test_a_runner_that_ends_while_streams_are_opened_resets_their_clients(
    port: int, on_lane: bool, answer: str
) -> None:
    async with prompt(on_lane) as (runner, guest, running):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        await until(lambda: len(guest.offers) == 3)
        slots = runner._forwarders[local(port)]._slots
        running.cancel()
        for client in clients:
            await assert_reset(client)
        for offer in guest.offers:
            if answer == "accept":
                stream = await offer.accept()
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            elif answer == "refuse":
                await offer.refuse(ErrorCode.REFUSED, "connection refused")
        if answer == "never":
            guest.lose()
        await until(lambda: slots.value >= forwarders.MAX_CONNECTIONS - len(HOSTS))


@ON_LANE
async def test_a_runner_that_ends_resets_what_is_carried(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, running):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(10)]
        for client in clients:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
        running.cancel()
        for client in clients:
            await assert_reset(client)
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


@ON_LANE
async def test_a_port_that_closes_while_a_stream_is_opened_keeps_its_client(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await until(lambda: guest.offers)
            await runner.on_listeners(Listeners(False, [], [on(port)]))
            with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                pass
            stream = await guest.offers[0].accept()
            await client.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.aclose()
            await assert_reset(client)


async def test_what_a_client_says_first_does_not_wait_for_the_answer(port: int) -> None:
    async with prompt(True) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"hello")
            await until(lambda: guest.offers)
            await until(lambda: guest.offers[0].stream.peek() is not None)
            await client.send_all(b", world")
            stream = await guest.offers[0].accept()
            heard = b""
            while len(heard) < 12:
                heard += await stream.receive_some()
            assert heard == b"hello, world"
            await client.send_eof()
            assert await stream.receive_some() == b""
            await stream.aclose()
            await assert_reset(client)


async def test_what_a_client_said_first_is_said_to_the_next_target(port: int) -> None:
    async with prompt(True) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"hello")
            await until(lambda: guest.offers and guest.offers[0].stream.peek() is not None)
            guest.programs[port] = guest.echo
            await guest.offers[0].refuse(ErrorCode.REFUSED, "connection refused")
            assert await client.receive_some() == b"hello"
            assert [how for how, _ in guest.dialled] == ["now", "task"]


async def test_what_may_have_arrived_is_not_said_again(port: int) -> None:
    """A session that ends before the answer: perhaps the guest's server has the request."""
    async with prompt(True) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"POST /order")
            await until(lambda: guest.offers and guest.offers[0].stream.peek() is not None)
            guest.lose()
            await guest.begin()
            await assert_reset(client)
            assert [how for how, _ in guest.dialled] == ["now"]


def test_who_is_answered_after_the_end_leaves_the_lane_to_others() -> None:
    lane, carried = Lane(), Connections()
    one, other = socket.socketpair()
    waiting = Waiting(one, lane)
    assert carried.wait(waiting)
    waiting.listen(lambda data: None)
    number = one.fileno()
    carried.close()
    with other, socket.socket() as successor:
        assert successor.fileno() == number
        lane.watch(number, READABLE, lambda ready: None)
        assert not carried.answered(waiting)
        assert number in lane._watched
        lane.close()


def test_who_comes_after_the_end_is_reset() -> None:
    one, other = socket.socketpair()
    carried = Connections()
    carried.close()
    with other:
        assert not carried.wait(Waiting(one, None))
        assert one.fileno() == -1


@ON_LANE
async def test_a_client_that_leaves_while_its_stream_is_opened(port: int, on_lane: bool) -> None:
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.hold
        await runner.on_listeners(Listeners(True, [on(port)]))
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await until(lambda: guest.offers)
        await abort(client, ErrorCode.RESET, "test")
        stream = await guest.offers[0].accept()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await until(lambda: not runner._carried._pumps)


@ON_LANE
async def test_the_limit_of_connections_holds_without_tasks(
    port: int, on_lane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two for connections, and one for what each of the other families' tasks may accept.
    monkeypatch.setattr(forwarders, "MAX_CONNECTIONS", 1 + len(HOSTS))
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(12)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 1 <= len(guest.dialled) <= 2
        for client in clients:
            assert await exchange(client, b"hello") == b"hello"
            await client.aclose()
            assert len(runner._carried._pumps) <= 2
        assert len(guest.dialled) == 12
        await until(lambda: places(runner, port) >= 1)


@ON_LANE
async def test_a_thousand_connections_leave_nothing_behind(port: int, on_lane: bool) -> None:
    """Ended, half ended and reset ones; ``prompt`` looks for descriptors."""
    async with prompt(on_lane) as (runner, guest, _):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))

        async def connect(number: int) -> None:
            client = await trio.open_tcp_stream("127.0.0.1", port)
            if number % 5 == 0:
                await abort(client, ErrorCode.RESET, "test")
                return
            await client.send_all(b"%d" % number)
            if number % 5 == 1:
                await client.aclose()
                return
            await client.send_eof()
            assert b"".join([bytes(data) async for data in client]) == b"%d" % number
            await client.aclose()

        for first in range(0, 1000, 50):
            async with trio.open_nursery() as nursery:
                for number in range(first, first + 50):
                    nursery.start_soon(connect, number)
        await until(lambda: not runner._carried._pumps and not runner._carried._waiting)
        assert guest.link is not None
        link = guest.link
        await until(lambda: not link._streams)
        await until(lambda: places(runner, port) >= forwarders.MAX_CONNECTIONS - len(HOSTS))


async def test_what_cannot_be_accepted_on_the_lane_is_left_to_the_task(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which knows what to do when descriptors run out, and then leaves it to the lane again."""
    failures = 0

    def accept(listener: socket.socket) -> Any:  # trio has its own
        nonlocal failures
        failures += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with prompt(True) as (runner, guest, _):
        guest.programs[port] = guest.echo
        await runner.on_listeners(Listeners(True, [on(port)]))
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            assert await exchange(client, b"hello") == b"hello"
        monkeypatch.setattr(socket.socket, "accept", accept)
        for count in range(1, 4):
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                assert await exchange(client, b"again") == b"again"
            assert failures == count


@ON_LANE
async def test_all_ports_together_leave_streams_to_others(
    port: int, on_lane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarders, "MAX_TOGETHER", 2)
    async with prompt(on_lane) as (runner, guest, _), AsyncExitStack() as stack:
        ports = (port, free_port())
        guest.programs |= dict.fromkeys(ports, guest.echo)
        await runner.on_listeners(Listeners(True, [on(each) for each in ports]))
        clients = []
        for each in ports * 2:
            client = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", each))
            clients.append(client)
            await client.send_all(b"hello")
        await until(lambda: runner._carried.places.value == 0)
        for client in clients:
            assert await client.receive_some() == b"hello"
            assert runner._carried.places.value == 0 or client in clients[2:]
            await client.aclose()
        await until(lambda: runner._carried.places.value == 2)
