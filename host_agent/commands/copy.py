"""``cp``: files into an instance and out of it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

import click
import trio
from click.core import ParameterSource

from host_agent import copy_words, groups, hints, kind
from host_agent.client import RESTART_TIME, ConnectionLost, connected
from host_agent.commands.about import complete_source
from host_agent.commands.common import require_running
from host_agent.copy_words import Plan
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths

if TYPE_CHECKING:
    from host_agent.copying import Copy, FarEnd

#: A copy that is over by then is not talked about, seconds.
QUIET_FOR: Final = 1.0
#: How often a terminal is told how far it is, seconds.
TELL_INTERVAL: Final = 0.1
#: How long a copy waits for a lost connection since anything went over it, seconds; and between two attempts.
PATIENCE: Final = 60.0
PAUSE: Final = 1.0

AGAIN: Final = "to go on where it was: the same command again"


@click.command("cp")
@click.option("-u", "--user", default="", help="User of the guest; the default is the one named like you.")
@click.option("-r", "-a", is_flag=True, expose_value=False, help="As with cp; it is so in any case.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show how far it is.")
@click.argument("sources", nargs=-1, required=True, metavar="SRC...", shell_complete=complete_source)
@click.argument("destination", metavar="DST", shell_complete=complete_source)
@click.pass_context
def copy_files(
    context: click.Context, sources: tuple[str, ...], destination: str, user: str, quiet: bool
) -> None:
    """Copy files and folders into an instance, a VM or an attached machine, or out of it.

    \b
    agentctl cp notes.txt src guest:            into your home there
    agentctl cp guest:/var/log/dpkg.log .       out of it
    agentctl cp dev:/etc/hosts .                out of the instance that is called dev
    agentctl cp -u root app.conf guest:/etc/

    Folders are copied with all that is in them. Modes, times, symlinks and hard links stay what they are; owner is who
    copies. A file appears when it is whole. Exit status 1 if anything could not be copied; the rest was.

    A copy that was cut off goes on where it was when the same command is given again, and by itself if the connection
    is back within a minute. Until then what came of a large file is beside it as .agentctl-part-..., which another copy
    into that folder removes after a week.
    """
    from host_agent import copying, show
    from host_agent.copying import Copy

    plan = _plan(context, sources, destination)
    paths = Home.find().instance(plan.instance)
    kind.choose(attached=paths.attached.exists())
    require_running(paths)
    end = copying.far_end(paths, plan.prefix)
    copy = Copy(lambda text: show.error(UserError(text)), watched=show.err().is_terminal and not quiet)
    try:
        groups.run(_run, paths, plan, user, copy, end)
    except KeyboardInterrupt:
        if copy.gauge.part:
            show.note(AGAIN)
        raise
    if copy.problems:
        sys.exit(ExitCode.GENERAL)


def _plan(context: click.Context, sources: tuple[str, ...], destination: str) -> Plan:
    root = context.find_root()
    insists = root.get_parameter_source("instance") is ParameterSource.COMMANDLINE
    names = [paths.name for paths in Home.find().instances()]
    plan = copy_words.understand(sources, destination, chosen=root.obj, insists=insists, instances=names)
    if plan.instance != root.obj:
        hints.choose(plan.instance)
    return plan


async def _run(paths: InstancePaths, plan: Plan, user: str, copy: Copy, end: FarEnd) -> None:
    async with trio.open_nursery() as nursery:
        if copy.watched:
            nursery.start_soon(_tell, copy)
        await _persist(paths, plan, user, copy, end)
        nursery.cancel_scope.cancel()


async def _persist(paths: InstancePaths, plan: Plan, user: str, copy: Copy, end: FarEnd) -> None:
    """One attempt after another, as long as the connection is all that they fail for."""
    from host_agent.copying import CutOff

    best, since = 0, trio.current_time()
    while True:
        began = trio.current_time()
        try:
            return await _attempt(paths, plan, user, copy, end)
        except (CutOff, ConnectionLost) as error:
            if not copy.resumes or not (best or copy.gauge.done or copy.gauge.read):
                raise
            if copy.gauge.done > best:
                best, since = copy.gauge.done, trio.current_time()
            if _would_begin_anew(plan, copy) or trio.current_time() - since > PATIENCE:
                raise UserError(error.message, AGAIN, ExitCode.GUEST) from None
            copy.waits = True
        await trio.sleep_until(began + PAUSE)


def _would_begin_anew(plan: Plan, copy: Copy) -> bool:
    """A folder of which all was sent may be complete under its new name, and would be copied into itself."""
    alone = len(plan.sources) == 1 and (not plan.inwards or os.path.isdir(plan.sources[0]))
    return copy.sent and alone


async def _attempt(paths: InstancePaths, plan: Plan, user: str, copy: Copy, end: FarEnd) -> None:
    from host_agent import copying

    copy.begin()
    async with connected(paths, patience=RESTART_TIME) as link:
        end = await copying.as_it_runs(link, end)
        copy.resumes = end.resumes
        move = copying.into_guest if plan.inwards else copying.out_of_guest
        await move(link, plan.sources, plan.destination, user, copy, end)


async def _tell(copy: Copy) -> None:
    """How far it is, on one line, if it takes so long that somebody may wonder."""
    from host_agent import show
    from host_agent.copy_meter import Meter
    from host_agent.progress import progress

    meter, console = Meter(), show.err()
    await trio.sleep(QUIET_FOR)
    with progress() as report:
        while True:
            # The spinner before it takes two cells; the last one stays free, so that nothing wraps.
            line = meter.line(copy.gauge, trio.current_time(), console.width - 3)
            report("waiting for the connection" if copy.waits else line)
            await trio.sleep(TELL_INTERVAL)
