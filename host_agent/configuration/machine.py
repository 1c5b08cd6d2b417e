"""What belongs to a configuration and is not for people: the machine's identity, and where its folders really are.

The law: where a folder is, is found when it is chosen and kept, since a guest can make a symlink in a shared folder to
anywhere; it counts as long as the configuration names the same folder at the same place of the guest.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from host_agent.configuration.keys import InstanceConfig
from host_agent.errors import ExitCode, UserError
from host_agent.files import parse_json, write_atomically


def completed(path: Path, config: InstanceConfig) -> InstanceConfig:
    """``config`` with its identity, and where its folders were when they were chosen.

    Raises ``UserError`` for a damaged record: a folder that is looked up anew may be another one by now.
    """
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        return config
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    try:
        return with_record(config, values)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged ({error})", f"remove it, and mounts are looked up anew: rm {path}", ExitCode.USAGE
    )


def with_record(config: InstanceConfig, values: Mapping[str, Any]) -> InstanceConfig:
    """``config`` with what ``record_of`` has written. Raises ``ValueError`` and the like for anything else."""
    identity = str(uuid.UUID(values["identity"]))
    real = {str(guest): (str(host), str(path)) for guest, (host, path) in values["real_paths"].items()}
    specs = tuple(
        replace(spec, real_path=real[spec.guest_path][1])
        if real.get(spec.guest_path, ("",))[0] == spec.host_path
        else spec
        for spec in config.mounts
    )
    return replace(config, identity=identity, mounts=specs)


def record_of(config: InstanceConfig) -> dict[str, Any]:
    return {
        "identity": config.identity,
        "real_paths": {
            spec.guest_path: [spec.host_path, spec.real_path] for spec in config.mounts if spec.real_path
        },
    }


def save(path: Path, config: InstanceConfig) -> None:
    content = json.dumps(record_of(config), indent=1).encode() + b"\n"
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    write_atomically(path, content)
