"""What listens in the VM and how to reach it: ``ports``, ``open``, ``tunnel``."""

from __future__ import annotations

import click

from host_agent import groups, kind
from host_agent.client import RESTART_TIME, all_forwards, connected
from host_agent.commands.common import current_instance, json_option, require_running, until_interrupted
from host_agent.paths import InstancePaths
from protocol.api import Forward


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also those that are ignored.")
@click.option(
    "--watch", is_flag=True, help="Then each change, as it happens, until Ctrl-C; of JSON, a line each."
)
@json_option
def ports(everything: bool, watch: bool, as_json: bool) -> None:
    """Show what listens in the VM, or on the attached machine, and where it is on localhost."""
    from host_agent import port_watch, show

    if watch:
        require_running(current_instance())
        with until_interrupted():
            groups.run(port_watch.watch, current_instance(), show.change_json if as_json else show.change)
    rows = groups.run(_forwards, current_instance(), True)
    if as_json:
        show.forwards_json(rows)
    else:
        show.forwards(rows, everything=everything)


@click.command("open")
@click.argument("port", type=click.IntRange(1, 65535))
def open_port(port: int) -> None:
    """Open in the browser what listens on PORT, of this machine, the VM or the attached one."""
    from host_agent import port_open

    address = port_open.url(groups.run(_forwards, current_instance()), port)
    click.echo(address)
    port_open.show(address)


async def _forwards(paths: InstancePaths, owners: bool = False) -> list[Forward]:
    require_running(paths)
    async with connected(paths, patience=RESTART_TIME) as link:
        return await all_forwards(link, owners=owners)


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=1080,
    show_default=True,
    help="Port of localhost to listen on.",
)
def tunnel(port: int) -> None:
    """Reach what only the VM or the attached machine reaches, like a container's own address, through a SOCKS5 proxy.

    Serves until it is interrupted. Names are resolved over there:
    curl --socks5-hostname localhost:1080 http://172.17.0.2
    """
    from host_agent import show
    from host_agent import tunnel as tunnels

    paths = current_instance()
    require_running(paths)

    def ready() -> None:
        show.err().print(kind.called(f"SOCKS5 proxy on localhost:{port}, into the VM; Ctrl-C ends it"))

    groups.run(tunnels.run, paths, port, ready)
