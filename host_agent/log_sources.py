"""Where the logs of an instance are: files of this machine, and units of the VM's journal; one table for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from host_agent.paths import InstancePaths

FILES: Mapping[str, Callable[[InstancePaths], Path]] = {
    "host": lambda paths: paths.agent_log,
    "files": lambda paths: paths.files_log,
    "view": lambda paths: paths.view_log,
    "console": lambda paths: paths.console_log,
    "qemu": lambda paths: paths.qemu_log,
    "provision": lambda paths: paths.provision_log,
}

#: Patterns of units, as journalctl knows them.
UNITS: Mapping[str, tuple[str, ...]] = {
    "guest": ("agentctl-*",),
    "docker": ("docker", "containerd", "podman*"),
}

#: The whole journal; not a part of all components together, of which it would say much twice.
SYSTEM = "system"

COMPONENTS = (*FILES, *UNITS, SYSTEM)


def journal(*components: str) -> list[str]:
    """The command that shows them in the VM; the whole journal if none is named."""
    units = [f"--unit={unit}" for component in components for unit in UNITS.get(component, ())]
    return ["journalctl", "--no-pager", "--quiet", *units]


def component_of(unit: str) -> str:
    """To which component of the VM a unit of its journal belongs."""
    return "guest" if unit.startswith("agentctl-") else "docker"
