"""Whether containerd answers, and its socket on the host, with a guest that a test scripts."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent.containerd import SOCKET, containerd_forwarder, wait_until_ready
from protocol.api import Target
from protocol.errors import ErrorCode, LinkError, OpenRefused

SETTINGS = bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + bytes(6)


class Guest:
    """Plays one answer per connection, the last one for all that follow."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self._answers = list(answers)
        self.heard: list[bytes] = []

    async def dial(self, target: Target) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        assert target == SOCKET
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(answer)
        await theirs.send_eof()
        trio.lowlevel.spawn_system_task(self._hear, theirs)
        return ours

    async def _hear(self, stream: trio.StapledStream) -> None:  # type: ignore[type-arg]
        with contextlib.suppress(trio.BrokenResourceError):
            self.heard.append(bytes(await stream.receive_some()))


@pytest.mark.parametrize(
    "before",
    [
        LinkError("no guest yet"),
        OpenRefused(ErrorCode.NOT_FOUND, "no socket yet"),
        b"",
        SETTINGS[:5],
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
async def test_it_is_waited_for_until_it_greets(
    autojump_clock: trio.testing.MockClock, before: bytes | Exception
) -> None:
    guest = Guest(before, before, SETTINGS)
    assert await wait_until_ready(guest.dial, 60)
    assert guest.heard[-1].startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


async def test_one_that_never_does_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    assert not await wait_until_ready(Guest(b"no").dial, 5)


async def test_its_socket_is_on_the_host(folder: Path, nursery: trio.Nursery) -> None:
    guest = Guest(SETTINGS)
    path = folder / "containerd.sock"
    await nursery.start(containerd_forwarder(path, guest.dial).run)
    async with await trio.open_unix_socket(str(path)) as client:
        await client.send_all(b"hello")
        assert await client.receive_some(100) == SETTINGS
