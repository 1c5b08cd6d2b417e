from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
import trio

from protocol.api import DialUdp
from protocol.datagram_stream import DatagramStream
from protocol.datagrams import MAX_DATAGRAM, DatagramReader, encode
from protocol.errors import ErrorCode, OpenRefused, StreamReset
from protocol.link import Link
from protocol.muxstream import MuxStream
from tests.descriptors import open_descriptors


@pytest.fixture
async def server() -> AsyncIterator[trio.socket.SocketType]:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        yield sock


def descriptors() -> int:
    return len(open_descriptors())


async def until_reset(stream: MuxStream) -> StreamReset:
    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError) as broken:
        while True:
            await stream.receive_some()
    assert isinstance(broken.value.__cause__, StreamReset)
    return broken.value.__cause__


async def test_there_and_back(host: Link, server: trio.socket.SocketType) -> None:
    stream = await host.open(DialUdp(*server.getsockname()))
    await stream.send_all(encode([b"one", b"", b"x" * 9000]))
    with trio.fail_after(5):
        for expected in (b"one", b"", b"x" * 9000):
            asked, sender = await server.recvfrom(65536)
            assert asked == expected
            await server.sendto(asked, sender)
        reader, answers = DatagramReader(), []
        while len(answers) < 3:
            answers += reader.receive_data(await stream.receive_some())
    assert answers == [b"one", b"", b"x" * 9000]
    await stream.aclose()


async def test_nobody_there_is_a_reset(host: Link) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    stream = await host.open(DialUdp("127.0.0.1", port))
    await stream.send_all(encode([b"anybody?"]))
    assert (await until_reset(stream)).code is ErrorCode.REFUSED
    await stream.aclose()


async def test_what_no_datagram_can_be_is_an_error_of_the_stream_alone(
    host: Link, server: trio.socket.SocketType
) -> None:
    bad = await host.open(DialUdp(*server.getsockname()))
    good = await host.open(DialUdp(*server.getsockname()))
    await bad.send_all((MAX_DATAGRAM + 1).to_bytes(2, "big"))
    assert (await until_reset(bad)).code is ErrorCode.PROTOCOL
    await good.send_all(encode([b"still here"]))
    with trio.fail_after(5):
        assert await server.recv(100) == b"still here"
    await bad.aclose()
    await good.aclose()


@pytest.mark.parametrize("target", [DialUdp("localhost", 53), DialUdp("127.0.0.1", 0), DialUdp("", 53)])
async def test_what_cannot_be_dialled_is_refused(host: Link, target: DialUdp) -> None:
    with pytest.raises(OpenRefused) as refused:
        await host.open(target)
    assert refused.value.code is ErrorCode.INVALID


async def test_the_end_of_a_stream_is_the_end_of_its_socket(
    host: Link, server: trio.socket.SocketType
) -> None:
    before = descriptors()
    for ending in (MuxStream.send_eof, MuxStream.aclose):
        stream = await host.open(DialUdp(*server.getsockname()))
        await stream.send_all(encode([b"a"]))
        with trio.fail_after(5):
            await server.recv(9)
            assert descriptors() == before + 1
            await ending(stream)
            while descriptors() > before:
                await trio.sleep(0.005)
        await stream.aclose()


async def test_what_the_host_does_not_read_is_dropped_and_not_kept(
    host: Link, server: trio.socket.SocketType
) -> None:
    stream = await host.open(DialUdp(*server.getsockname()))
    await stream.send_all(encode([b"send"]))
    with trio.fail_after(10):
        _, client = await server.recvfrom(9)
        for _ in range(400):
            await server.sendto(bytes(8000), client)
        await trio.sleep(0.1)
        # The host reads nothing: what waits for credit is one batch at the most.
        seen: list[bytes] = []
        ended = trio.Event()
        DatagramStream(stream, seen.append, ended.set).start()
        await trio.sleep(0.1)
        before = len(seen)
        assert 0 < before < 400
        assert set(seen) == {bytes(8000)}
        await server.sendto(b"after", client)
        while seen[-1] != b"after":
            await trio.sleep(0.005)
    await stream.aclose()
