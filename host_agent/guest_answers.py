"""Waiting until a server in the guest answers, whatever it speaks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from host_agent.forwarders import Dial
from protocol.api import DialUnix
from protocol.errors import AgentctlProtocolError

#: dockerd starts in 1 s with KVM and in 10-40 s under emulation on a busy machine. systemd gives up earlier.
START_TIME = 300.0

_RETRY_DELAY = 0.25
_ANSWER_TIME = 60.0

#: Asks over a new connection; whether the answer is a good one.
Ask = Callable[[trio.abc.Stream], Awaitable[bool]]


async def wait_until_answered(dial: Dial, socket: DialUnix, ask: Ask, timeout: float = START_TIME) -> bool:
    """Whether ``ask`` had a good answer at ``socket`` within ``timeout`` seconds."""
    with trio.move_on_after(timeout):
        while not await _answers(dial, socket, ask):
            await trio.sleep(_RETRY_DELAY)
        return True
    return False


async def _answers(dial: Dial, socket: DialUnix, ask: Ask) -> bool:
    # systemd may hold the socket: a connection made before the server runs waits in its backlog.
    with trio.move_on_after(_ANSWER_TIME):
        try:
            async with await dial(socket) as stream:
                return await ask(stream)
        except (AgentctlProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
    return False
