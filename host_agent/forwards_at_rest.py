"""``agentctl forward`` where the instance does not run: its configuration is what is asked and changed.

The law: the rules of change are those of an instance that runs (``port_rules``, ``socket_rules``), all of it is saved
or nothing, and nobody starts the instance meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

from host_agent import port_rules, socket_rules
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Host, InstanceConfig
from host_agent.paths import InstancePaths
from protocol.api import (
    ChangePorts,
    ChangeSocketForwards,
    ForwardState,
    PortSettings,
    SocketForward,
    SocketRow,
    SocketRows,
)

NOT_RUNNING = "the VM does not run"

Listed = tuple[PortSettings, SocketRows]


def listed(paths: InstancePaths) -> Listed:
    """What is configured; of an instance that never was, the defaults. Raises ``UserError`` for a damaged file."""
    config = configuration.load(paths, Host.measure())
    return config.ports, _rows(config.sockets)


def change(paths: InstancePaths, ports: ChangePorts, sockets: ChangeSocketForwards) -> Listed:
    """Change it for the next start. The caller holds ``paths.up_lock``.

    Raises ``UserError`` for what cannot be, ``OSError`` if it cannot be kept; then nothing has changed.
    """
    config = configuration.update(paths, lambda: _changed(paths, ports, sockets))
    return config.ports, _rows(config.sockets)


def _changed(paths: InstancePaths, ports: ChangePorts, sockets: ChangeSocketForwards) -> InstanceConfig:
    config = configuration.load(paths, Host.measure())
    settings = port_rules.changed(config.ports, ports)
    config = replace(
        config,
        rules=tuple(settings.rules),
        lan=settings.lan,
        privileged_offset=settings.privileged_offset,
        sockets=socket_rules.changed(config.sockets, sockets),
    )
    configuration.check_sockets(config)
    return config


def _rows(sockets: tuple[SocketForward, ...]) -> SocketRows:
    return SocketRows([SocketRow(forward, ForwardState.PENDING, NOT_RUNNING) for forward in sockets])
