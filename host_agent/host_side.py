"""What an instance has on this machine outside of its own folder, as the configuration wants it, and undone.

The law: what somebody else has there is left alone, and what this user may not do is said with what to type. None of it
keeps an instance from starting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from host_agent import ssh_agent
from host_agent.autostart import Autostart
from host_agent.configuration.keys import InstanceConfig
from host_agent.docker_sock import DockerSock
from host_agent.errors import UserError
from host_agent.paths import InstancePaths


def arrange(
    paths: InstancePaths, config: InstanceConfig, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Have all as ``config`` wants it; what is not, in sentences."""
    return tuple(_arranged(paths, config, environment))


def undo(paths: InstancePaths, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Have nothing of it, of an instance that is removed; what is left, in sentences."""
    steps = (lambda: Autostart.of(paths, environment).turn_off(environment), DockerSock(paths).unlink)
    return tuple(problem for step in steps if (problem := _tried(step)))


def _arranged(paths: InstancePaths, config: InstanceConfig, environment: Mapping[str, str]) -> Iterator[str]:
    unit, sock = Autostart.of(paths, environment), DockerSock(paths)
    yield from filter(None, [_ssh_agent(paths, config, environment)])
    turn = unit.turn_on if config.autostart else unit.turn_off
    yield from filter(None, [_tried(lambda: turn(environment))])
    yield from filter(None, [_tried(sock.link if config.docker_sock else sock.unlink)])


def _ssh_agent(paths: InstancePaths, config: InstanceConfig, environment: Mapping[str, str]) -> str:
    """Have the agent of this login found, if it is wanted."""
    try:
        if config.ssh_agent:
            return ssh_agent.follow(paths.ssh_agent, environment)
        ssh_agent.forget(paths.ssh_agent)
    except OSError as error:
        return f"your SSH agent does not come into the VM: {error.strerror}"
    return ""


def _tried(step: Callable[[], bool]) -> str:
    try:
        step()
    except UserError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return ""
