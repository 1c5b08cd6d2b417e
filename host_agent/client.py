"""The command line's connection to an instance's host agent."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from host_agent import state
from host_agent.agent_contact import RESTART_TIME as RESTART_TIME
from host_agent.agent_contact import ConnectionLost as ConnectionLost
from host_agent.agent_contact import hello as hello
from host_agent.agent_contact import lost, not_running
from host_agent.groups import collapsed
from host_agent.paths import InstancePaths
from protocol.api import Forward, GetForwards
from protocol.errors import LinkClosed, LinkError
from protocol.link import Link, Service
from protocol.session import Role


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
        raise lost(paths, error) from None


async def all_forwards(link: Link, *, owners: bool = False) -> list[Forward]:
    """The whole table of forwards, which may be longer than one answer; with ``owners``, who listens, too.

    Raises ``RpcError``, ``LinkError``.
    """
    rows: list[Forward] = []
    while True:
        piece = await link.request(GetForwards(len(rows), owners))
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
