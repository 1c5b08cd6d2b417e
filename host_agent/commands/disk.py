"""``disk``: how large the VM's disk is, what of it this machine has to keep, and how to change that."""

from __future__ import annotations

from collections.abc import Callable

import click

from host_agent.commands.common import Size, current_instance, json_option
from host_agent.paths import InstancePaths
from protocol.api import Disk


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def disk(context: click.Context, as_json: bool) -> None:
    """Show the VM's disk: its size, what is used of it, and what it takes on this machine.

    It is as large as it may become; on this machine it takes what was written to it and not deleted.
    """
    context.obj = as_json
    if context.invoked_subcommand is None:
        from host_agent import disk_requests

        _answer(disk_requests.show, as_json)


@disk.command()
@click.argument("size", type=Size())
@json_option
def grow(size: int, as_json: bool) -> None:
    """Make the disk SIZE (like 80GiB) large, at once, also while the VM runs. It never shrinks."""
    from host_agent import disk_requests

    _answer(lambda paths: disk_requests.grow(paths, size), as_json)


@disk.command()
@json_option
def compact(as_json: bool) -> None:
    """Give back to this machine what the VM has deleted, as far as that has not happened by itself.

    To have Docker delete what it does not need: docker system prune.
    """
    from host_agent import disk_requests, disk_shown

    found = _answer(disk_requests.compact, as_json)
    if not _is_json(as_json):
        disk_shown.given_back(found)


def _answer(ask: Callable[[InstancePaths], Disk], as_json: bool) -> Disk:
    from host_agent import disk_shown
    from host_agent.remote import record

    paths = current_instance()
    record.refuse(paths, "an attached machine has no disk of agentctl's", "see: agentctl exec df")
    found = ask(paths)
    (disk_shown.disk_json if _is_json(as_json) else disk_shown.disk)(found)
    return found


def _is_json(as_json: bool) -> bool:
    """``disk --json grow SIZE`` means what ``disk grow SIZE --json`` does."""
    return as_json or bool(click.get_current_context().obj)
