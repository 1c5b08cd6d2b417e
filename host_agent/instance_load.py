"""How busy an instance is: what flows between two looks at what has flowed.

The law: a rate is never negative and never a guess. What was counted anew in between (a guest that booted again, a file
server that was started again) counts as nothing for that once, and so does what only one of the two looks has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from protocol.api import (
    ContainerUsage,
    Forward,
    ForwardState,
    GuestUsage,
    InstanceStatus,
    Mount,
    MountState,
    Stage,
    Usage,
)


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """A process of this machine: ``cpu``, seconds of one processor since its start; ``memory``, bytes now."""

    pid: int
    cpu: float
    memory: int


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that is known at a moment. ``at`` is of a clock that is never set, ``time`` since the epoch, in s."""

    at: float
    time: float
    status: InstanceStatus
    usage: Usage
    mounts: list[Mount]
    forwards: list[Forward]
    processes: Mapping[str, ProcessUsage]
    disk_allocated: int
    disk_free: int


@dataclass(frozen=True, slots=True)
class GuestLoad:
    """``cpu_*`` are processors kept busy (1.0 is one of ``cpus``), traffic is bytes a second, the rest as in
    ``GuestUsage``."""

    cpus: int
    cpu_busy: float
    cpu_waiting: float
    cpu_stolen: float
    load: list[float]
    processes: int
    memory_total: int
    memory_available: int
    memory_cache: int
    data_total: int
    data_free: int
    data_read: float
    data_written: float
    network_received: float
    network_sent: float


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """A process of this machine: processors that it keeps busy, bytes of memory."""

    name: str
    pid: int
    cpu: float
    memory: int


@dataclass(frozen=True, slots=True)
class ContainerLoad:
    """The same of a container."""

    id: str
    name: str
    cpu: float
    memory: int
    processes: int


@dataclass(frozen=True, slots=True)
class MountLoad:
    """Calls a second, and bytes a second that they bring to the VM and take from it."""

    path: str
    state: MountState
    calls: float
    read: float
    written: float


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an instance is, over the last ``interval`` seconds.

    ``received`` and ``sent``: bytes a second that connections bring from the VM and take to it. ``disk_allocated`` of
    its data disk's bytes are on this machine's disk, which has ``disk_free``. ``ports`` are those that are not ignored.
    """

    time: float
    interval: float
    name: str
    stage: Stage
    guest: GuestLoad | None
    processes: list[ProcessLoad]
    disk_allocated: int
    disk_free: int
    received: float
    sent: float
    containers: list[ContainerLoad]
    mounts: list[MountLoad]
    ports: list[Forward]


def between(before: Look, after: Look) -> Load:
    """What flowed between the two, which may be the same one."""
    interval = after.at - before.at
    guest, guest_before = after.usage.guest, before.usage.guest
    return Load(
        time=after.time,
        interval=round(interval, 3),
        name=after.status.name,
        stage=after.status.stage,
        guest=None if guest is None else _guest(guest_before, guest),
        processes=[
            ProcessLoad(
                name, now.pid, _rate(_same(before.processes, name, now), now.cpu, interval), now.memory
            )
            for name, now in after.processes.items()
        ],
        disk_allocated=after.disk_allocated,
        disk_free=after.disk_free,
        received=_rate(before.usage.received, after.usage.received, interval),
        sent=_rate(before.usage.sent, after.usage.sent, interval),
        containers=[] if guest is None else _containers(guest_before, guest),
        mounts=_mounts(before.mounts, after.mounts, interval),
        ports=[row for row in after.forwards if row.state is not ForwardState.IGNORED],
    )


def as_object(load: Load) -> dict[str, Any]:
    """As JSON has it; the keys are those of the dataclasses."""
    return asdict(load)


def _rate(before: float | None, now: float, interval: float) -> float:
    """A second; 0 if it was counted anew, or nobody knows since when. Whatever a guest says comes out finite."""
    if before is None or interval <= 0:
        return 0.0
    rate = (now - before) / interval
    return round(rate, 3) if math.isfinite(rate) and rate > 0 else 0.0


def _same(processes: Mapping[str, ProcessUsage], name: str, now: ProcessUsage) -> float | None:
    before = processes.get(name)
    return before.cpu if before is not None and before.pid == now.pid else None


def _guest(before: GuestUsage | None, now: GuestUsage) -> GuestLoad:
    interval = 0.0 if before is None else now.time - before.time

    def rate(name: str) -> float:
        return 0.0 if before is None else _rate(getattr(before, name), getattr(now, name), interval)

    return GuestLoad(
        cpus=now.cpus,
        cpu_busy=rate("cpu_busy"),
        cpu_waiting=rate("cpu_waiting"),
        cpu_stolen=rate("cpu_stolen"),
        load=[each if math.isfinite(each) else 0.0 for each in now.load],
        processes=now.processes,
        memory_total=now.memory_total,
        memory_available=now.memory_available,
        memory_cache=now.memory_cache,
        data_total=now.data_total,
        data_free=now.data_free,
        data_read=rate("data_read"),
        data_written=rate("data_written"),
        network_received=rate("network_received"),
        network_sent=rate("network_sent"),
    )


def _containers(before: GuestUsage | None, now: GuestUsage) -> list[ContainerLoad]:
    """Those with the most to do first, then those with the most memory."""
    known: dict[str, ContainerUsage] = {} if before is None else {each.id: each for each in before.containers}
    interval = 0.0 if before is None else now.time - before.time
    rows = [
        ContainerLoad(
            each.id,
            each.name,
            _rate(known[each.id].cpu if each.id in known else None, each.cpu, interval),
            each.memory,
            each.processes,
        )
        for each in now.containers
    ]
    return sorted(rows, key=lambda row: (-row.cpu, -row.memory, row.name))


def _mounts(before: list[Mount], now: list[Mount], interval: float) -> list[MountLoad]:
    known = {each.spec.guest_path: each for each in before}
    rows = []
    for mount in now:
        past = known.get(mount.spec.guest_path)
        counted_on = past is not None and past.calls <= mount.calls
        read, written, calls = (
            (past.bytes_read, past.bytes_written, past.calls)
            if past is not None and counted_on
            else (None,) * 3
        )
        rows.append(
            MountLoad(
                mount.spec.guest_path,
                mount.state,
                _rate(calls, mount.calls, interval),
                _rate(read, mount.bytes_read, interval),
                _rate(written, mount.bytes_written, interval),
            )
        )
    return rows
