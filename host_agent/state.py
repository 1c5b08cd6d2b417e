"""What is remembered of an instance between commands, and the locks that say who is alive.

The law: no pid is ever believed. An instance runs if somebody holds its lock, which the kernel lets go
of at any death, and at a power cut; what a file says can only explain.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from host_agent.files import parse_record, write_atomically

#: Who only asks whether a lock is held (``is_locked``) holds it for some microseconds; that is waited out.
_ATTEMPTS = 5
_PAUSE = 0.005


@dataclass(frozen=True, slots=True)
class InstanceState:
    """``wanted`` says whether a dead host agent is to be started again; times in s since the epoch.

    ``stopping`` says that the instance was being stopped, which a new host agent must go on with.
    ``failure`` and ``hint`` tell why the last run ended if it was not asked to; ``boot_restarts`` counts QEMU
    starts of this run beyond the first, ``agent_restarts`` those of the host agent. ``bulk_memory`` is what the VM
    shares with the host, in bytes, and ``bulk_reason`` why that is 0. ``host_keys`` are those of the VM's sshd, one in
    each line.
    """

    wanted: bool = False
    started_at: float = 0.0
    failure: str = ""
    hint: str = ""
    failure_code: int = 0
    boot_restarts: int = 0
    agent_restarts: int = 0
    previous_context: str | None = None
    accelerator: str = ""
    accelerator_reason: str = ""
    stopping: bool = False
    bulk_memory: int = 0
    bulk_reason: str = ""
    host_keys: str = ""


def load(path: Path) -> InstanceState:
    """The state at ``path``; a missing or damaged file is an instance that never ran."""
    try:
        return parse_record(InstanceState, path.read_bytes())
    except (OSError, ValueError):
        return InstanceState()


def save(path: Path, state: InstanceState) -> None:
    write_atomically(path, json.dumps(asdict(state)).encode())


def try_lock(path: Path) -> int | None:
    """Lock ``path``; the descriptor that holds the lock, or None if somebody else has it."""
    for _ in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _flock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        time.sleep(_PAUSE)
    return None


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that any number may ask at once without taking each other for the holder.
        return not _flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the locked file: ``delete`` may have removed it before we had the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of ``path`` if it is free; says whether it is held."""
    descriptor = try_lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
