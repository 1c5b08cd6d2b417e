"""The configuration as it was before it was YAML, understood once more: nothing that was asked for is lost."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from host_agent.configuration import keys as config_keys
from host_agent.configuration.keys import Host, InstanceConfig
from host_agent.configuration.kinds import shown

_PORTS = ("lan", "privileged_offset", "rules")
_REQUIRED = ("cpus", "memory", "disk", "accelerator", "identity")


def from_old(values: Any) -> InstanceConfig:
    """From what was in ``config.json``. Raises ``ValueError`` with a clause."""
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 (the content is wrong, not our call)
    for name in _REQUIRED:
        if name not in values:
            raise ValueError(f"{name} is not there")
    mounts = values.get("mounts")
    plain = {
        **{name: value for name, value in values.items() if name not in (*_PORTS, "identity", "mounts")},
        "memory": _bytes(values["memory"]),
        "disk": _bytes(values["disk"]),
        "ports": {name: values[name] for name in _PORTS if name in values},
    }
    if mounts is not None:
        plain["mounts"] = [_without_real(mount) for mount in mounts] if isinstance(mounts, list) else mounts
    reading = config_keys.read(plain)
    if reading.errors:
        raise reading.errors[0]
    config = replace(InstanceConfig.default(Host.measure()), **reading.values)
    specs = (
        tuple(
            replace(spec, real_path=str(mount.get("real_path", "")))
            for spec, mount in zip(config.mounts, mounts, strict=True)
        )
        if mounts is not None
        else config.mounts
    )
    return replace(config, identity=str(uuid.UUID(str(values["identity"]))), mounts=specs)


def _bytes(value: Any) -> str:
    """These had no unit."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a size is {shown(value)}; it is a number of bytes")  # noqa: TRY004 (as above)
    return f"{value}B"


def _without_real(mount: Any) -> Any:
    return (
        {key: value for key, value in mount.items() if key != "real_path"}
        if isinstance(mount, dict)
        else mount
    )
