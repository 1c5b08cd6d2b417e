"""A mount as the configuration has it: the words of ``--mount``, or a mapping with a name for each of them.

The law: what is written again is understood as the same mount. Where a folder really is, is not in the file: that is
found when it is chosen, and kept elsewhere (``config``).
"""

from __future__ import annotations

import os
from typing import Any

from host_agent.configuration.kinds import meant, shown
from host_agent.errors import UserError
from host_agent.mount_words import parse
from host_agent.mounts import normal
from protocol.api import MountSpec

KEYS = ("host_path", "guest_path", "read_only", "host_locks")

SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "PATH[:GUESTPATH][:ro][,locks=host]"},
        {"type": "null", "description": "~, your home"},
        {
            "type": "object",
            "properties": {
                "host_path": {
                    "type": ["string", "null"],
                    "description": "The folder; it begins with / or ~.",
                },
                "guest_path": {
                    "type": "string",
                    "pattern": "^/",
                    "description": "Where it is in the VM; at the same path, if it is not said.",
                },
                "read_only": {"type": "boolean"},
                "host_locks": {"type": "boolean", "description": "Locks of its files reach this machine."},
            },
            "required": ["host_path"],
            "additionalProperties": False,
        },
    ]
}


class InvalidMount(ValueError):
    """``key`` of the mount is wrong, or "" for all of it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} {reason}".strip())
        self.key = key


def from_plain(value: Any) -> MountSpec:
    """Raises ``InvalidMount``, and ``UserError`` for words that are none."""
    if value is None:
        value = "~"  # without quotes it is YAML's null
    if isinstance(value, str):
        words = parse(value)
        value = {
            "host_path": words.host_path,
            "read_only": words.read_only,
            "host_locks": words.host_locks,
            **({"guest_path": words.guest_path} if words.guest_path else {}),
        }
    if not isinstance(value, dict):
        raise InvalidMount("", f"it is the path of a folder, or a mapping with {', '.join(KEYS)}")
    return _spec(value)


def _spec(value: dict[str, Any]) -> MountSpec:
    for name in value:
        if name not in KEYS:
            raise InvalidMount(name, f"is no key of a mount; {meant(name, KEYS)}")
    for name in ("read_only", "host_locks"):
        if not isinstance(value.get(name, False), bool):
            raise InvalidMount(name, f"is {shown(value[name])}; it is true or false")
    if "host_path" not in value:
        raise InvalidMount("", "it has no host_path")
    host_path = _path("host_path", "~" if value["host_path"] is None else value["host_path"])
    guest_path = _path("guest_path", value["guest_path"]) if "guest_path" in value else host_path
    return MountSpec(host_path, guest_path, value.get("read_only", False), value.get("host_locks", False))


def _path(name: str, value: Any) -> str:
    expanded = os.path.expanduser(value) if isinstance(value, str) and name == "host_path" else value
    if not isinstance(expanded, str) or not expanded.startswith("/"):
        begins = "/ or ~/" if name == "host_path" else "/"
        raise InvalidMount(name, f"is {shown(value)}; it is a path that begins with {begins}")
    return normal(expanded)


def as_plain(spec: MountSpec) -> str | dict[str, Any]:
    """The path where that says it all, else a mapping."""
    options: dict[str, Any] = {}
    if spec.guest_path != spec.host_path:
        options["guest_path"] = spec.guest_path
    for name in ("read_only", "host_locks"):
        if getattr(spec, name):
            options[name] = True
    if not options and _is_word(spec):
        return spec.host_path
    return {"host_path": spec.host_path, **options}


def _is_word(spec: MountSpec) -> bool:
    try:
        words = parse(spec.host_path)
    except UserError:
        return False
    return (words.host_path, words.host_locks, words.read_only) == (spec.host_path, False, False)
