"""``watch``: every change of an instance, for programs."""

from __future__ import annotations

import click

from host_agent import groups
from host_agent.commands.common import current_instance, require_running, until_interrupted


@click.command()
@click.option(
    "--forever", is_flag=True, help="Also while it does not run: wait for its next start, and go on."
)
def watch(forever: bool) -> None:
    """Print how the instance is, then each change, as lines of JSON, until it has ended.

    Each line has "time", "topic", "state" and "message": of the topics instance, host-agent, guest, disk, mount
    and port the last line says how things are; boot and note pass. See docs/json.md.
    """
    from host_agent import instance_watch
    from host_agent.show_json import as_line

    def tell(change: instance_watch.Change) -> None:
        as_line(instance_watch.as_object(change))

    paths = current_instance()
    if not forever:
        require_running(paths)
    with until_interrupted():
        groups.run(lambda: instance_watch.watch(paths, tell, forever=forever))
