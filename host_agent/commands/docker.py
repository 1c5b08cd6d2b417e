"""``env``: the VM's Docker for a shell without the context."""

from __future__ import annotations

import os

import click
import trio

from host_agent.commands.common import current_instance, json_option
from host_agent.paths import Home
from provision.recipe import CONTAINERD


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Print what a shell needs to use the VM's Docker without the context: eval "$(agentctl env)".

    Of an instance whose runtime is containerd it is that one's address, for ctr and its like.
    """
    import shlex

    from host_agent import docker_tools, show
    from host_agent.configuration import config

    home, paths = Home.find(), current_instance()
    if not paths.attached.exists() and config.load(paths, config.Host.measure()).runtime == CONTAINERD:
        variables = {"CONTAINERD_ADDRESS": str(paths.containerd_socket)}
    else:
        variables = {"DOCKER_HOST": f"unix://{paths.docker_socket}"}
        tools = trio.run(docker_tools.detect, home.tools)
        if tools.docker is not None and tools.docker.is_relative_to(home.tools):
            variables["PATH"] = f"{tools.docker.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if as_json:
        show.as_json(variables)
    else:
        for name, value in variables.items():
            click.echo(f"export {name}={shlex.quote(value)}")
