"""``top``: how busy the instance is, as the VM and this machine see it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from host_agent import groups
from host_agent.commands.common import current_instance, json_option, require_running, until_interrupted

if TYPE_CHECKING:
    from host_agent.instance_load import Load


@click.command()
@click.option("--once", is_flag=True, help="Look for one interval, print that and end.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="From one look to the next.",
)
@json_option
def top(once: bool, interval: float, as_json: bool) -> None:
    """Show how busy the VM is: processors, memory, disk, containers, ports, mounts and what flows.

    Live on a terminal until q or Ctrl-C; elsewhere it looks once. With --json and without --once a line each interval.
    Processors are in percent of one; in JSON 1.0 is one.
    """
    from host_agent import instance_load, load_view, show
    from host_agent import top as looking

    paths = current_instance()
    require_running(paths)
    if as_json and not once:
        with until_interrupted():
            groups.run(looking.follow, paths, interval, _line)
    elif once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        load = groups.run(looking.once, paths, interval)
        if as_json:
            show.as_json(instance_load.as_object(load))
        else:
            show.out().print(load_view.page(load))
    else:
        try:
            groups.run(looking.live, paths, interval)
        except KeyboardInterrupt:
            sys.exit(0)  # as good a key as q


def _line(load: Load) -> None:
    from host_agent import instance_load

    sys.stdout.write(json.dumps(instance_load.as_object(load)) + "\n")
    sys.stdout.flush()
