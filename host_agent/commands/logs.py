"""``logs``: what the agents, the VM and Docker wrote down."""

from __future__ import annotations

from typing import Final

import click

from host_agent import groups, log_sources
from host_agent.commands.common import current_instance, until_interrupted
from host_agent.commands.run import Workdir, run_in_guest
from host_agent.errors import ExitCode, UserError
from host_agent.remote import record
from host_agent.remote.record import Attached

NOWHERE: Final = Workdir("", shared=False)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as more is written.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="How many lines from the end.",
)
@click.option(
    "--component",
    type=click.Choice(log_sources.COMPONENTS),
    help="Only one of them, as it was written. host: the host agent; files: its file server; console: the VM's boot;"
    " qemu: its errors; provision: scripts of the configuration; guest, docker: in the VM; system: all of the VM's"
    " journal, which is not shown otherwise.",
)
def logs(follow: bool, lines: int, component: str | None) -> None:
    """Show what the agents, the VM or the attached machine, and Docker wrote down, by the time at which they did."""
    from host_agent import all_logs, logfiles, show

    paths = current_instance()
    attached = record.load(paths)
    if component is None:
        shown = all_logs.Shown(lines, follow)
        with until_interrupted():
            groups.run(all_logs.show, paths, shown, show.log_lines, show.note)
    elif component in log_sources.FILES:
        with until_interrupted():
            logfiles.show(log_sources.FILES[component](paths), lines, follow=follow)
    elif attached is not None:
        run_in_guest(_over_there(attached, component, lines, follow=follow), "", {}, False, NOWHERE)
    else:
        argv = [*log_sources.journal(component), f"--lines={lines}", *(["--follow"] if follow else [])]
        run_in_guest(argv, "root", {}, False, NOWHERE)


def _over_there(attached: Attached, component: str, lines: int, *, follow: bool) -> list[str]:
    """The command that shows the logs of the agents on a machine that is attached; of nothing else there."""
    if component != "guest":
        hint = "look there: agentctl exec journalctl"
        raise UserError(f"of an attached machine there is no log of {component}", hint, ExitCode.USAGE)
    folder = f"{attached.home}/.cache/agentctl/run/{attached.session}"
    words = ["tail", "-q", f"--lines={lines}", *(["--follow=name"] if follow else [])]
    return [*words, f"{folder}/control.log", f"{folder}/files.log"]
