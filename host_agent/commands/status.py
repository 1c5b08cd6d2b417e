"""``status``: an instance that runs as its host agent tells it, one that does not as it was left.

The law: it is quick, since prompts and scripts ask it, so it imports neither trio nor what starts an instance.
"""

from __future__ import annotations

import sys
import time

import click

from host_agent import show_json, state
from host_agent.agent_contact import RESTART_TIME, ConnectionLost
from host_agent.asking import ask
from host_agent.commands.common import current_instance, json_option
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from protocol.api import GetStatus, InstanceStatus, Stage


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show the instance: state, resources, addresses.

    Exit status 0 if it runs, 6 if it does not.
    """
    current = status_of(current_instance())
    if as_json:
        show_json.status_json(current)
    else:
        from host_agent import show  # rich

        for warning in current.warnings:
            show.warning(warning)
        show.status(current)
    if current.stage in (Stage.STOPPED, Stage.FAILED):
        sys.exit(ExitCode.NOT_RUNNING)


def status_of(paths: InstancePaths) -> InstanceStatus:
    """As its host agent tells it, or as it was left.

    Raises ``UserError`` for one that does not answer, or whose configuration is damaged.
    """
    deadline = time.monotonic() + RESTART_TIME
    while state.is_locked(paths.lock):
        try:
            return ask(paths, GetStatus())
        except ConnectionLost:
            # It ended while it was asked: it has a successor, or is not locked for long any more.
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
        except UserError:
            if state.is_locked(paths.lock):
                raise
    from host_agent import at_rest  # reads the configuration, which one that runs has done

    return at_rest.status(paths)
