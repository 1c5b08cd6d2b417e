"""``list``: all instances of this user, side by side."""

from __future__ import annotations

from dataclasses import asdict, replace

import click
import trio

from host_agent import groups
from host_agent.commands.common import json_option
from host_agent.commands.status import status_of
from host_agent.errors import UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import InstanceStatus, Stage
from protocol.errors import AgentctlProtocolError

#: An instance that does not answer within this is said to do so, rather than holding up all the others, seconds.
ANSWER_TIME = 10.0


@click.command("list")
@json_option
def list_instances(as_json: bool) -> None:
    """Show all instances: those that run, and those that are stopped.

    The JSON is a list of what "status --json" prints of each.
    """
    from host_agent import show

    statuses = groups.run(_all, Home.find().instances())
    if as_json:
        show.as_json([asdict(status) for status in statuses])
    else:
        show.instances(statuses)


async def _all(instances: list[InstancePaths]) -> list[InstanceStatus]:
    statuses: dict[str, InstanceStatus] = {}

    async def ask(paths: InstancePaths) -> None:
        statuses[paths.name] = await _told(paths)

    async with trio.open_nursery() as nursery:
        for paths in instances:
            nursery.start_soon(ask, paths)
    return [statuses[paths.name] for paths in instances]


async def _told(paths: InstancePaths) -> InstanceStatus:
    """Its status; one that cannot be told is a row that says why."""
    try:
        with trio.fail_after(ANSWER_TIME):
            return await trio.to_thread.run_sync(status_of, paths, abandon_on_cancel=True)
    except trio.TooSlowError:
        return _failed(paths, "it does not answer", "end it: agentctl stop --force")
    except UserError as error:
        return _failed(paths, error.message, error.hint)
    except AgentctlProtocolError as error:
        return _failed(paths, str(error), "see: agentctl logs")


def _failed(paths: InstancePaths, detail: str, hint: str) -> InstanceStatus:
    from host_agent import at_rest, docker_context

    return replace(
        at_rest.without_agent(paths, Stage.FAILED, detail, hint),
        docker_socket=str(paths.docker_socket),
        docker_context=docker_context.context_name(paths.name),
    )
