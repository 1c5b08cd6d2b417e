"""From no VM to one that runs, and back: ``up``, ``stop``, ``restart``, ``delete``."""

from __future__ import annotations

import sys
from copy import copy
from typing import TYPE_CHECKING

import click

from host_agent import groups, mounts, state
from host_agent.client import RESTART_TIME, ConnectionLost, connected
from host_agent.commands import config
from host_agent.commands.common import Size, current_instance, json_option
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Wishes
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import StopInstance
from protocol.errors import RemoteFailure

if TYPE_CHECKING:
    from host_agent.starting import UpResult

#: Longer than the host agent lets the guest take, so that its own answer arrives first, seconds.
STOP_TIME = 200.0

#: Host agents that may be lost while they stop the instance before `stop` gives up.
STOP_ATTEMPTS = 3


@click.command()
@click.option("--cpus", type=int, help="Processors of the VM.")
@click.option("--memory", type=Size(), help="Memory of the VM, like 4GiB.")
@click.option("--disk", type=Size(), help="Size of the data disk, like 60GiB; it only grows.")
@click.option(
    "--accel",
    "accelerator",
    type=click.Choice(configuration.ACCELERATORS),
    help="What runs the VM; auto tries what this machine has.",
)
@click.option(
    "--mount",
    "folders",
    multiple=True,
    metavar="PATH[:GUESTPATH][:ro|:rw]",
    help="A folder that the VM sees, at the same path or another; ,locks=host after it: its locks reach the host."
    " May be repeated.",
)
@click.option(
    "--bulk/--no-bulk",
    default=None,
    help="Move data through memory shared with the VM, as is usual, or not, for comparison.",
)
@click.option(
    "--lan/--no-lan",
    default=None,
    help="Let other machines reach what listens on all addresses of the VM, or not, as is usual.",
)
@click.option(
    "--privileged-offset",
    type=int,
    metavar="N",
    help="Add this to ports below 1024, which need a privilege here: with 10000, 80 is 10080; 0: do not.",
)
@click.option("--edit", "editing", is_flag=True, help="Look through the configuration in your editor first.")
@json_option
def up(
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    accelerator: str | None,
    folders: tuple[str, ...],
    bulk: bool | None,
    lan: bool | None,
    privileged_offset: int | None,
    editing: bool,
    as_json: bool,
) -> None:
    """Start the VM, and wait until Docker answers.

    What the flags ask for is remembered for the next start. The first run builds the guest image, which
    takes a few minutes.

    The VM sees your home at the same path, and the folder that this is called in. --mount chooses others
    instead of these ("--mount ~ --mount /srv" keeps the home); "--mount none" chooses none. Folders can be
    added while the VM runs; to take one away or make it read-only needs a restart.
    """
    from host_agent import up as starting
    from host_agent.configuration.file import ConfigFile
    from host_agent.progress import progress

    home, paths = Home.find(), current_instance()
    if paths.attached.exists():
        of_vms = (cpus, memory, disk, accelerator, bulk, lan, privileged_offset)
        if editing or any(flag is not None for flag in of_vms):
            raise UserError(
                f"instance {paths.name} is a machine that is attached; of the flags it has only --mount",
                "see: agentctl config edit",
                ExitCode.USAGE,
            )
        show_started(_attached_again(paths, folders), as_json=as_json)
        return
    chosen = mounts.chosen(folders, home.root) if folders else None
    if editing:
        config.edited(ConfigFile(home, current_instance()))
    with progress() as report:
        wishes = Wishes(cpus, memory, disk, accelerator, chosen, bulk, lan, privileged_offset)
        result = starting.run(home, current_instance(), wishes, report)
    show_started(result, as_json=as_json)


def _attached_again(paths: InstancePaths, folders: tuple[str, ...] = ()) -> UpResult:
    from host_agent.commands import attach
    from host_agent.remote.attach import Wishes as Asked

    return attach.again(paths, Asked(folders))


def show_started(result: UpResult, *, as_json: bool) -> None:
    from host_agent import show

    if result.note:
        show.note(result.note)
    for warning in result.warnings:
        show.warning(warning)
    (show.status_json if as_json else show.status)(result.status)


#: What people's fingers know from other tools.
start = copy(up)
start.name, start.short_help = "start", "The same as up."


@click.command()
@click.option("--force", is_flag=True, help="Do not wait for containers to stop in good order.")
def stop(force: bool) -> None:
    """Shut the VM down; containers, images and volumes stay."""
    from host_agent import show
    from host_agent.progress import progress

    paths = current_instance()
    with progress() as report:
        report("stopping")
        stopped = groups.run(stop_instance, paths, force)
    show.err().print("stopped" if stopped else "not running")


@click.command()
@click.option("--force", is_flag=True, help="Do not wait for containers to stop in good order.")
@json_option
def restart(force: bool, as_json: bool) -> None:
    """Shut the VM down, if it runs, and start it again with what was changed meanwhile.

    As after "up", it also sees the folder that this is called in.
    """
    from host_agent import up as starting
    from host_agent.progress import progress

    paths = current_instance()
    if not paths.directory.exists():
        raise UserError(f"there is no instance {paths.name}", "make it: agentctl up", ExitCode.NOT_RUNNING)
    with progress() as report:
        report("stopping")
        groups.run(stop_instance, paths, force)
    if paths.attached.exists():
        show_started(_attached_again(paths), as_json=as_json)
        return
    with progress() as report:
        result = starting.run(Home.find(), paths, Wishes(), report)
    show_started(result, as_json=as_json)


async def stop_instance(paths: InstancePaths, force: bool) -> bool:
    """Whether there was something to stop."""
    from host_agent import ending

    if not state.is_locked(paths.lock):
        if paths.directory.exists() and state.is_locked(paths.up_lock):
            raise UserError(
                f"instance {paths.name} is just being started by another command",
                "interrupt that one, or wait for it",
                ExitCode.BUSY,
            )
        return await ending.end_orphan(paths)
    failure: UserError | RemoteFailure | None = None
    for _ in range(STOP_ATTEMPTS):
        patience = RESTART_TIME
        try:
            async with connected(paths, patience=RESTART_TIME) as link:
                await link.request(StopInstance(force), timeout=STOP_TIME)
                patience = ending.GONE_TIME
        except (UserError, RemoteFailure) as error:
            failure = error
        # Its answer may have been lost, and its keeper goes after it: the lock tells.
        if await ending.lock_is_free(paths, patience):
            return True
        if not isinstance(failure, ConnectionLost):
            break
        # It was killed while it stopped the instance, and another one goes on with that.
    if force:
        await ending.end_by_force(paths)
        return True
    raise failure or UserError(
        f"the host agent of {paths.name} does not end", "end it: agentctl stop --force", ExitCode.BUSY
    )


@click.command()
@click.option(
    "--data", is_flag=True, help="Also the data disk: containers, images, volumes, the guest's homes."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def delete(data: bool, yes: bool) -> None:
    """Remove the instance; its data disk stays unless --data is given."""
    from host_agent import show
    from host_agent.remove import remove

    paths = current_instance()
    if not paths.directory.exists():
        show.err().print("there is no such instance")
        return
    what = "the instance and everything on its data disk" if data else "the instance (its data disk stays)"
    if paths.attached.exists():
        what = "what is remembered of the machine, which stays as it is"
        data = True  # there is none, and of the folder nothing is to be kept
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"this would remove {what}", "say so with --yes", ExitCode.USAGE)
        if not click.confirm(f"Remove {what}?", err=True):
            show.err().print("nothing was removed")
            sys.exit(ExitCode.GENERAL)
    groups.run(stop_instance, paths, data)
    for left in remove(paths, data=data):
        show.warning(left)
    show.err().print("removed")
