"""``mounts``: the folders that the other side sees; ``mounts add`` and ``mounts rm`` change which."""

from __future__ import annotations

import time
from dataclasses import replace

import click

from host_agent import groups, state
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.common import UP_INTERVAL, current_instance, json_option, require_running
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import AddMounts, GetMounts, MountSpec, RemoveMounts
from protocol.api import Mounts as MountTable


@click.group("mounts", invoke_without_command=True)
@json_option
@click.pass_context
def list_mounts(context: click.Context, as_json: bool) -> None:
    """Show which folders of this machine the VM or the attached one sees, and how each is doing."""
    context.obj = as_json
    if context.invoked_subcommand is None:
        _show(groups.run(_mounts, current_instance()), as_json)


@list_mounts.command("add")
@click.argument("folders", nargs=-1, required=True, metavar="PATH[:GUESTPATH][:ro|:rw]...")
@json_option
def add_mounts(folders: tuple[str, ...], as_json: bool) -> None:
    """Have it see these folders as well, now and at each start; written like --mount of "up" and "attach"."""
    from host_agent import mounts
    from host_agent.remote import folders as remote_folders
    from host_agent.remote import record

    home, paths = Home.find(), current_instance()
    attached = record.load(paths)
    specs = (
        mounts.chosen(folders, home.root)
        if attached is None
        else remote_folders.chosen(folders, home.root, attached.home)
    )
    _changed(paths, specs, (), as_json)


@list_mounts.command("rm")
@click.argument("places", nargs=-1, required=True, metavar="GUESTPATH...")
@json_option
def remove_mounts(places: tuple[str, ...], as_json: bool) -> None:
    """Take folders away, by where they are over there; of an attached machine at once, of a VM that does not run."""
    from host_agent import mounts
    from host_agent.remote import record

    paths = current_instance()
    attached = record.load(paths)
    home = attached.home if attached else ""
    expanded = [
        home + each[1:] if home and (each == "~" or each.startswith("~/")) else each for each in places
    ]
    _changed(paths, (), tuple(mounts.normal(each) for each in expanded), as_json)


def _changed(
    paths: InstancePaths, add: tuple[MountSpec, ...], remove: tuple[str, ...], as_json: bool
) -> None:
    """Now and for each start; or for the next one, if the instance does not run."""
    if not paths.directory.exists():
        raise UserError(f"there is no instance {paths.name}", "see: agentctl list", ExitCode.NOT_RUNNING)
    while True:
        if state.is_locked(paths.lock):
            _show(groups.run(_change_running, paths, add, remove), as_json)
            return
        with state.locked(paths.up_lock) as ours:
            if ours and not state.is_locked(paths.lock):
                _change_at_rest(paths, add, remove)
                from host_agent import show

                show.err().print("remembered for the next start")
                return
        time.sleep(UP_INTERVAL)  # it is just being started


async def _change_running(
    paths: InstancePaths, add: tuple[MountSpec, ...], remove: tuple[str, ...]
) -> MountTable:
    async with connected(paths, patience=RESTART_TIME) as link:
        if remove:
            return await link.request(RemoveMounts(list(remove)))
        taken = {mount.spec.guest_path: mount.spec for mount in (await link.request(GetMounts())).mounts}
        for spec in add:
            if (other := taken.get(spec.guest_path)) and other != spec:
                raise UserError(
                    f"{other.host_path} is at {spec.guest_path} already",
                    "choose another place: agentctl mounts add PATH:GUESTPATH",
                    ExitCode.USAGE,
                )
        return await link.request(AddMounts([spec for spec in add if spec.guest_path not in taken]))


def _change_at_rest(paths: InstancePaths, add: tuple[MountSpec, ...], remove: tuple[str, ...]) -> None:
    from host_agent.configuration import config as configuration
    from host_agent.configuration.config import Host, InstanceConfig
    from host_agent.remote import folders

    def changed() -> InstanceConfig:
        config = configuration.load(paths, Host.measure())
        if unknown := sorted(set(remove) - {spec.guest_path for spec in config.mounts}):
            raise UserError(f"{unknown[0]} is not a mount", "see: agentctl config show", ExitCode.USAGE)
        kept = tuple(spec for spec in config.mounts if spec.guest_path not in remove)
        return replace(config, mounts=folders.together(kept, add))

    configuration.update(paths, changed)


def _show(table: MountTable, as_json: bool) -> None:
    from host_agent import show

    # ``mounts --json add PATH`` means what ``mounts add PATH --json`` does.
    is_json = as_json or bool(click.get_current_context().obj)
    (show.mounts_json if is_json else show.mounts)(table)


async def _mounts(paths: InstancePaths) -> MountTable:
    require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(GetMounts())
