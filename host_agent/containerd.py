"""containerd where it alone runs the containers: its socket on the host, and whether it answers there.

It speaks gRPC, which is HTTP/2: whoever greets it is greeted with SETTINGS (RFC 9113, 3.4), and nothing has to be
understood of what its clients say.
"""

from __future__ import annotations

from pathlib import Path

import trio

from host_agent.forwarders import Dial, UnixForwarder
from host_agent.guest_answers import START_TIME, wait_until_answered
from protocol.api import DialUnix

#: Where it listens in the guest.
SOCKET = DialUnix("/run/containerd/containerd.sock")

#: The client's preface and its empty SETTINGS: length (24 bits), type, flags, stream.
_SETTINGS = 4
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
_HEAD = 9


def containerd_forwarder(path: Path, dial: Dial) -> UnixForwarder:
    """Its socket at ``path``."""
    return UnixForwarder(path, SOCKET, dial)


async def wait_until_ready(dial: Dial, timeout: float = START_TIME) -> bool:
    """Whether it has answered within ``timeout`` seconds."""
    return await wait_until_answered(dial, SOCKET, _greet, timeout)


async def _greet(stream: trio.abc.Stream) -> bool:
    await stream.send_all(_GREETING)
    answer = b""
    while len(answer) < _HEAD and (data := await stream.receive_some(_HEAD - len(answer))):
        answer += bytes(data)
    return len(answer) == _HEAD and answer[3] == _SETTINGS
