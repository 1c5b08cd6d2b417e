from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
import trio.testing

from host_agent import docker_ready
from host_agent.docker_ready import wait_until_ready
from protocol.api import DialUnix, Target
from protocol.errors import ErrorCode, LinkError, OpenRefused

Answer = Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]


class Dockerd:
    """Plays one answer per connection, the last one for all that follow."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self._answers = list(answers)
        self.connections = 0
        self.streams: list[trio.abc.Stream] = []
        self.nursery: trio.Nursery

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        assert target == DialUnix("/run/docker.sock")
        answer = self._answers[min(self.connections, len(self._answers) - 1)]
        self.connections += 1
        if isinstance(answer, Exception):
            raise answer
        ours, theirs = trio.testing.memory_stream_pair()
        self.streams.append(theirs)
        self.nursery.start_soon(answer, ours)
        return theirs

    async def asked(self, timeout: float) -> bool:
        async with trio.open_nursery() as self.nursery:
            ready = await wait_until_ready(self.dial, timeout)
            self.nursery.cancel_scope.cancel()
        return ready


def saying(*parts: bytes) -> Answer:
    async def answer(stream: trio.abc.HalfCloseableStream) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += await stream.receive_some()
        assert request.startswith(b"GET /_ping HTTP/1.1\r\nHost: ")
        for part in parts:
            await stream.send_all(part)
            await trio.sleep(0.01)
        await stream.aclose()

    return answer


async def silent(stream: trio.abc.HalfCloseableStream) -> None:
    await trio.sleep_forever()


async def closing(stream: trio.abc.HalfCloseableStream) -> None:
    await stream.aclose()


async def endless(stream: trio.abc.HalfCloseableStream) -> None:
    """A status line that has no end, of which only the beginning is read."""
    with suppress(trio.BrokenResourceError):
        for _ in range(100):
            await stream.send_all(b"HTTP/1.1 404" * 100)
        await trio.sleep_forever()


OK = saying(b"HTTP/1.1 200 OK\r\n\r\nOK")


@pytest.mark.parametrize("parts", [(b"HTTP/1.1 200 OK\r\n\r\nOK",), (b"HT", b"TP/1.0 200", b" OK\r", b"\n")])
async def test_an_answer_is_an_answer_however_it_is_cut(
    autojump_clock: trio.testing.MockClock, parts: tuple[bytes, ...]
) -> None:
    dockerd = Dockerd(saying(*parts))
    assert await dockerd.asked(10)
    assert dockerd.connections == 1
    with pytest.raises(trio.ClosedResourceError):
        await dockerd.streams[0].send_all(b"x")


@pytest.mark.parametrize(
    "failure",
    [
        OpenRefused(ErrorCode.REFUSED, "connection refused"),
        LinkError("not reachable"),
        saying(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"),
        saying(b"HTTP/1.1 20"),
        closing,
        endless,
    ],
)
async def test_it_is_asked_until_it_answers(
    autojump_clock: trio.testing.MockClock, failure: Answer | Exception
) -> None:
    dockerd = Dockerd(failure, failure, OK)
    assert await dockerd.asked(10)
    assert dockerd.connections == 3


async def test_a_daemon_that_hangs_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    dockerd = Dockerd(silent, OK)
    assert await dockerd.asked(docker_ready.START_TIME)
    assert dockerd.connections == 2


@pytest.mark.parametrize("failure", [OpenRefused(ErrorCode.REFUSED, "no"), silent])
async def test_patience_has_an_end(
    autojump_clock: trio.testing.MockClock, failure: Answer | Exception
) -> None:
    began = trio.current_time()
    assert not await Dockerd(failure).asked(30)
    assert trio.current_time() - began == pytest.approx(30)
