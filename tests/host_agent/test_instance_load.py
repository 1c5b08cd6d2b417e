"""What flows between two looks: never negative, never a guess."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from host_agent.instance_load import Load, Look, ProcessUsage, as_object, between
from protocol.api import (
    ContainerUsage,
    Forward,
    ForwardState,
    GuestUsage,
    InstanceStatus,
    Mount,
    MountSpec,
    MountState,
    Proto,
    Stage,
    Usage,
)

STATUS = InstanceStatus(
    *("default", Stage.RUNNING, "ready", "", "kvm", 2, 1 << 30, 1 << 34, "img", 5, 6, 7.0, 0, True),
    *("d", "d", "/docker.sock", "agentctl"),
)
WEB, DATABASE = ContainerUsage("ab12", "web", 1.0, 100, 2), ContainerUsage("cd34", "db", 2.0, 200, 5)
GUEST = GuestUsage(
    time=100.0,
    cpus=2,
    cpu_busy=10.0,
    cpu_waiting=1.0,
    cpu_stolen=0.0,
    load=[0.5, 0.25, 0.1],
    processes=77,
    memory_total=4096,
    memory_available=3000,
    memory_cache=500,
    data_total=9000,
    data_free=8000,
    data_read=1000,
    data_written=2000,
    network_received=10,
    network_sent=20,
    containers=[WEB, DATABASE],
)
HOME = Mount(MountSpec("/home/me", "/home/me"), MountState.MOUNTED, calls=10, bytes_read=100, bytes_written=7)
PORT = Forward(
    Proto.TCP, "::", 80, "localhost", 8080, ForwardState.LISTENING, process="nginx", container="web"
)
INSIDE = Forward(Proto.TCP, "::", 22, "", 0, ForwardState.IGNORED)
LOOK = Look(
    at=1000.0,
    time=1_700_000_000.0,
    status=STATUS,
    usage=Usage(5000, 6000, GUEST),
    mounts=[HOME],
    forwards=[PORT, INSIDE],
    processes={"qemu": ProcessUsage(5, 30.0, 1 << 30), "host-agent": ProcessUsage(6, 1.0, 1 << 20)},
    disk_allocated=1 << 30,
    disk_free=1 << 33,
)


def later(seconds: float = 2.0, guest: GuestUsage | None = GUEST, **changes: object) -> Look:
    return replace(
        LOOK,
        at=LOOK.at + seconds,
        time=LOOK.time + seconds,
        usage=replace(LOOK.usage, guest=guest),
        **changes,  # type: ignore[arg-type]
    )


def test_what_flows_is_a_second() -> None:
    guest = replace(
        GUEST,
        time=104.0,  # its clock is its own: it may have stood still, or been late
        cpu_busy=14.0,
        cpu_waiting=3.0,
        cpu_stolen=1.0,
        data_read=5000,
        data_written=2000,
        network_received=50,
        network_sent=60,
        containers=[replace(DATABASE, cpu=2.4), replace(WEB, cpu=5.0, memory=300)],
    )
    after = later(
        guest=guest,
        mounts=[replace(HOME, calls=30, bytes_read=1100, bytes_written=7)],
        processes={"qemu": ProcessUsage(5, 33.0, 2 << 30), "host-agent": ProcessUsage(7, 90.0, 1 << 20)},
    )
    after = replace(after, usage=replace(after.usage, received=7000, sent=6500))
    load = between(LOOK, after)
    assert (load.name, load.stage, load.interval, load.time) == ("default", Stage.RUNNING, 2.0, after.time)
    assert load.guest is not None
    assert (load.guest.cpu_busy, load.guest.cpu_waiting, load.guest.cpu_stolen) == (1.0, 0.5, 0.25)
    assert (load.guest.data_read, load.guest.data_written) == (1000.0, 0.0)
    assert (load.guest.network_received, load.guest.network_sent) == (10.0, 10.0)
    assert (load.guest.memory_available, load.guest.processes, load.guest.load) == (
        3000,
        77,
        [0.5, 0.25, 0.1],
    )
    assert [(each.name, each.cpu, each.memory) for each in load.containers] == [
        ("web", 1.0, 300),
        ("db", 0.1, 200),
    ]
    assert (load.received, load.sent) == (1000.0, 250.0)
    assert [(each.calls, each.read, each.written) for each in load.mounts] == [(10.0, 500.0, 0.0)]
    # Of another process with the same name nothing is known yet.
    assert [(each.name, each.pid, each.cpu) for each in load.processes] == [
        ("qemu", 5, 1.5),
        ("host-agent", 7, 0.0),
    ]
    assert load.ports == [PORT]


def rates(load: Load) -> list[float]:
    """Everything that flows."""
    guest = load.guest
    assert guest is not None
    values = [load.received, load.sent, guest.cpu_busy, guest.cpu_waiting, guest.cpu_stolen, guest.data_read]
    values += [guest.data_written, guest.network_received, guest.network_sent]
    values += [each.cpu for each in (*load.containers, *load.processes)]
    return values + [value for each in load.mounts for value in (each.calls, each.read, each.written)]


def test_one_look_is_no_flow() -> None:
    load = between(LOOK, LOOK)
    assert load.interval == 0.0
    assert set(rates(load)) == {0.0}
    assert len(load.containers) == 2


@pytest.mark.parametrize("seconds", [2.0, 0.0])
def test_what_was_counted_anew_is_no_flow(seconds: float) -> None:
    """Of a guest that booted again, a host agent and a file server that were started again."""
    anew = GuestUsage(1.0, 2, 0.5, *(0,) * 2, [0.0] * 3, *(1,) * 10, containers=[replace(WEB, cpu=0.1)])
    mounts = [replace(HOME, calls=1, bytes_read=1 << 30)]
    load = between(LOOK, replace(later(seconds, anew, mounts=mounts), usage=Usage(1, 2, anew)))
    assert set(rates(load)) == {0.0}
    both = between(replace(LOOK, usage=Usage(0, 0, None), mounts=[], processes={}), later(seconds, GUEST))
    assert both.guest is not None
    assert both.guest.cpu_busy == 0.0
    assert [each.cpu for each in both.containers] == [0.0, 0.0]
    assert [each.calls for each in both.mounts] == [0.0]


def test_a_guest_that_does_not_answer() -> None:
    load = between(LOOK, later(guest=None))
    assert (load.guest, load.containers) == (None, [])


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -1e300])
def test_whatever_a_guest_says_is_json(odd: float) -> None:
    guest = replace(GUEST, time=102.0, cpu_busy=odd, load=[odd] * 3, containers=[replace(WEB, cpu=odd)])
    text = json.dumps(as_object(between(LOOK, later(guest=guest))), allow_nan=False)
    assert json.loads(text)["guest"]["cpu_busy"] == 0.0


def test_times_that_are_no_numbers_are_no_flow() -> None:
    load = between(LOOK, later(guest=replace(GUEST, time=math.nan, cpu_busy=20.0)))
    assert load.guest is not None
    assert load.guest.cpu_busy == 0.0
