"""``mounts``: the folders that the VM sees."""

from __future__ import annotations

import click

from host_agent import groups
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.common import current_instance, json_option, require_running
from host_agent.paths import InstancePaths
from protocol.api import GetMounts
from protocol.api import Mounts as MountTable


@click.command("mounts")
@json_option
def list_mounts(as_json: bool) -> None:
    """Show which folders of this machine the VM sees, and how each is doing."""
    from host_agent import show

    table = groups.run(_mounts, current_instance())
    (show.mounts_json if as_json else show.mounts)(table)


async def _mounts(paths: InstancePaths) -> MountTable:
    require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(GetMounts())
