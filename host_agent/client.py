"""The command line's connection to an instance's host agent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import trio

from host_agent import state
from host_agent.errors import ExitCode, UserError
from host_agent.groups import collapsed
from host_agent.paths import InstancePaths
from protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR, build
from protocol.api import Forward, GetForwards
from protocol.errors import ErrorCode, LinkClosed, LinkError
from protocol.link import Link, Service
from protocol.messages import Hello
from protocol.session import Role


class ConnectionLost(UserError):
    """The host agent went away while it was being talked to."""


#: A host agent that was killed is back within this time, seconds.
RESTART_TIME = 5.0


def hello(name: str) -> Hello:
    """How a process of this host introduces itself."""
    return Hello(
        major=PROTOCOL_MAJOR,
        minor=PROTOCOL_MINOR,
        digest=build.digest(),
        boot_id="",
        capabilities=[],
        name=f"{name}[{os.getpid()}]",
    )


@contextlib.asynccontextmanager
async def connected(
    paths: InstancePaths, service: Service | None = None, *, patience: float = 0.0
) -> AsyncIterator[Link]:
    """A session with the host agent of ``paths``.

    A host agent that does not answer yet is waited for up to ``patience`` seconds.

    Raises:
        UserError: nobody answers, or the session was lost while it was used.
    """
    transport = await _open(paths, patience)
    used = False

    async def live(task_status: trio.TaskStatus[Link]) -> None:
        await link.run(task_status)
        if not used:
            # In good order, as after a SIGKILL between two frames; but somebody still waits for answers.
            raise LinkClosed("the host agent has ended")

    try:
        with collapsed():
            async with trio.open_nursery() as nursery:
                link = Link(transport, Role.CLIENT, service or Service(), hello("agentctl"))
                await nursery.start(live)
                yield link
                used = True
                nursery.cancel_scope.cancel()
    except LinkError as error:
        raise _lost(paths, error) from None


async def all_forwards(link: Link) -> list[Forward]:
    """The whole table of forwards, which may be longer than one answer. Raises ``RpcError``, ``LinkError``."""
    rows: list[Forward] = []
    while True:
        piece = await link.request(GetForwards(len(rows)))
        rows += piece.forwards
        if not piece.forwards or len(rows) >= piece.total:
            return rows


async def _open(paths: InstancePaths, patience: float) -> trio.abc.Stream:
    deadline = trio.current_time() + patience
    while True:
        try:
            return await trio.open_unix_socket(str(paths.agent_socket))
        except OSError:
            # Without a holder of the lock there is nobody who could start to answer.
            if trio.current_time() >= deadline or not state.is_locked(paths.lock):
                raise not_running(paths) from None
            await trio.sleep(0.05)


def not_running(paths: InstancePaths) -> UserError:
    return UserError(f"instance {paths.name} is not running", "start it: agentctl up", ExitCode.NOT_RUNNING)


def _lost(paths: InstancePaths, error: LinkError) -> UserError:
    if error.code is ErrorCode.VERSION:
        return UserError(
            f"the running instance is of another version of agentctl: {error}",
            "restart it: agentctl stop --force, then agentctl up",
        )
    return ConnectionLost(
        f"the connection to instance {paths.name} was lost: {error}", "see: agentctl status"
    )
