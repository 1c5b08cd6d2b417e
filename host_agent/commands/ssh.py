"""``ssh-config``: for editors and others that speak SSH; and ``ssh-proxy``, which ssh calls."""

from __future__ import annotations

import click

from host_agent import groups
from host_agent.client import RESTART_TIME, connected
from host_agent.commands.common import current_instance, require_running
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home


@click.command("ssh-config")
def ssh_config() -> None:
    """Print what ssh, and editors that use it, need to know of the VM.

    \b
    agentctl ssh-config >>~/.ssh/config
    ssh agentctl                                of another instance: ssh agentctl-NAME

    No port is opened for it: ssh runs agentctl, and reaches the VM as every command does.
    """
    from host_agent import ssh
    from host_agent.remote import record

    home, paths = Home.find(), current_instance()
    if (attached := record.load(paths)) is not None:
        raise UserError(
            f"instance {paths.name} is a machine that ssh reaches itself",
            f"use: ssh {attached.address}",
            ExitCode.USAGE,
        )
    home.ensure()
    paths.ensure()
    click.echo(ssh.config(home, paths), nl=False)


@click.command("ssh-proxy", hidden=True)
def ssh_proxy() -> None:
    """Connect stdin and stdout to the VM's SSH server; for ssh, as "ssh-config" says."""
    from host_agent import ssh

    paths = current_instance()
    require_running(paths)

    async def run() -> None:
        async with connected(paths, patience=RESTART_TIME) as link:
            await ssh.relay(link)

    groups.run(run)
