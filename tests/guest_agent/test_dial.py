from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from guest_agent import dial
from guest_agent.dial import error_code
from protocol import codec
from protocol.api import DialName, DialTcp, DialUnix, Target
from protocol.errors import ErrorCode, LocalProtocolError, OpenRefused, StreamReset
from protocol.link import Hello, Incoming, Link, MuxStream, Role, Service
from protocol.pump import Pump
from protocol.serial import SocketPort
from tests.free_ports import free_port


@asynccontextmanager
async def dialled(
    host: Link, address: str = "127.0.0.1"
) -> AsyncIterator[tuple[MuxStream, trio.SocketStream]]:
    """A stream to a server in "the guest", and the server's end of the connection."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        stream = await host.open(DialTcp(address, listener.getsockname()[1]))
        accepted, _ = listener.accept()
    accepted.setblocking(False)
    async with stream, trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as served:
        yield stream, served


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_both_ways_with_half_close(host: Link, address: str) -> None:
    async with dialled(host, address) as (stream, served):
        await stream.send_all(b"question")
        await stream.send_eof()
        assert await everything(served) == b"question"

        async def answer() -> None:
            await served.send_all(b"answer" * 50_000)
            await served.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)  # more than all buffers on the way hold
            assert await everything(stream) == b"answer" * 50_000


async def test_a_server_that_half_closes_still_hears(host: Link) -> None:
    async with dialled(host) as (stream, served):
        await served.send_eof()
        assert await everything(stream) == b""
        await stream.send_all(b"still here")
        await stream.send_eof()
        assert await everything(served) == b"still here"


async def test_a_reset_of_the_server_resets_the_stream(host: Link) -> None:
    async with dialled(host) as (stream, served):
        served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await served.aclose()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, StreamReset)
        assert caught.value.__cause__.code is ErrorCode.RESET


async def test_a_reset_of_the_stream_resets_the_server(host: Link) -> None:
    async with dialled(host) as (stream, served):
        await stream.reset(ErrorCode.RESET, "the client reset")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await served.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_the_loss_of_the_link_resets_the_server(nursery: trio.Nursery, host: Link) -> None:
    async with dialled(host) as (_, served):
        await host.goodbye("test")
        with pytest.raises(trio.BrokenResourceError):
            await served.receive_some()


async def test_a_server_that_does_not_read_stops_the_host_from_sending(host: Link) -> None:
    async with dialled(host) as (stream, _):
        payload = os.urandom(12 * 1024 * 1024)
        with trio.move_on_after(0.5) as scope:
            await stream.send_all(payload)
        assert scope.cancelled_caught


async def test_a_unix_socket(host: Link, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        async with await host.open(DialUnix(path)) as stream:
            served, _ = listener.accept()
            with served:
                served.sendall(b"hello")
            assert await everything(stream) == b"hello"
            await stream.send_eof()


async def refusal(host: Link, target: Target) -> OpenRefused:
    with pytest.raises(OpenRefused) as caught:
        await host.open(target)
    return caught.value


async def test_nobody_listens(host: Link, tmp_path: Path) -> None:
    port = free_port()
    refused = await refusal(host, DialTcp("127.0.0.1", port))
    assert refused.code is ErrorCode.REFUSED
    assert refused.message == f"127.0.0.1 port {port}: Connection refused"
    assert (await refusal(host, DialUnix(str(tmp_path / "none")))).code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize(
    "target",
    [
        DialTcp("localhost", 80),
        DialTcp("", 80),
        DialTcp("127.0.0.1", 0),
        DialTcp("127.0.0.1", 70000),
        DialTcp("127.0.0.1", -1),
        DialTcp("::g", 80),
        DialUnix("relative"),
        DialUnix("/a\0b"),
        DialUnix("/" + "x" * 200),
    ],
)
async def test_what_cannot_be_dialled_is_invalid(host: Link, target: Target) -> None:
    assert (await refusal(host, target)).code in (ErrorCode.INVALID, ErrorCode.INTERNAL)


async def test_a_server_that_does_not_answer_times_out(host: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.05)

    async def never(target: DialTcp) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(dial, "connect_tcp", never)
    assert (await refusal(host, DialTcp("127.0.0.1", 1))).code is ErrorCode.TIMEOUT


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ECONNREFUSED, ErrorCode.REFUSED),
        (errno.ENOENT, ErrorCode.NOT_FOUND),
        (errno.EHOSTUNREACH, ErrorCode.UNREACHABLE),
        (errno.ENETUNREACH, ErrorCode.UNREACHABLE),
        (errno.EACCES, ErrorCode.DENIED),
        (errno.EMFILE, ErrorCode.LIMIT),
        (errno.EIO, ErrorCode.INTERNAL),
    ],
)
def test_what_a_failed_connect_means(number: int, code: ErrorCode) -> None:
    assert error_code(OSError(number, "")) is code


# --- at once ---------------------------------------------------------------------------------------


class Guest:
    """A link over a socket whose guest dials, and a diary of what could be dialled at once."""

    def __init__(self) -> None:
        self.at_once: list[bool] = []
        pair = socket.socketpair()
        for end in pair:
            end.setblocking(False)
        ours, theirs = [SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in pair]
        service = Service()
        service.on_stream(DialTcp, dial.dial_tcp, self._dial)
        self.host = Link(ours, Role.HOST, Service(), Hello())
        self.link = Link(theirs, Role.GUEST, service, Hello())

    def _dial(self, target: DialTcp, incoming: Incoming) -> bool:
        self.at_once.append(dial.dial_tcp_at_once(target, incoming))
        return self.at_once[-1]


def descriptors() -> set[str]:
    return set(os.listdir("/dev/fd"))


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    """In the end all streams are over, and no descriptor is left."""
    before = descriptors()
    guest = Guest()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for link in (guest.host, guest.link):
                    starting.start_soon(nursery.start, link.run)
            yield guest
            while guest.link._streams or guest.host._streams:
                await trio.sleep(0.001)
            assert guest.link._serving.idle
            assert set(guest.link.lane._watched) == {guest.link._transport.fileno()}  # type: ignore[attr-defined]
            await guest.host.goodbye()
    assert descriptors() == before


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_server_of_this_machine_is_connected_to_at_once(guest: Guest, address: str) -> None:
    async with dialled(guest.host, address) as (stream, served):
        assert guest.link._serving.idle, "no task is needed"
        assert served.socket.getpeername()[0] == address
        await stream.send_all(b"question")
        await stream.send_eof()
        assert await everything(served) == b"question"
        await served.send_all(b"answer")
        await served.send_eof()
        assert await everything(stream) == b"answer"
    assert guest.at_once == [True]


async def test_what_is_connected_at_once_sends_without_delay(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Noting(Pump):
        def __init__(self, stream: MuxStream, connection: socket.socket, *rest: Any) -> None:
            seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            assert not connection.getblocking()
            assert not connection.get_inheritable()
            super().__init__(stream, connection, *rest)

    monkeypatch.setattr(dial, "Pump", Noting)
    async with dialled(guest.host):
        assert seen == [1]


async def test_what_is_refused_at_once_is_refused_by_the_task(guest: Guest) -> None:
    port = free_port()
    refused = await refusal(guest.host, DialTcp("127.0.0.1", port))
    assert (refused.code, refused.message) == (
        ErrorCode.REFUSED,
        f"127.0.0.1 port {port}: Connection refused",
    )
    assert guest.at_once == [False]


async def test_what_is_unreachable_is_refused_by_the_task(guest: Guest) -> None:
    """Without a route to it, or not without SO_BROADCAST."""
    refused = await refusal(guest.host, DialTcp("255.255.255.255", 80))
    assert refused.code in (ErrorCode.UNREACHABLE, ErrorCode.DENIED)
    assert guest.at_once == [False]


@contextmanager
def full(port: int = 0) -> Iterator[socket.socket]:
    """A server whose backlog is full: it answers nobody who comes now."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", port))
        server.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server


async def test_a_server_whose_backlog_is_full_is_waited_for_by_the_task(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.05)
    with full() as server:
        refused = await refusal(guest.host, DialTcp("127.0.0.1", server.getsockname()[1]))
    assert refused.code is ErrorCode.TIMEOUT
    assert guest.at_once == [False]


async def test_a_process_without_descriptors_refuses(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object, **options: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", exhausted)
        assert (await refusal(guest.host, DialTcp("127.0.0.1", 80))).code is ErrorCode.LIMIT
    assert guest.at_once == [False]


async def test_a_server_that_resets_meanwhile_leaves_nothing_behind(guest: Guest) -> None:
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as server:
            stream = await guest.host.open(DialTcp("127.0.0.1", server.getsockname()[1]))
        with pytest.raises(trio.BrokenResourceError) as caught:  # the one in the backlog is reset
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, StreamReset)
        await stream.aclose()
    assert guest.at_once == [True] * 100


async def test_a_host_that_resets_at_once_leaves_nothing_behind(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = DialTcp("127.0.0.1", server.getsockname()[1])
        for _ in range(100):
            stream = await guest.host.open(target)
            await stream.reset(ErrorCode.RESET, "test")
            server.accept()[0].close()
        for _ in range(100):
            await give_up(guest.host, target)


async def give_up(host: Link, target: DialTcp) -> None:
    """Open a stream and take it back before it was offered: both may come in one read."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.open, target)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            scope.cancel()


async def test_an_offer_that_is_taken_back_in_the_same_read_is_not_dialled(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        target = DialTcp("127.0.0.1", server.getsockname()[1])
        session = guest.host._running()
        for _ in range(3):
            number = session.open(target.KIND, codec.encode(target))
            session.reset(number, ErrorCode.CANCELLED)
        guest.host._flush()
        stream = await guest.host.open(target)  # in order, so after those
        await stream.aclose()
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert guest.at_once == [True]


def test_what_cannot_be_answered_any_more_is_closed() -> None:
    class Gone:
        def accept_now(self) -> MuxStream:
            raise LocalProtocolError("there is no stream 2")

    before = descriptors()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(LocalProtocolError):
            dial.dial_tcp_at_once(DialTcp("127.0.0.1", server.getsockname()[1]), Gone())  # type: ignore[arg-type]
    assert descriptors() == before


@pytest.mark.parametrize(
    "target",
    [
        DialTcp("localhost", 80),
        DialTcp("", 80),
        DialTcp("127.0.0.1", 0),
        DialTcp("127.0.0.1", 70000),
        DialTcp("127.0.0.1", -1),
        DialTcp("127.0.0.1\0", 80),
        DialTcp("::g", 80),
        DialTcp("::1%nothing", 80),
    ],
)
def test_what_cannot_be_dialled_is_left_to_the_task(target: DialTcp) -> None:
    class Unasked:
        def accept_now(self) -> MuxStream:
            raise AssertionError

    before = descriptors()
    assert not dial.dial_tcp_at_once(target, Unasked())  # type: ignore[arg-type]
    assert descriptors() == before


# --- names -----------------------------------------------------------------------------------------


def resolving(
    monkeypatch: pytest.MonkeyPatch, *addresses: str, failure: socket.gaierror | None = None
) -> list[str]:
    """Let every name mean ``addresses``; the names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(name: str, port: None, **options: object) -> list[tuple[Any, ...]]:
        asked.append(name)
        if failure is not None:
            raise failure
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in address], socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


async def test_a_name_of_the_guest(host: Link) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with await host.open(DialName("localhost", server.getsockname()[1])) as stream:
            served, _ = server.accept()
            with served:
                served.sendall(b"hello")
            assert await everything(stream) == b"hello"


async def test_the_address_that_answers_is_taken(host: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolving(monkeypatch, "::1", "127.0.0.2", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with await host.open(DialName("a.test", server.getsockname()[1])):
            server.accept()[0].close()
    assert asked == ["a.test"]


async def test_an_address_that_is_silent_does_not_use_up_the_time(
    host: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.4)
    with full() as silent:
        port = silent.getsockname()[1]
        resolving(monkeypatch, "127.0.0.1", "::1")
        with socket.create_server(("::1", port), family=socket.AF_INET6) as server:
            async with await host.open(DialName("a.test", port)):
                server.accept()[0].close()


async def test_a_name_whose_addresses_refuse_is_refused(host: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "::1", "127.0.0.1")
    assert (await refusal(host, DialName("a.test", free_port()))).code is ErrorCode.REFUSED


@pytest.mark.parametrize(
    ("number", "code"),
    [(socket.EAI_NONAME, ErrorCode.NOT_FOUND), (socket.EAI_AGAIN, ErrorCode.UNREACHABLE)],
)
async def test_a_name_that_leads_nowhere(
    host: Link, monkeypatch: pytest.MonkeyPatch, number: int, code: ErrorCode
) -> None:
    resolving(monkeypatch, failure=socket.gaierror(number, "Not known"))
    refused = await refusal(host, DialName("a.test", 80))
    assert (refused.code, refused.message) == (code, "a.test: Not known")


@pytest.mark.parametrize(
    "target", [DialName("a.test", 0), DialName("a.test", 65536), DialName("a" * 70 + ".test", 80)]
)
async def test_what_is_no_name_is_invalid(host: Link, target: DialName) -> None:
    assert (await refusal(host, target)).code is ErrorCode.INVALID


async def test_a_resolver_that_hangs_is_not_waited_for(host: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def hang(*arguments: object, **options: object) -> list[Any]:
        answered.wait(30)
        return []

    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert (await refusal(host, DialName("a.test", 80))).code is ErrorCode.TIMEOUT
    answered.set()
