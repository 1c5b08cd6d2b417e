from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from guest_agent import dial
from guest_agent.dial import error_code
from protocol.api import DialTcp, DialUnix, Target
from protocol.errors import ErrorCode, OpenRefused, StreamReset
from protocol.link import Link, MuxStream


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


def unused_port() -> int:
    with socket.socket() as unlistened:
        unlistened.bind(("127.0.0.1", 0))
        port: int = unlistened.getsockname()[1]
        return port


async def refusal(host: Link, target: Target) -> OpenRefused:
    with pytest.raises(OpenRefused) as caught:
        await host.open(target)
    return caught.value


async def test_nobody_listens(host: Link, tmp_path: Path) -> None:
    port = unused_port()
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
