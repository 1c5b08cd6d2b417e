from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from protocol.errors import ErrorCode
from protocol.splice import Spliced, abort, splice

Pair = tuple[trio.SocketStream, trio.SocketStream]


async def tcp_pair() -> Pair:
    """A real TCP connection over loopback: what is near us, and what is far."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = await trio.open_tcp_stream(*listener.getsockname())
        near, _ = listener.accept()
    near.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(near)), far


class Joined:
    """Two connections, spliced in the middle; ``left`` and ``right`` are the ends."""

    def __init__(self, left: trio.SocketStream, right: trio.SocketStream) -> None:
        self.left, self.right = left, right
        self.ended = trio.Event()
        self.result: Spliced | None = None

    async def run(self, a: trio.SocketStream, b: trio.SocketStream) -> None:
        self.result = await splice(a, b)
        self.ended.set()


@pytest.fixture
async def joined(nursery: trio.Nursery) -> AsyncIterator[Joined]:
    (a, left), (b, right) = await tcp_pair(), await tcp_pair()
    joined = Joined(left, right)
    nursery.start_soon(joined.run, a, b)
    async with left, right:
        yield joined


async def everything(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def test_a_half_close_passes_and_the_other_direction_lives_on(joined: Joined) -> None:
    await joined.left.send_all(b"question")
    await joined.left.send_eof()
    assert await everything(joined.right) == b"question"
    await joined.right.send_all(b"answer")
    await joined.right.send_eof()
    assert await everything(joined.left) == b"answer"
    await joined.ended.wait()
    assert joined.result == Spliced(a_to_b=8, b_to_a=6)


@pytest.mark.parametrize("from_left", [True, False])
async def test_a_reset_is_a_reset_on_the_other_side(joined: Joined, from_left: bool) -> None:
    source, sink = (joined.left, joined.right) if from_left else (joined.right, joined.left)
    await source.send_all(b"x")
    assert await sink.receive_some() == b"x"
    await abort(source, ErrorCode.RESET, "test")
    with pytest.raises(trio.BrokenResourceError) as caught:
        await sink.receive_some()
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    await joined.ended.wait()
    assert joined.result is not None
    assert "reset" in joined.result.error


async def test_a_slow_reader_slows_its_writer_and_loses_nothing(
    joined: Joined, nursery: trio.Nursery
) -> None:
    payload = os.urandom(16 * 1024 * 1024)
    sent = trio.Event()

    async def send() -> None:
        await joined.left.send_all(payload)
        await joined.left.send_eof()
        sent.set()

    nursery.start_soon(send)
    with trio.move_on_after(0.3):
        await sent.wait()
    assert not sent.is_set()
    assert await everything(joined.right) == payload


async def test_both_directions_at_once(joined: Joined, nursery: trio.Nursery) -> None:
    payload = os.urandom(4 * 1024 * 1024)

    async def send(stream: trio.SocketStream) -> None:
        await stream.send_all(payload)
        await stream.send_eof()

    nursery.start_soon(send, joined.left)
    nursery.start_soon(send, joined.right)
    assert await everything(joined.right) == payload
    assert await everything(joined.left) == payload
    await joined.ended.wait()
    assert joined.result == Spliced(len(payload), len(payload))


async def test_cancelled_both_sides_see_a_reset() -> None:
    (a, left), (b, right) = await tcp_pair(), await tcp_pair()
    async with left, right:
        with trio.move_on_after(0.01):
            await splice(a, b)
        for end in (left, right):
            with pytest.raises(trio.BrokenResourceError):
                await end.receive_some()


async def test_cancelled_while_closing_both_are_closed() -> None:
    (a, left), (b, right) = await tcp_pair(), await tcp_pair()

    class CancelledByClosing(trio.abc.SendStream):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None: ...

        async def wait_send_all_might_not_block(self) -> None: ...

        async def send_eof(self) -> None: ...

        async def aclose(self) -> None:
            scope.cancel()
            await trio.lowlevel.checkpoint()

    async with a, left, right:
        await left.send_eof()
        await right.send_eof()
        with trio.CancelScope() as scope:
            await splice(trio.StapledStream(CancelledByClosing(), a), b)
        assert scope.cancelled_caught
        assert b.socket.fileno() == -1


async def test_streams_with_a_reset_of_their_own_are_told_code_and_reason() -> None:
    told: list[tuple[ErrorCode, str]] = []

    class MuxLike(trio.abc.AsyncResource):
        closed = False

        async def reset(self, code: ErrorCode, message: str) -> None:
            told.append((code, message))
            await trio.lowlevel.checkpoint()

        async def aclose(self) -> None:
            self.closed = True
            await trio.lowlevel.checkpoint()

    stream = MuxLike()
    await abort(stream, ErrorCode.RESET, "connection reset")
    assert told == [(ErrorCode.RESET, "connection reset")]
    assert stream.closed


async def test_an_abort_that_hangs_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    class Hanging(trio.abc.AsyncResource):
        closed = False

        async def reset(self, code: ErrorCode, message: str) -> None:
            await trio.sleep_forever()

        async def aclose(self) -> None:
            self.closed = True
            await trio.lowlevel.checkpoint()

    stream = Hanging()
    await abort(stream, ErrorCode.RESET, "")
    assert stream.closed


async def test_a_bug_in_a_stream_is_not_hidden_and_both_are_closed() -> None:
    (a, left), (b, right) = await tcp_pair(), await tcp_pair()

    class Buggy(trio.abc.ReceiveStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            raise TypeError("a bug")

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async with left, right:
        with pytest.raises(ExceptionGroup) as caught:
            await splice(trio.StapledStream(a, Buggy()), b)
        assert caught.group_contains(TypeError)
        assert (a.socket.fileno(), b.socket.fileno()) == (-1, -1)
