"""What an instance leaves on the host when it ends, undone: by its host agent, or by whoever finds it dead."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace

from host_agent import docker_context, state
from host_agent.configuration import config
from host_agent.configuration.config import InstanceConfig
from host_agent.docker_context import Activation
from host_agent.errors import UserError
from host_agent.paths import InstancePaths
from host_agent.socket_forwards import remove_stale
from host_agent.view.leftover import remove_leftover

logger = logging.getLogger(__name__)


def clean_up(paths: InstancePaths) -> str:
    """Restore the docker context if ours is current, and remove the files of one run; returns a warning or "".

    The instance's lock must be held, and its QEMU gone. May be repeated.
    """
    warning = _restore_context(paths)
    remove_leftover(paths)
    for leftover in (
        paths.agent_socket,
        paths.qmp_socket,
        paths.events_socket,
        paths.control_socket,
        paths.files_socket,
        paths.view_socket,
        paths.view_record,
        paths.files_journal,
        paths.files_identity,
        paths.docker_socket,
        paths.containerd_socket,
        paths.root_overlay,
        paths.agent_drive,
        paths.bulk_memory,
        paths.qemu_identity,
        paths.agent_identity,
        paths.running_config,
    ):
        with contextlib.suppress(OSError):
            leftover.unlink()
    with contextlib.suppress(UserError):  # a damaged file is told of by who needs it
        remove_stale(_forwarded_sockets(config.load(paths, config.Host.measure())))
    return warning


def _forwarded_sockets(asked: InstanceConfig) -> list[str]:
    """Where the user wanted sockets of the guest, or its ports, on the host."""
    of_ports = [rule.host_socket for rule in asked.rules if rule.host_socket]
    return of_ports + [forward.host for forward in asked.sockets if not forward.reverse]


def _restore_context(paths: InstancePaths) -> str:
    previous = state.load(paths.state).previous_context
    if previous is None:
        return ""
    activation = Activation(docker_context.context_name(paths.name), previous, active=True)
    warning = docker_context.restore(docker_context.config_dir(os.environ), activation)
    remember(paths, previous_context=None)
    return warning


def remember(paths: InstancePaths, **changes: object) -> None:
    """Change fields of the instance's state. A full disk must not be what ends an agent: it is only logged."""
    # Of the file, not of a copy: the keeper counts there, too.
    changed = replace(state.load(paths.state), **changes)  # type: ignore[arg-type]
    try:
        state.save(paths.state, changed)
    except OSError as error:
        logger.error("the state could not be saved: %s", error)
