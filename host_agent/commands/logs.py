"""``logs``: what the agents, the VM and Docker wrote down."""

from __future__ import annotations

import click

from host_agent import groups, log_sources
from host_agent.commands.common import current_instance
from host_agent.commands.run import Workdir, run_in_guest


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
    """Show what the agents, the VM and Docker wrote down, by the time at which they did."""
    from host_agent import all_logs, logfiles, show

    paths = current_instance()
    if component is None:
        shown = all_logs.Shown(lines, follow)
        groups.run(all_logs.show, paths, shown, show.log_lines, show.note)
    elif component in log_sources.FILES:
        logfiles.show(log_sources.FILES[component](paths), lines, follow=follow)
    else:
        argv = [*log_sources.journal(component), f"--lines={lines}", *(["--follow"] if follow else [])]
        run_in_guest(argv, "root", {}, False, Workdir("", shared=False))
