"""What is to run in the VM besides Docker as it is: dockerd's settings, variables, scripts, foreign programs; pure.

The law: whatever is not understood is refused with its key and the reason; nothing is skipped or guessed. What is
written again is understood as the same settings. Without the keys, the VM is as the image has it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from host_agent.configuration.kinds import Schema
from host_agent.network_settings import InvalidSetting

KEYS = ("docker", "environment", "provision", "ssh_agent", "architectures")

NO_DOCKER = "{}"

#: What agentctl says itself, and in a clause why nobody else may.
DOCKER_REFUSED = {
    "config-file": "it is what these settings become",
    "containerd": "it is the VM's",
    "data-root": "images and volumes are on the VM's data disk",
    "exec-root": "it is the VM's",
    "group": "it is the VM's, and your user is in it",
    "host": "dockerd's socket comes to you as docker.sock of the instance",
    "hosts": "dockerd's socket comes to you as docker.sock of the instance",
    "host-gateway-ip": "it is where containers find your machine",
    "pidfile": "it is the VM's",
    "userland-proxy": "by its proxies published ports come to your localhost",
}

#: What a login sets, and the guest's agent does.
ENVIRONMENT_REFUSED = ("HOME", "LOGNAME", "PATH", "SHELL", "USER")

#: The guest's agent takes no more (guest_agent.docker_settings, guest_agent.host_network).
MAX_DOCKER = 64 * 1024
MAX_VALUE = 8192
MAX_VARIABLES = 256

#: Characters of all of them. They go to the guest in one message, with certificates.
MAX_ENVIRONMENT = 32 * 1024

SYSTEM, USER = "system", "user"
MODES = (SYSTEM, USER)
SCRIPT_KEYS = ("mode", "name", "script", "file")
MAX_SCRIPTS = 64
MAX_SCRIPT = 1 << 20
"""Bytes of a script."""

#: By Debian's name, what QEMU's emulator of it is called, and what else people call it (uname -m, Docker).
ARCHITECTURES = {
    "amd64": ("x86_64",),
    "arm64": ("aarch64",),
    "armhf": ("arm", "armv7l", "armv7"),
    "i386": ("386", "i686"),
    "loong64": ("loongarch64",),
    "ppc64el": ("ppc64le",),
    "riscv64": (),
    "s390x": (),
}

DOCKER_SCHEMA: Schema = {
    "type": ["object", "null"],
    "propertyNames": {"pattern": "^[a-z0-9]+(-[a-z0-9]+)*$", "not": {"enum": sorted(DOCKER_REFUSED)}},
}
ENVIRONMENT_SCHEMA: Schema = {
    "type": ["object", "null"],
    "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "not": {"enum": [*ENVIRONMENT_REFUSED]}},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE},
}
PROVISION_SCHEMA: Schema = {
    "type": ["array", "null"],
    "maxItems": MAX_SCRIPTS,
    "items": {
        "type": ["object", "string"],
        "properties": {
            "mode": {"enum": [*MODES], "description": "system: root; user: your user in the VM."},
            "name": {"type": "string", "description": "How it is called in what is said of it."},
            "script": {"type": "string", "description": "Its text; without a #! line it is bash's."},
            "file": {"type": "string", "description": "Where it is on this machine; begins with / or ~/."},
        },
        "additionalProperties": False,
    },
}
ARCHITECTURES_SCHEMA: Schema = {
    "type": ["array", "null"],
    "items": {"enum": [word for name, others in ARCHITECTURES.items() for word in (name, *others)]},
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_SCRIPT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Script:
    """Run at each boot, as root or (``mode`` "user") as the default user. Either its text or its file on the host."""

    mode: str = SYSTEM
    name: str = ""
    script: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """``docker`` is a JSON object, merged into daemon.json. ``architectures`` have Debian's names."""

    docker: str = NO_DOCKER
    environment: tuple[tuple[str, str], ...] = ()
    provision: tuple[Script, ...] = ()
    ssh_agent: bool = False
    architectures: tuple[str, ...] = ()


def docker(values: object) -> str:
    """dockerd's settings, as JSON text. Raises ``InvalidSetting``."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InvalidSetting("docker", "has settings of dockerd, each with its name as in daemon.json")
    for key in values:
        if not isinstance(key, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key):
            near = str(key).lower().replace("_", "-")
            raise InvalidSetting(str(key), f"is no setting of dockerd; as in daemon.json: {near}")
        if key in DOCKER_REFUSED:
            raise InvalidSetting(key, f"is not for docker settings: {DOCKER_REFUSED[key]}")
        if key.startswith("tls"):
            raise InvalidSetting(key, "is not for docker settings: dockerd listens on no port")
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidSetting("docker", f"has a value that JSON has no word for: {error}") from None
    if json.loads(text) != values:
        raise InvalidSetting("docker", "has a key that is no text; put it in quotes")
    if len(text) > MAX_DOCKER:
        raise InvalidSetting("docker", f"is longer than {MAX_DOCKER} bytes")
    return text


def environment(values: object) -> tuple[tuple[str, str], ...]:
    """Variables by name. Raises ``InvalidSetting``."""
    values = {} if values is None else values
    if not isinstance(values, dict) or len(values) > MAX_VARIABLES:
        raise InvalidSetting("environment", f"has up to {MAX_VARIABLES} variables, each with its value")
    for name, value in values.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidSetting(str(name), "cannot be the name of a variable")
        if name in ENVIRONMENT_REFUSED:
            raise InvalidSetting(name, "is set by each login in the VM, and cannot be set here")
        if not isinstance(value, str):
            raise InvalidSetting(name, f"is {json.dumps(value, default=str)}; put it in quotes")
        if len(value) > MAX_VALUE or not value.isprintable():
            raise InvalidSetting(name, f"is one line of up to {MAX_VALUE} characters")
    if sum(len(name) + len(value) for name, value in values.items()) > MAX_ENVIRONMENT:
        raise InvalidSetting("environment", f"has more than {MAX_ENVIRONMENT} characters")
    return tuple(values.items())


def provision(values: object) -> tuple[Script, ...]:
    """Scripts in the order in which they run. Raises ``InvalidSetting``."""
    values = [] if values is None else values
    if not isinstance(values, list) or len(values) > MAX_SCRIPTS:
        raise InvalidSetting("provision", f"is a list of up to {MAX_SCRIPTS} scripts")
    return tuple(_script(number, value) for number, value in enumerate(values, 1))


def _script(number: int, values: object) -> Script:
    if isinstance(values, str):
        values = {"script": values}
    if not isinstance(values, dict):
        raise InvalidSetting("provision", f"has as script {number} neither text nor {', '.join(SCRIPT_KEYS)}")
    for key, value in values.items():
        if key not in SCRIPT_KEYS:
            raise InvalidSetting(str(key), f"is no key of a script; {_meant(str(key), SCRIPT_KEYS)}")
        if not isinstance(value, str) or "\0" in value:
            raise InvalidSetting(key, f"of script {number} is no text")
    script = Script(**values)
    if script.mode not in MODES:
        raise InvalidSetting("mode", f'of script {number} is "{SYSTEM}" (root) or "{USER}"')
    if bool(script.script.strip()) == bool(script.file):
        raise InvalidSetting("provision", f"has a script {number} with not just one of script and file")
    if script.file and not script.file.startswith(("/", "~/")):
        raise InvalidSetting("file", f"of script {number} is {script.file!r}; a path begins with / or ~/")
    if len(script.script.encode()) > MAX_SCRIPT:
        raise InvalidSetting("script", f"of script {number} is longer than {MAX_SCRIPT} bytes")
    if script.name and not _SCRIPT_NAME.fullmatch(script.name):
        raise InvalidSetting("name", f"of script {number} is {script.name!r}; letters, digits, and . _ -")
    return script


def provision_as_json(scripts: Sequence[Script]) -> list[dict[str, str]]:
    """What ``provision`` understands as ``scripts``; what is as it is by default is left out."""
    return [_script_as_json(script) for script in scripts]


def _script_as_json(script: Script) -> dict[str, str]:
    values = {key: str(getattr(script, key)) for key in SCRIPT_KEYS}
    return {key: value for key, value in values.items() if value and (key, value) != ("mode", SYSTEM)}


def architectures(values: object) -> tuple[str, ...]:
    """Architectures by Debian's names. Raises ``InvalidSetting``."""
    values = [] if values is None else values
    if not isinstance(values, list):
        raise InvalidSetting("architectures", f"is a list; possible are {', '.join(ARCHITECTURES)}")
    return tuple(dict.fromkeys(_architecture(value) for value in values))


def _architecture(value: object) -> str:
    plain = str(value).lower().removeprefix("linux/")
    for name, others in ARCHITECTURES.items():
        if plain == name or plain in others:
            return name
    raise InvalidSetting("architectures", f"has {value!r}; {_meant(plain, tuple(ARCHITECTURES))}")


def _meant(word: str, possible: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word.lower(), possible, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"possible are {', '.join(possible)}"
