"""Docker's socket on the host: forwarded to dockerd, but for requests that would bind a folder nobody shared.

The law: what a connection carries, and how it ends, is as if ``splice`` joined it with dockerd directly. A
refused request ends it in order: dockerd's side is told that the client has ended, says what it still has to
say, and then comes the refusal, so that it can never stand in the middle of another answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from host_agent import bind_sources
from host_agent.docker_ready import DOCKER_SOCKET
from host_agent.docker_requests import RequestFilter, refusal
from host_agent.forwarders import Dial, UnixForwarder
from protocol.errors import ErrorCode
from protocol.splice import abort

# Why a container may not have a source, or None if it may. Runs in a thread, since it may wait for a disk.
Check = Callable[[str], str | None]

# The name by which containers ask for Docker's socket.
OWN_SOCKET = "/var/run/docker.sock"

# Checks at once. A dead network filesystem holds its thread for as long as it likes, and those of the rest
# of the host agent (trio's default limiter has 40) must not wait for it.
MAX_CHECKS = 8

logger = logging.getLogger(__name__)


def docker_forwarder(
    path: Path, dial: Dial, shares: Callable[[], Iterable[bind_sources.Share]]
) -> UnixForwarder:
    """Docker's socket at ``path``. ``shares`` is asked at each bind, from a worker thread."""
    limiter = trio.CapacityLimiter(MAX_CHECKS)

    def check(source: str) -> str | None:
        if source == str(path):
            # Tools that start containers which use Docker themselves take it from DOCKER_HOST.
            return f"mounts denied: {source} is Docker's socket on the host; in the VM it is {OWN_SOCKET}"
        return bind_sources.refusal(source, shares())

    def checked(client: trio.SocketStream) -> CheckedClient:
        return CheckedClient(client, check, limiter)

    return UnixForwarder(path, DOCKER_SOCKET, dial, seen_as=checked)


class CheckedClient(trio.abc.HalfCloseableStream):
    """A client of Docker's socket, of which only those requests are heard that may go on.

    After a refusal it reads as ended; ``send_eof`` then says why, after all that dockerd has said.
    """

    def __init__(
        self, client: trio.abc.HalfCloseableStream, check: Check, limiter: trio.CapacityLimiter
    ) -> None:
        self._client = client
        self._check = check
        self._limiter = limiter
        self._filter = RequestFilter()
        self._ready = b""  # filtered, and more than was asked for
        self._refusal: str | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What goes on to dockerd; ``b""`` when the client has ended or was refused."""
        while not self._ready and self._refusal is None:
            data = await self._client.receive_some(max_bytes)
            self._ready = await self._filtered(bytes(data)) if data else self._filter.end()
            if not data:
                break
        if max_bytes is None or len(self._ready) <= max_bytes:
            data, self._ready = self._ready, b""
        else:
            data, self._ready = self._ready[:max_bytes], self._ready[max_bytes:]
        return data

    async def _filtered(self, data: bytes) -> bytes:
        output = self._filter.receive(data)
        passed = [output.data]
        while output.sources:
            self._refusal = await self._judge(output.sources)
            output = self._filter.decide(self._refusal is None)
            passed.append(output.data)
        return b"".join(passed)

    async def _judge(self, sources: Iterable[str]) -> str | None:
        for source in sources:
            refused = await trio.to_thread.run_sync(
                self._check, source, limiter=self._limiter, abandon_on_cancel=True
            )
            if refused is not None:
                logger.info("refused a bind: %s", refused)
                return refused
        return None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._client.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._client.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """dockerd has said all it has to say: now the refusal, if there is one, and the end."""
        if self._refusal is not None:
            await self._client.send_all(refusal(self._refusal))
        await self._client.send_eof()

    async def reset(self, code: ErrorCode, message: str) -> None:
        """Cut the client off, as ``splice`` would."""
        await abort(self._client, code, message)

    async def aclose(self) -> None:
        await self._client.aclose()
