"""``view``: the other side's files on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import click
import trio

from host_agent import groups
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.common import current_instance, json_option, require_running
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.view import library
from protocol.api import EndView, GetView, StartView, View, ViewStage

#: Seconds: the host agent gives up before.
PATIENCE = 120.0


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path), metavar="[PATH]")
@click.option(
    "--owner",
    type=click.Choice(["me", "guest"]),
    help="Whose the files are shown as: yours, or the guest's users' by their numbers.  [default: me]",
)
@click.option("--end", is_flag=True, help="Show them no more.")
@json_option
def view(path: Path | None, owner: str | None, end: bool, as_json: bool) -> None:
    """Show the guest's files in a folder of this machine: volumes, containers, images, homes.

    They are there until the instance stops, or "agentctl view --end". PATH is an empty folder; without one they
    are in a folder of the instance, which is printed, with what is below it and whether that may be changed:
    volumes, homes and containers that run, the rest is read-only.

    Names and attributes are kept briefly, so what the guest changes is seen within two seconds. A guest that is away
    is an error after some seconds, never a wait for longer. This takes FUSE (Debian: fuse3).
    """
    paths = current_instance()
    require_running(paths)
    if end and (path or owner):
        raise UserError("--end takes no folder and no owner", "try: agentctl view --end", ExitCode.USAGE)
    shown = (
        groups.run(_end, paths)
        if end
        else groups.run(_start, paths, "" if path is None else os.path.realpath(path), owner or "")
    )
    from host_agent import show

    (show.view_json if as_json else show.view)(shown)


async def _start(paths: InstancePaths, path: str, owner: str) -> View:
    async with connected(paths, patience=RESTART_TIME) as link:
        now = await link.request(GetView())
        if (
            now.stage is ViewStage.OFF
        ):  # asked here as well, since how a command ends is not told over the socket
            await trio.to_thread.run_sync(library.check)
        return await link.request(StartView(path or now.path, owner or now.owner), timeout=PATIENCE)


async def _end(paths: InstancePaths) -> View:
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(EndView(), timeout=PATIENCE)
