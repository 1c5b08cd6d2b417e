"""``cp``: files into the VM and out of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click
import trio

from host_agent import groups, sizes
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.about import complete_source
from host_agent.commands.common import current_instance, require_running
from host_agent.errors import ExitCode, UserError

if TYPE_CHECKING:
    from host_agent.copying import Copy

#: How often a terminal is told how far it is, seconds.
TELL_INTERVAL = 0.1


@click.command("cp")
@click.option("-u", "--user", default="", help="User of the guest; the default is the one named like you.")
@click.option("-r", "-a", is_flag=True, expose_value=False, help="As with cp; it is so in any case.")
@click.argument("sources", nargs=-1, required=True, metavar="SRC...", shell_complete=complete_source)
@click.argument("destination", metavar="DST", shell_complete=complete_source)
def copy_files(sources: tuple[str, ...], destination: str, user: str) -> None:
    """Copy files and folders into the VM, or out of it.

    \b
    agentctl cp notes.txt src guest:            into your home in the VM
    agentctl cp guest:/var/log/dpkg.log .       out of it
    agentctl cp -u root app.conf guest:/etc/

    Folders are copied with all that is in them. Modes, times, symlinks and hard links stay what they are; owner is who
    copies. A file appears when it is whole. Exit status 1 if anything could not be copied; the rest was.
    """
    from host_agent import copying, show
    from host_agent.copying import PREFIX, Copy
    from host_agent.progress import progress

    inwards = destination.startswith(PREFIX)
    if any(source.startswith(PREFIX) is inwards for source in sources):
        raise UserError(
            "all of SRC are to be on one side, and DST on the other",
            f"write a path of the VM like {PREFIX}/etc/hosts, and a file that is called so ./{PREFIX}...",
            ExitCode.USAGE,
        )
    paths = current_instance()
    require_running(paths)
    copy = Copy(lambda text: show.error(UserError(text)))
    end = copying.far_end(paths)
    words = [source.removeprefix(PREFIX) or "." for source in sources]

    async def run(report: Callable[[str], None] | None) -> None:
        async with connected(paths, patience=RESTART_TIME) as link, trio.open_nursery() as nursery:
            if report is not None:
                nursery.start_soon(_tell, copy, report)
            move = copying.into_guest if inwards else copying.out_of_guest
            await move(link, words, destination.removeprefix(PREFIX), user, copy, end)
            nursery.cancel_scope.cancel()

    with progress() as report:
        groups.run(run, report if show.err().is_terminal else None)
    if copy.problems:
        sys.exit(ExitCode.GENERAL)


async def _tell(copy: Copy, report: Callable[[str], None]) -> None:
    """How far it is, on one line."""
    began = trio.current_time()
    while True:
        await trio.sleep(TELL_INTERVAL)
        report(how_far(copy, trio.current_time() - began))


def how_far(copy: Copy, seconds: float) -> str:
    """What of it was done in the ``seconds`` since it began."""
    things = "1 thing" if copy.files == 1 else f"{copy.files} things"
    return f"{things}, {sizes.show(copy.size)}, {sizes.show(copy.size / seconds)}/s: {copy.path}"
