"""What an instance may have on this machine: ``autostart`` and ``docker-sock``, each on, off and how it is."""

from __future__ import annotations

import getpass
from dataclasses import replace
from typing import Any

import click

from host_agent.commands.common import current_instance, json_option
from host_agent.configuration import config as configuration
from host_agent.paths import Home, InstancePaths


@click.group("autostart")
def autostart() -> None:
    """Start the VM when you log in, by your systemd."""


@autostart.command("on")
def autostart_on() -> None:
    """From now on."""
    from host_agent import show
    from host_agent.autostart import Autostart, lingers

    paths = current_instance()
    _configure(paths, autostart=True)
    unit = Autostart.of(paths)
    unit.turn_on()
    show.note(f"instance {paths.name} starts when you log in ({unit.unit})")
    if not lingers(getpass.getuser()):
        show.note("to have it start with the machine, before you log in: loginctl enable-linger")


@autostart.command("off")
def autostart_off() -> None:
    """No longer; what runs goes on."""
    from host_agent import show
    from host_agent.autostart import Autostart

    paths = current_instance()
    _configure(paths, autostart=False)
    Autostart.of(paths).turn_off()
    show.note(f"instance {paths.name} does not start by itself")


@autostart.command("status")
@json_option
def autostart_status(as_json: bool) -> None:
    """Whether it does."""
    from host_agent import show
    from host_agent.autostart import Autostart, lingers

    unit = Autostart.of(current_instance())
    with_machine = lingers(getpass.getuser())
    if as_json:
        show.as_json({"on": unit.is_on(), "unit": str(unit.unit), "with_machine": with_machine})
    elif unit.is_on():
        click.echo(f"on: it starts {'with the machine' if with_machine else 'when you log in'}")
    else:
        click.echo("off")


@click.group("docker-sock")
def docker_sock() -> None:
    """Have /var/run/docker.sock lead to the VM, for programs that look nowhere else.

    What somebody else has there is never touched, and what needs root is said, not done.
    """


@docker_sock.command("on")
def docker_sock_on() -> None:
    """Make the link, now and at each up where it is missing."""
    from host_agent import show
    from host_agent.docker_sock import DockerSock

    paths = current_instance()
    sock = DockerSock(paths)
    _configure(paths, docker_sock=True)
    sock.link()
    show.note(sock.describe())


@docker_sock.command("off")
def docker_sock_off() -> None:
    """Remove it, if it is ours."""
    from host_agent import show
    from host_agent.docker_sock import DockerSock

    paths = current_instance()
    sock = DockerSock(paths)
    _configure(paths, docker_sock=False)
    sock.unlink()
    show.note(sock.describe())


@docker_sock.command("status")
@json_option
def docker_sock_status(as_json: bool) -> None:
    """Where it leads."""
    from host_agent import show
    from host_agent.docker_sock import DockerSock

    sock = DockerSock(current_instance())
    if as_json:
        show.as_json({"state": sock.look().value, "path": str(sock.place), "description": sock.describe()})
    else:
        click.echo(sock.describe())


def _configure(paths: InstancePaths, **changes: Any) -> None:
    """Keep ``changes`` for each ``up``."""
    Home.find().ensure()
    paths.ensure()
    host = configuration.Host.measure()
    configuration.update(paths, lambda: replace(configuration.load(paths, host), **changes))
