"""Small writes that do not wait for a turn of the writer: the same bytes in the same order, sooner."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from protocol import codec
from protocol.files import MAX_FILES_PAYLOAD, GetAttributes, Write
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.messages import Call
from protocol.outlet import PROMPT_SIZE
from protocol.serial import SocketPort


def socket_pair() -> tuple[SocketPort, SocketPort]:
    one, other = socket.socketpair()
    return tuple(SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in (one, other))  # type: ignore[return-value]


class Reluctant(trio.abc.Stream):
    """Passes everything on; ``willing`` says whether it takes something at once. Notes how each piece went."""

    def __init__(self, stream: SocketPort) -> None:
        self._stream = stream
        self.willing = True
        self.ways: list[str] = []

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        if self.willing and self._stream.send_nowait(data):
            self.ways.append("at once")
            return True
        return False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.ways.append("by the writer")
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[Link, Reluctant, list[Call]]]:
    """A guest whose transport is reluctant, and the calls that reach its host (which answers each)."""
    one, other = socket_pair()
    reluctant, service, heard = Reluctant(one), Service(), []
    options: dict[str, Any] = {"max_payload": MAX_FILES_PAYLOAD, "max_backlog": 1 << 28}
    guest = Link(reluctant, Role.GUEST, Service(), Hello(), **options)
    host = Link(other, Role.HOST, service, Hello(), **options)

    def on_call(call: Call) -> None:
        heard.append(call)
        host.answer(call.id, 0, [])

    service.on_call(on_call)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for link in (guest, host):
                starting.start_soon(nursery.start, link.run)
        await trio.testing.wait_all_tasks_blocked()
        reluctant.ways.clear()
        yield guest, reluctant, heard
        nursery.cancel_scope.cancel()


async def until(condition: Any) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


async def test_a_small_call_is_written_where_it_is_made() -> None:
    async with calling() as (guest, transport, heard):
        guest.call(GetAttributes(1, 2, 3), b"", lambda result: None)
        assert transport.ways == ["at once"]
        await until(lambda: heard)
        assert codec.decode(GetAttributes, heard[0].args) == GetAttributes(1, 2, 3)


async def test_what_the_transport_does_not_take_is_left_to_the_writer_in_order() -> None:
    async with calling() as (guest, transport, heard):
        transport.willing = False
        for unique in range(10):
            guest.call(GetAttributes(1, unique, 3), b"", lambda result: None)
            transport.willing = unique > 4
        await until(lambda: len(heard) == 10)
        assert [codec.decode(GetAttributes, call.args).unique for call in heard] == list(range(10))
        assert transport.ways[0] == "by the writer"
        await trio.testing.wait_all_tasks_blocked()
        guest.call(GetAttributes(1, 10, 3), b"", lambda result: None)
        assert transport.ways[-1] == "at once", "the writer rests again"


async def test_a_long_call_is_the_writers() -> None:
    async with calling() as (guest, transport, heard):
        payload = os.urandom(PROMPT_SIZE + 1)
        guest.call(Write(1, 2, 3, 0), payload, lambda result: None)
        guest.call(GetAttributes(1, 4, 3), b"", lambda result: None)
        await until(lambda: len(heard) == 2)
        assert heard[0].payload == payload
        assert "at once" not in transport.ways


async def test_a_goodbye_still_ends_a_link_that_writes_promptly() -> None:
    async with calling() as (guest, transport, _):
        transport.willing = False
        guest.call(GetAttributes(1, 2, 3), b"", lambda result: None)
        with trio.fail_after(20):
            await guest.goodbye()


async def test_a_socket_takes_a_piece_whole_or_not_at_all() -> None:
    one, other = socket_pair()
    piece = os.urandom(PROMPT_SIZE)
    count = 0
    while one.send_nowait(piece):
        count += 1
    received = b""
    while len(received) < count * len(piece):
        received += await other.receive_some()
    assert received == piece * count
    assert one.send_nowait(b"again")
    await other.aclose()
    with pytest.raises(trio.BrokenResourceError):
        one.send_nowait(b"nobody")
    with pytest.raises(trio.BrokenResourceError):
        await one.receive_some()
    await one.aclose()


async def test_a_session_on_a_port_sends_records_promptly() -> None:
    ends = socket_pair()
    channels = [SerialChannel(end) for end in ends]
    streams: list[Any] = [None, None]

    async def establish(index: int) -> None:
        streams[index] = await channels[index].establish()

    async with trio.open_nursery() as nursery:
        for index in range(2):
            nursery.start_soon(establish, index)
    one, other = streams
    assert one.send_nowait(b"first")
    await one.send_all(b"second")
    assert one.send_nowait(b"third")
    received = b""
    with trio.fail_after(20):
        while len(received) < 16:
            received += await other.receive_some()
    assert received == b"firstsecondthird"
    await one.aclose()
    with pytest.raises(trio.ClosedResourceError):
        one.send_nowait(b"over")
    for end in ends:
        await end.aclose()
