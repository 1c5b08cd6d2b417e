"""Whether dockerd answers, asked the way the user's docker CLI will: over the forwarded socket."""

from __future__ import annotations

import trio

from host_agent.forwarders import Dial
from host_agent.guest_answers import START_TIME, wait_until_answered
from protocol.api import DialUnix

#: Where dockerd listens in the guest.
DOCKER_SOCKET = DialUnix("/run/docker.sock")

_PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"

#: Bytes in which the status line must end; it has 17, and the guest is not trusted with our memory.
MAX_ANSWER = 4096


async def wait_until_ready(dial: Dial, timeout: float = START_TIME) -> bool:
    """Whether dockerd answered a ping within ``timeout`` seconds."""
    return await wait_until_answered(dial, DOCKER_SOCKET, _ping, timeout)


async def _ping(stream: trio.abc.Stream) -> bool:
    await stream.send_all(_PING)
    answer = b""
    while b"\r\n" not in answer and len(answer) < MAX_ANSWER:
        data = await stream.receive_some(MAX_ANSWER - len(answer))
        if not data:
            break
        answer += bytes(data)
    return answer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))
