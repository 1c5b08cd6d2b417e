"""The keys of an instance's configuration: each is a field with its kind, its default and its comment, here only.

From these come the template of the file, its JSON Schema, the checks of what people write, and what a change of it
means for an instance that runs. The law: what is not understood is refused with its place and the nearest name;
nothing is skipped or guessed, and what is left out is as it is by default.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Any

import psutil

from host_agent import guest_settings, mount_entries, mounts, network_settings, rule_text, socket_rules
from host_agent.configuration.kinds import (
    Bytes,
    Choice,
    Flag,
    HostPath,
    Integer,
    Invalid,
    Kind,
    Language,
    ListOf,
    RecordOf,
    Schema,
    Text,
    meant,
    shown,
)
from host_agent.configuration.text import Path
from host_agent.guest_settings import GuestSettings, Script
from host_agent.network_settings import NetworkSettings
from host_agent.rules import MAX_RULES, check_settings
from protocol.api import MountSpec, PortRule, PortSettings, SocketForward
from provision.recipe import DOCKER, RUNTIMES

MIB = 1 << 20
GIB = 1 << 30

#: What the host keeps at the least, for itself and for QEMU's own needs.
HOST_RESERVE = 512 * MIB

#: dockerd, containerd and the agent need about 300 MiB; below this the first image pull meets the OOM killer.
MIN_MEMORY = 512 * MIB

ACCELERATORS = ("auto", "kvm", "hvf", "tcg")

#: What is said of a mapping of keys, over it.
SECTIONS = {
    "ports": "What listens in the VM is on the same port of localhost; here is what is to be different.",
}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file: where it is, what it may be, the comment over it, and whether only a restart applies it."""

    name: str
    kind: Kind
    comment: str
    restart: bool

    @property
    def path(self) -> Path:
        return tuple(self.name.split("."))


def key(
    name: str,
    kind: Kind,
    *,
    comment: str,
    restart: bool = False,
    default: Any = MISSING,
    default_factory: Any = MISSING,
) -> Any:
    """A field of the configuration. ``name`` is dotted in a section; ``comment`` is for people, of lines of up to
    100 characters."""
    metadata = {"key": Key(name, kind, comment, restart)}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine has. ``memory`` is in bytes."""

    cpus: int
    memory: int

    @classmethod
    def measure(cls) -> Host:
        return cls(cpus=os.cpu_count() or 1, memory=psutil.virtual_memory().total)

    @property
    def most_memory(self) -> int:
        """What a VM may have of it."""
        return max(self.memory - HOST_RESERVE, MIN_MEMORY)


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """An instance as it was asked for. Sizes in bytes; ``identity`` is a UUID, the guest's machine-id, and not in the
    file, which is for people. ``bulk``: payloads through memory shared with the VM. ``rules``, ``lan`` and
    ``privileged_offset`` are those of ``PortSettings``.
    """

    cpus: int = key("cpus", Integer(), restart=True, comment="Processors of the VM.")
    memory: int = key("memory", Bytes(), restart=True, comment="Memory of the VM, like 4GiB or 512MiB.")
    disk: int = key("disk", Bytes(), comment="Size of the data disk, like 60GiB. It only grows.")
    accelerator: str = key(
        "accelerator",
        Choice(*ACCELERATORS),
        restart=True,
        comment="What runs the VM: auto tries what this machine has; kvm, hvf; tcg is emulation.",
    )
    identity: str = ""
    bulk: bool = key(
        "bulk",
        Flag(),
        default=True,
        restart=True,
        comment="Whether data goes through memory shared with the VM, which is faster.",
    )
    mounts: tuple[MountSpec, ...] = key(
        "mounts",
        ListOf(
            Language(mount_entries.from_plain, mount_entries.as_plain, mount_entries.SCHEMA),
            mounts.MAX_MOUNTS,
            mounts.check,
        ),
        default_factory=mounts.default,
        comment="""\
Folders of this machine that the VM sees: PATH[:GUESTPATH][:ro][,locks=host], or with all words
  - host_path: /srv/data
    guest_path: /data     # the same path, if it is not said
    read_only: true
    host_locks: true      # locks of its files reach this machine
What is added is there with the next `agentctl up`, also in a VM that runs.""",
    )
    lan: bool = key(
        "ports.lan",
        Flag(),
        default=False,
        comment="Whether other machines reach what listens on all addresses of the VM.",
    )
    privileged_offset: int = key(
        "ports.privileged_offset",
        Integer(check=lambda offset: check_settings(PortSettings(privileged_offset=offset))),
        default=0,
        comment="Added to ports below 1024, which may need a privilege here: with 10000, 80 is 10080.",
    )
    rules: tuple[PortRule, ...] = key(
        "ports.rules",
        ListOf(Language(rule_text.from_json, rule_text.as_json, rule_text.SCHEMA), MAX_RULES),
        default=(),
        comment="""\
Ports that are to be elsewhere, or nowhere; the first rule that matches wins.
  - guest_port: 8000-8010     # or one
    host_port: 9000-9010
    host_ip: 0.0.0.0          # other machines reach them; without it only this one
    proto: tcp                # tcp, udp; without it both
  - guest_port: 5432
    host_socket: ~/db.sock
    static: true              # there before anybody listens
  - guest_port: 9000
    ignore: true
guest_ip and guest_ip_must_be_zero mean what they mean in Lima.""",
    )
    sockets: tuple[SocketForward, ...] = key(
        "sockets",
        ListOf(
            RecordOf(SocketForward, {"guest": Text(), "host": HostPath(), "reverse": Flag()}),
            socket_rules.MAX_SOCKETS,
            socket_rules.check,
        ),
        default=(),
        comment="""\
Unix sockets of the VM that appear on this machine or, with reverse, of this machine in the VM.
  - guest: /run/db.sock
    host: ~/db.sock
  - guest: /run/ssh-agent.sock
    host: /run/user/1000/keyring/ssh   # or localhost:5432
    reverse: true""",
    )
    network: NetworkSettings = key(
        "network",
        Language(network_settings.from_json, network_settings.in_full, network_settings.SCHEMA),
        default_factory=NetworkSettings,
        restart=True,
        comment="""\
What the VM finds of this machine's network.
dns: servers instead of this machine's resolver, like 192.0.2.53 or 127.0.0.1:5353.
hosts: names of the VM's own, like db.test: 192.0.2.7
proxies: environment (of `agentctl up`), none, or http_proxy: http://..., https_proxy, no_proxy, ...
ca_certificates: files, and "host" for what this machine trusts.""",
    )

    runtime: str = key(
        "runtime",
        Choice(*RUNTIMES),
        default=DOCKER,
        restart=True,
        comment="""\
What runs the containers: docker; podman, which answers Docker's command line, too; or containerd alone,
with its socket at containerd.sock of the instance, and ctr in the VM. Each has an image of the VM and its
own containers on the data disk; to change it back brings the others back.""",
    )
    docker: str = key(
        "docker",
        Language(guest_settings.docker, json.loads, guest_settings.DOCKER_SCHEMA),
        default=guest_settings.NO_DOCKER,
        comment="""\
Settings of dockerd, with their names and values as in daemon.json, like
registry-mirrors: [https://mirror.example]
To change them restarts Docker, but for those that it takes up as it runs (mirrors are).""",
    )
    environment: tuple[tuple[str, str], ...] = key(
        "environment",
        Language(guest_settings.environment, dict, guest_settings.ENVIRONMENT_SCHEMA),
        default=(),
        comment="""\
Variables of shells and commands in the VM, and of Docker itself; not of containers.
EDITOR: nano""",
    )
    provision: tuple[Script, ...] = key(
        "provision",
        Language(guest_settings.provision, guest_settings.provision_as_json, guest_settings.PROVISION_SCHEMA),
        default=(),
        comment="""\
Scripts that run in the VM at each start, once Docker is there; they must stand being run twice.
mode is system (root) or user; instead of script there may be a file of this machine.
  - script: apt-get update && apt-get install -y htop
  - mode: user
    name: dotfiles
    file: ~/dotfiles/install.sh""",
    )
    ssh_agent: bool = key(
        "ssh_agent",
        Flag(),
        default=False,
        comment="""\
Whether your SSH agent is in the VM, at $SSH_AUTH_SOCK, and for containers that mount /run/host-services.""",
    )
    architectures: tuple[str, ...] = key(
        "architectures",
        Language(guest_settings.architectures, list, guest_settings.ARCHITECTURES_SCHEMA),
        default=(),
        comment="""\
Whose programs and images run in the VM besides its own, by emulation: arm64, riscv64, ...
The emulators are fetched from Debian the first time (70 MB).""",
    )
    autostart: bool = key(
        "autostart",
        Flag(),
        default=False,
        comment="Whether the VM starts when you log in, by your systemd; `up` sees to it.",
    )
    docker_sock: bool = key(
        "docker_sock",
        Flag(),
        default=False,
        comment="""\
Whether /var/run/docker.sock of this machine is to lead to this VM, if nothing else is there.
Where that needs root, `up` says what to type.""",
    )

    @property
    def guest(self) -> GuestSettings:
        return GuestSettings(**{name: getattr(self, name) for name in guest_settings.KEYS})

    def with_guest(self, guest: GuestSettings) -> InstanceConfig:
        return replace(self, **{name: getattr(guest, name) for name in guest_settings.KEYS})

    @property
    def ports(self) -> PortSettings:
        return PortSettings(list(self.rules), self.lan, self.privileged_offset)

    @classmethod
    def default(cls, host: Host) -> InstanceConfig:
        """All of the host's processors and a quarter of its memory, 4 of each at the most; a 60 GiB disk."""
        memory = min(4 * GIB, max(host.memory // 4, GIB), host.most_memory) // MIB * MIB
        return cls(
            cpus=max(1, min(4, host.cpus)),
            memory=memory,
            disk=60 * GIB,
            accelerator="auto",
            identity=str(uuid.uuid4()),
        )


@cache
def keys() -> Mapping[str, Key]:
    """By the name of the field; in the order of the file."""
    return {part.name: part.metadata["key"] for part in fields(InstanceConfig) if "key" in part.metadata}


def find(path: Path) -> tuple[str, Key] | None:
    """The field and the key that ``path`` is, or is in."""
    for name, found in keys().items():
        if path[: len(found.path)] == found.path:
            return name, found
    return None


# --- from plain values, and back -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """What the values of a file say, by field; ``errors`` about all the rest of it, in its order."""

    values: Mapping[str, Any]
    errors: tuple[Invalid, ...]


def read(values: Any) -> Reading:
    """Understand the values of a file; None is an empty one."""
    if values is None:
        return Reading({}, ())
    if not isinstance(values, dict):
        return Reading({}, (Invalid(("the file",), f"is {shown(values)}; it is keys with their values"),))
    found: dict[str, Any] = {}
    errors: list[Invalid] = []
    for path, value in _leaves(values, (), errors):
        place = find(path)
        if place is None or place[1].path != path:
            errors.append(Invalid(path, f"is no key; {meant_by(path)}"))
            continue
        try:
            found[place[0]] = place[1].kind.read(value, path)
        except Invalid as error:
            errors.append(error)
    return Reading(found, tuple(errors))


def _leaves(values: Mapping[str, Any], prefix: Path, errors: list[Invalid]) -> Iterator[tuple[Path, Any]]:
    """What is not a section, by its path."""
    for name, value in values.items():
        path = (*prefix, name)
        if not _is_section(path):
            yield path, value
        elif isinstance(value, dict):
            yield from _leaves(value, path, errors)
        elif value is not None:
            errors.append(Invalid(path, f"is {shown(value)}; it is a mapping"))


def _is_section(path: Path) -> bool:
    return any(len(one.path) > len(path) and one.path[: len(path)] == path for one in keys().values())


def meant_by(path: Path) -> str:
    """The nearest name beside it, or the same one in another place."""
    prefix, name = path[:-1], path[-1]
    same = [one.name for one in keys().values() if one.path[-1] == name]
    if same:
        return f"did you mean {same[0]}?"
    beside = [str(one.path[len(prefix)]) for one in keys().values() if one.path[: len(prefix)] == prefix]
    clause = meant(name, dict.fromkeys(beside))
    if not clause.startswith("did you mean"):
        names = {str(one.path[-1]): one.name for one in keys().values()}
        other = meant(name, names)
        if other.startswith("did you mean"):
            return f"did you mean {names[other[len('did you mean ') : -1]]}?"
    return clause


def plain(config: InstanceConfig) -> dict[str, Any]:
    """All of it as the file has it, but what is not in the file."""
    values: dict[str, Any] = {}
    for name, one in keys().items():
        place = values
        for part in one.path[:-1]:
            place = place.setdefault(str(part), {})
        place[str(one.path[-1])] = one.kind.plain(getattr(config, name))
    return values


def schema() -> Schema:
    """JSON Schema (draft 7, which editors know) of the file."""
    root: Schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "An instance of agentctl",
        **_object(""),
    }
    for one in keys().values():
        place = root
        for number, part in enumerate(one.path[:-1], 1):
            section = ".".join(str(name) for name in one.path[:number])
            place = place["properties"].setdefault(part, _object(SECTIONS.get(section, "")))
        place["properties"][one.path[-1]] = {"description": one.comment, **one.kind.schema()}
    return root


def _object(description: str) -> Schema:
    said = {"description": description} if description else {}
    return {"type": ["object", "null"], "properties": {}, "additionalProperties": False, **said}
