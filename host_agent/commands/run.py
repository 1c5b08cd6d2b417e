"""Programs in the instance: ``exec`` and ``shell``, which end with their exit status."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import NoReturn

import click

from host_agent import groups, mounts
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.common import CONTEXT_SETTINGS, current_instance, require_running
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from protocol.api import Exec, GetMounts, MountState
from protocol.errors import RemoteFailure
from protocol.link import Link


@click.command(
    "exec",
    context_settings={**CONTEXT_SETTINGS, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "-t/-T", "--tty/--no-tty", "with_tty", default=None, help="With a terminal, or without; as stdin is."
)
@click.option("-u", "--user", default="", help="User of the guest; the default is the one named like you.")
@click.option(
    "-w",
    "--workdir",
    default="",
    help="Folder over there to run in, as seen from the home there; the default is this one, if shared.",
)
@click.option("-e", "--env", "variables", multiple=True, metavar="NAME=VALUE", help="Set a variable.")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(
    with_tty: bool | None, user: str, workdir: str, variables: tuple[str, ...], argv: tuple[str, ...]
) -> None:
    """Run a command in the VM, or on the attached machine; its exit status is ours."""
    environment = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{variable!r} is not NAME=VALUE")
        environment[name] = value
    run_in_guest(list(argv), user, environment, with_tty, Workdir(workdir, shared=not workdir))


@click.command()
@click.option("-u", "--user", default="", help="User of the guest; the default is the one named like you.")
def shell(user: str) -> None:
    """Open a login shell in the VM, or on the attached machine, in this folder if that has it."""
    run_in_guest([], user, {}, None, Workdir(mounts.here() or "", shared=True))


@dataclass(frozen=True, slots=True)
class Workdir:
    """A folder of the guest; with ``shared``, rather where it has the working directory, if it is mounted."""

    otherwise: str
    shared: bool


def run_in_guest(
    argv: list[str], user: str, environment: dict[str, str], with_tty: bool | None, workdir: Workdir
) -> NoReturn:
    from host_agent import ssh_agent, terminal

    if with_tty is None:
        with_tty = sys.stdin.isatty() and sys.stdout.isatty()
    elif with_tty and not sys.stdin.isatty():
        raise UserError("--tty was asked for, and stdin is not a terminal", "leave --tty out", ExitCode.USAGE)
    if with_tty and "TERM" in os.environ:
        environment = {"TERM": os.environ["TERM"], **environment}
    target = Exec(
        argv=argv,
        env=environment,
        cwd=workdir.otherwise,
        cwd_required=bool(workdir.otherwise) and not workdir.shared,
        user=user,
        tty=terminal.window_size() if with_tty else None,
    )
    paths = current_instance()
    ssh_agent.follow_if_wanted(paths.ssh_agent, os.environ)
    sys.exit(groups.run(_execute, paths, target, workdir.shared))


async def _execute(paths: InstancePaths, target: Exec, shared: bool) -> int:
    from host_agent import terminal

    require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        if shared and (directory := await _shared_directory(link)) is not None:
            target = replace(target, cwd=directory)
        return await terminal.run(link, target)


async def _shared_directory(link: Link) -> str | None:
    """Where the guest has the working directory; its home ("") while that mount does not work. None if nowhere."""
    directory = mounts.here()
    if directory is None:
        return None
    try:
        rows = (await link.request(GetMounts())).mounts
    except RemoteFailure:
        return None  # of an agentctl that had no mounts
    specs = [row.spec for row in rows]
    share = mounts.share_of(specs, directory)
    if share is None:
        return None
    works = any(row.spec == share and row.state in (MountState.MOUNTED, MountState.FULL) for row in rows)
    return mounts.guest_path_of(specs, directory) if works else ""
