"""What the user asked of an instance, kept across starts, and whether this host can give it.

The law: a number that the host cannot honour is refused before anything starts, with what it can do;
a disk never shrinks, since that would lose what is on it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from host_agent import mounts, sizes
from host_agent.errors import ExitCode, UserError
from host_agent.files import parse_record, write_atomically
from protocol.api import MountSpec

MIB = 1 << 20
GIB = 1 << 30

#: dockerd, containerd and the agent need about 300 MiB; below this the first image pull meets the OOM killer.
MIN_MEMORY = 512 * MIB

#: An ext4 with Docker's own folders and one ordinary image.
MIN_DISK = 2 * GIB

#: The largest file that ext4 on the host can hold is 16 TiB less one block (ext4(5)).
MAX_DISK = 15 << 40

#: What the host keeps at the least, for itself and for QEMU's own needs.
HOST_RESERVE = 512 * MIB

ACCELERATORS = ("auto", "kvm", "hvf", "tcg")


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
    """An instance as it was asked for. Sizes in bytes; ``identity`` is a UUID, the guest's machine-id.

    A file of before there were mounts means the user's home. ``bulk``: payloads through memory shared with the VM.
    """

    cpus: int
    memory: int
    disk: int
    accelerator: str
    identity: str
    mounts: tuple[MountSpec, ...] = field(default_factory=mounts.default)
    bulk: bool = True

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


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the flags of one ``up`` ask for; None keeps what is configured."""

    cpus: int | None = None
    memory: int | None = None
    disk: int | None = None
    accelerator: str | None = None
    mounts: tuple[MountSpec, ...] | None = None
    bulk: bool | None = None

    def applied(self, config: InstanceConfig) -> InstanceConfig:
        return replace(
            config,
            cpus=config.cpus if self.cpus is None else self.cpus,
            memory=config.memory if self.memory is None else self.memory,
            disk=config.disk if self.disk is None else self.disk,
            accelerator=self.accelerator or config.accelerator,
            mounts=config.mounts if self.mounts is None else self.mounts,
            bulk=config.bulk if self.bulk is None else self.bulk,
        )


def load(path: Path, host: Host) -> InstanceConfig:
    """The configuration at ``path``, or the default where there is none yet.

    Raises ``UserError`` for a file that is not a configuration: guessing could lose what was asked for.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return InstanceConfig.default(host)
    try:
        config = parse_record(InstanceConfig, content)
        uuid.UUID(config.identity)
        mounts.check(config.mounts)
    except (ValueError, UserError) as error:
        raise UserError(
            f"{path} is damaged ({error})",
            f"correct it, or remove it to start from the defaults: rm {path}",
            ExitCode.USAGE,
        ) from error
    return config


def save(path: Path, config: InstanceConfig) -> None:
    write_atomically(path, json.dumps(asdict(config), indent=1).encode() + b"\n")


def check(config: InstanceConfig, host: Host) -> None:
    """Raise ``UserError`` if this host cannot run ``config``."""
    if config.cpus < 1:
        raise _refused(f"a VM needs at least 1 cpu; asked for {config.cpus}", f"--cpus 1 to {host.cpus}")
    if config.cpus > host.cpus:
        raise _refused(
            f"this machine has {host.cpus} cpus; asked for {config.cpus}", f"--cpus 1 to {host.cpus}"
        )
    memory_hint = f"--memory {sizes.flag(MIN_MEMORY)} to {host.most_memory // MIB}MiB"
    if config.memory < MIN_MEMORY:
        raise _refused(
            f"a VM needs at least {sizes.show(MIN_MEMORY)} of memory; asked for {sizes.show(config.memory)}",
            memory_hint,
        )
    if config.memory > host.most_memory:
        raise _refused(
            f"this machine has {sizes.show(host.memory)} of memory and needs some itself;"
            f" asked for {sizes.show(config.memory)}",
            memory_hint,
        )
    if config.disk < MIN_DISK:
        raise _refused(
            f"the disk needs at least {sizes.show(MIN_DISK)}; asked for {sizes.show(config.disk)}",
            f"--disk {sizes.flag(MIN_DISK)} or more",
        )
    if config.disk > MAX_DISK:
        raise _refused(
            f"the disk can have {sizes.show(MAX_DISK)}; asked for {sizes.show(config.disk)}",
            f"--disk {sizes.flag(MIN_DISK)} to {sizes.flag(MAX_DISK)}; it can grow later",
        )
    if config.accelerator not in ACCELERATORS:
        raise _refused(f"{config.accelerator!r} is not an accelerator", f"one of {', '.join(ACCELERATORS)}")


def with_kept_disk(config: InstanceConfig, wishes: Wishes, data_disk: Path) -> InstanceConfig:
    """``config`` with the size of a disk that a deleted instance left, unless a size was asked for."""
    if wishes.disk is not None or not data_disk.exists():
        return config
    return replace(config, disk=max(config.disk, data_disk.stat().st_size))


def check_disk(config: InstanceConfig, data_disk: Path) -> None:
    """Raise ``UserError`` if ``data_disk`` exists and is larger than what is asked for, or cannot be made."""
    if data_disk.exists():
        size = data_disk.stat().st_size
        if config.disk < size:
            raise _refused(
                f"the disk has {sizes.show(size)} and never shrinks; asked for {sizes.show(config.disk)}",
                f"--disk {sizes.flag(size)} or more, or start afresh: agentctl delete --data",
            )
    free = shutil.disk_usage(data_disk.parent).free
    if free < GIB:
        raise _refused(
            f"{sizes.show(free)} are free where {data_disk} is; a VM needs at least 1 GiB to start",
            "free some space, or set AGENTCTL_HOME to a folder on a larger disk",
        )


def _refused(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.RESOURCES)
