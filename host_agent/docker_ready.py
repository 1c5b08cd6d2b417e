"""Whether dockerd answers, asked the way the user's docker CLI will: over the forwarded socket."""

from __future__ import annotations

import trio

from host_agent.forwarders import Dial
from protocol.api import DialUnix
from protocol.errors import AgentctlProtocolError

#: Where dockerd listens in the guest.
DOCKER_SOCKET = DialUnix("/run/docker.sock")

#: dockerd starts in 1 s with KVM and in 10-40 s under emulation on a busy machine. systemd gives up earlier.
START_TIME = 300.0

_PING = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"
_RETRY_DELAY = 0.25
_ANSWER_TIME = 60.0

#: Bytes in which the status line must end; it has 17, and the guest is not trusted with our memory.
MAX_ANSWER = 4096


async def wait_until_ready(dial: Dial, timeout: float = START_TIME) -> bool:
    """Whether dockerd answered a ping within ``timeout`` seconds."""
    with trio.move_on_after(timeout):
        while not await _answers(dial):
            await trio.sleep(_RETRY_DELAY)
        return True
    return False


async def _answers(dial: Dial) -> bool:
    # systemd holds the socket: a connection made before dockerd runs waits in its backlog.
    with trio.move_on_after(_ANSWER_TIME):
        try:
            stream = await dial(DOCKER_SOCKET)
            async with stream:
                await stream.send_all(_PING)
                answer = b""
                while b"\r\n" not in answer and len(answer) < MAX_ANSWER:
                    data = await stream.receive_some(MAX_ANSWER - len(answer))
                    if not data:
                        break
                    answer += bytes(data)
                return answer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))
        except (AgentctlProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
    return False
