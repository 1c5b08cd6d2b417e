"""The proxy between a real client (curl, or bytes made by hand) and servers on loopback; the guest is made up."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import pytest
import trio

from host_agent import state, tunnel
from host_agent.api_server import Answers, ApiServer
from host_agent.errors import ExitCode, UserError
from host_agent.events import EventLog
from host_agent.paths import InstancePaths
from host_agent.socks import ReplyCode, reply
from protocol.api import DialName, DialTcp, Target
from protocol.errors import ErrorCode, LinkError, OpenRefused
from tests.free_ports import free_port

REPOSITORY = Path(__file__).parents[2]

HELLO = b"\x05\x01\x00"
WELCOME = b"\x05\x00"
NAME = "server.in.the.guest"


def to_ipv4(port: int, address: str = "127.0.0.1") -> bytes:
    return b"\x05\x01\x00\x01" + socket.inet_aton(address) + port.to_bytes(2, "big")


def to_name(port: int, name: str = NAME) -> bytes:
    return b"\x05\x01\x00\x03" + bytes([len(name)]) + name.encode() + port.to_bytes(2, "big")


@dataclass
class Guest:
    """Where the host agent's dial leads to: this machine's loopback."""

    dialled: list[Target] = field(default_factory=list)
    failure: Exception | None = None
    hangs: bool = False

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        self.dialled.append(target)
        if self.hangs:
            await trio.sleep_forever()
        if self.failure is not None:
            raise self.failure
        match target:
            case DialTcp(address, port):
                return await trio.open_tcp_stream(address, port)
            case DialName(host, port) if host == NAME:
                return await trio.open_tcp_stream("127.0.0.1", port)
            case _:
                raise OpenRefused(ErrorCode.NOT_FOUND, "no such name")


@dataclass
class Tunnel:
    port: int
    guest: Guest
    agent: trio.CancelScope
    """Cancelled, the host agent is gone as after a SIGKILL."""
    start_agent: Callable[[], Awaitable[None]]
    ended: trio.Event

    async def client(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def answers(self, *said: bytes) -> bytes:
        """All that a client hears that says this, and then is done."""
        async with await self.client() as client:
            for piece in said:
                await client.send_all(piece)
            await client.send_eof()
            return await everything(client)


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


@contextmanager
def locked(paths: InstancePaths) -> Iterator[None]:
    """As a keeper does it: the instance lives."""
    with open(paths.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def answers(guest: Guest) -> Answers:
    """A host agent that is asked for streams only."""

    def unasked(*arguments: object) -> object:
        raise AssertionError(arguments)

    return Answers(**{each.name: guest.dial if each.name == "dial" else unasked for each in fields(Answers)})  # type: ignore[arg-type]


def descriptors() -> set[str]:
    return set(os.listdir("/dev/fd"))


@asynccontextmanager
async def tunnelled(paths: InstancePaths) -> AsyncIterator[Tunnel]:
    """``agentctl tunnel``, in this process. In the end no descriptor is left."""
    before = descriptors()
    guest = Guest()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            scopes: list[trio.CancelScope] = []

            async def run_agent(task_status: trio.TaskStatus[None]) -> None:
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    await ApiServer(paths.agent_socket, answers(guest), EventLog()).run(task_status)

            async def start_agent() -> None:
                await nursery.start(run_agent)

            await start_agent()
            port, ready, ended = free_port(), trio.Event(), trio.Event()

            async def run() -> None:
                await tunnel.run(paths, port, ready.set)
                ended.set()

            nursery.start_soon(run)
            await ready.wait()
            yield Tunnel(port, guest, scopes[0], start_agent, ended)
            nursery.cancel_scope.cancel()
    assert not descriptors() - before  # others of this process may have been closed meanwhile


@asynccontextmanager
async def server(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    async def connected(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await serve(stream)

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, connected, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def web(stream: trio.SocketStream) -> None:
    said = b""
    while b"\r\n\r\n" not in said:
        said += await stream.receive_some()
    await stream.send_all(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize(
    ("option", "host", "dialled"),
    [
        ("--socks5", "127.0.0.1", DialTcp),
        ("--socks5-hostname", NAME, DialName),
    ],
)
async def test_curl(instance: InstancePaths, option: str, host: str, dialled: type[Target]) -> None:
    async with tunnelled(instance) as running, server(web) as port:
        proxy = [option, f"localhost:{running.port}", "--noproxy", ""]
        done = await trio.run_process(
            ["curl", "-sS", "--max-time", "10", *proxy, f"http://{host}:{port}/"],
            capture_stdout=True,
        )
        assert done.stdout == b"hello\n"
        assert [type(target) for target in running.guest.dialled] == [dialled]


async def test_both_ways_with_half_close(instance: InstancePaths) -> None:
    payload = os.urandom(3_000_000)
    async with tunnelled(instance) as running, server(echo) as port, await running.client() as client:
        await client.send_all(HELLO)
        assert await client.receive_some() == WELCOME
        await client.send_all(to_ipv4(port))
        assert await client.receive_some() == reply(ReplyCode.SUCCEEDED)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await client.send_all(payload)
                await client.send_eof()

            nursery.start_soon(send)
            assert await everything(client) == payload


async def test_what_is_said_at_once_arrives_in_order(instance: InstancePaths) -> None:
    async with tunnelled(instance) as running, server(echo) as port:
        heard = await running.answers(HELLO + to_name(port) + b"first", b"second")
    assert heard == WELCOME + reply(ReplyCode.SUCCEEDED) + b"firstsecond"


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OpenRefused(ErrorCode.REFUSED, "refused"), ReplyCode.REFUSED),
        (OpenRefused(ErrorCode.TIMEOUT, "silence"), ReplyCode.HOST_UNREACHABLE),
        (OpenRefused(ErrorCode.NOT_FOUND, "no name"), ReplyCode.HOST_UNREACHABLE),
        (LinkError("the guest agent is gone"), ReplyCode.HOST_UNREACHABLE),
        (OpenRefused(ErrorCode.INTERNAL, "oh"), ReplyCode.FAILURE),
    ],
)
async def test_a_refusal_is_told(instance: InstancePaths, failure: Exception, code: ReplyCode) -> None:
    async with tunnelled(instance) as running:
        running.guest.failure = failure
        assert await running.answers(HELLO, to_ipv4(80)) == WELCOME + reply(code)


async def test_what_is_no_request_is_answered_and_hung_up_on(instance: InstancePaths) -> None:
    async with tunnelled(instance) as running:
        assert await running.answers(b"GET / HTTP/1.1\r\n\r\n") == b""
        bind = b"\x05\x02\x00\x01" + bytes(6)
        assert await running.answers(HELLO, bind) == WELCOME + reply(ReplyCode.COMMAND_NOT_SUPPORTED)
        assert await running.answers(b"\x05\x01\x02") == b"\x05\xff"
        assert running.guest.dialled == []


async def test_a_client_that_says_nothing_is_left(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "NEGOTIATION_TIME", 0.05)
    async with tunnelled(instance) as running, await running.client() as client:
        await client.send_all(HELLO[:1])
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()


async def test_a_reset_behind_the_proxy_is_one_before_it(instance: InstancePaths) -> None:
    async def reset(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    async with tunnelled(instance) as running, server(reset) as port, await running.client() as client:
        await client.send_all(HELLO + to_ipv4(port))
        with pytest.raises(trio.BrokenResourceError):
            while await client.receive_some():
                pass


async def test_a_full_house_waits(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "MAX_CONNECTIONS", 3)  # one of which ::1 waits with
    async with tunnelled(instance) as running, server(echo) as port:
        first, second = await running.client(), await running.client()
        async with first, second:
            for client in (first, second):
                await client.send_all(HELLO)
                assert await client.receive_some() == WELCOME
            third = await running.client()
            await third.send_all(HELLO + to_ipv4(port) + b"third")
            await third.send_eof()
            with trio.move_on_after(0.05) as scope:
                await third.receive_some()
            assert scope.cancelled_caught
            await first.aclose()
            async with third:
                assert (await everything(third)).endswith(b"third")


async def test_a_host_agent_that_is_killed_is_waited_for(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "is_locked", lambda path: True)
    async with tunnelled(instance) as running, server(echo) as port:
        async with await running.client() as client:
            await client.send_all(HELLO + to_ipv4(port))
            while await client.receive_some() != reply(ReplyCode.SUCCEEDED):
                pass
            running.agent.cancel()
            with pytest.raises(trio.BrokenResourceError):  # what was carried is reset
                await client.receive_some()
        async with await running.client() as waiting:
            await waiting.send_all(HELLO + to_ipv4(port) + b"later")
            await waiting.send_eof()
            assert await waiting.receive_some() == WELCOME
            await running.start_agent()
            assert (await everything(waiting)).endswith(b"later")


async def test_the_end_of_the_instance_is_ours(instance: InstancePaths) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with tunnelled(instance) as running:
            running.agent.cancel()
            await trio.sleep_forever()
    found = caught.value.split(UserError)[0]
    assert found is not None
    error: BaseException = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    assert error.exit_code is ExitCode.NOT_RUNNING


async def test_an_interrupt_ends_it_with_all_that_it_carried(instance: InstancePaths) -> None:
    async with tunnelled(instance) as running, server(echo) as port, await running.client() as client:
        await client.send_all(HELLO + to_ipv4(port))
        while await client.receive_some() != reply(ReplyCode.SUCCEEDED):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        await running.ended.wait()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        with pytest.raises(OSError):
            await running.client()


async def test_the_command_ends_in_good_order(instance: InstancePaths) -> None:
    """As a user meets it: a process, and Ctrl-C."""
    with trio.fail_after(30), locked(instance):
        async with tunnelled(instance), server(echo) as port, trio.open_nursery() as nursery:
            listens = free_port()
            command = [sys.executable, "-m", "host_agent", "tunnel", "--port", str(listens)]
            run = partial(trio.run_process, command, cwd=REPOSITORY, capture_stderr=True, check=False)
            process = await nursery.start(run)
            while True:
                try:
                    client = await trio.open_tcp_stream("127.0.0.1", listens)
                    break
                except OSError:
                    await trio.sleep(0.02)
            async with client:
                await client.send_all(HELLO + to_ipv4(port) + b"hello")
                await client.send_eof()
                assert (await everything(client)).endswith(b"hello")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0


async def test_a_client_that_leaves_while_it_waits_costs_nothing(instance: InstancePaths) -> None:
    async with tunnelled(instance) as running, server(echo) as port:
        running.guest.hangs = True
        async with await running.client() as client:
            await client.send_all(HELLO + to_ipv4(port))
            while not running.guest.dialled:
                await trio.sleep(0.005)
        running.guest.hangs = False
        assert (await running.answers(HELLO + to_ipv4(port), b"on")).endswith(b"on")


async def test_a_taken_port_is_said(instance: InstancePaths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            tunnel.listen(port)
    assert caught.value.exit_code is ExitCode.BUSY
    assert str(port) in caught.value.message
    assert "--port" in caught.value.hint
