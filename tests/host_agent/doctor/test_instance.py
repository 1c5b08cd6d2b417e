from __future__ import annotations

from dataclasses import replace

import pytest

from host_agent import state
from host_agent.doctor import instance
from host_agent.doctor.finding import Finding, Level
from host_agent.doctor.instance import Told
from host_agent.errors import ExitCode
from host_agent.paths import InstancePaths
from host_agent.state import InstanceState
from protocol.api import ControlLink, Forward, ForwardState, InstanceStatus, Proto, Stage, Transport

RUNNING = InstanceStatus(
    name="default",
    stage=Stage.RUNNING,
    detail="ready",
    hint="",
    accelerator="kvm",
    cpus=2,
    memory=2 << 30,
    disk=60 << 30,
    image="abc",
    qemu_pid=100,
    agent_pid=101,
    started_at=0.0,
    restarts=0,
    guest_connected=True,
    guest_digest="d",
    host_digest="d",
    docker_socket="/docker.sock",
    docker_context="agentctl",
    bulk_memory=64 << 20,
)
ROW = Forward(Proto.TCP, "0.0.0.0", 80, "127.0.0.1", 80, ForwardState.LISTENING)
DENIED = "port 80 needs a privilege on this host; to allow it: sudo sysctl x=80; or elsewhere"


def looked(*rows: Forward, **changes: object) -> list[Finding]:
    return instance.running(Told(replace(RUNNING, **changes), (), rows))  # type: ignore[arg-type]


def test_all_is_well() -> None:
    (finding,) = looked(ROW, replace(ROW, state=ForwardState.IGNORED))
    assert finding == Finding("instance", Level.OK, "it runs, and the VM answers")


@pytest.mark.parametrize(
    ("changes", "level", "code"),
    [
        ({"stage": Stage.BOOTING, "detail": "booting the VM", "guest_connected": False}, Level.OK, 0),
        ({"detail": "the host's disk is full", "hint": "make room"}, Level.PROBLEM, ExitCode.GENERAL),
        ({"stage": Stage.FAILED, "detail": "it ended"}, Level.PROBLEM, ExitCode.GENERAL),
        ({"stage": Stage.DOCKER, "detail": "no dockerd", "hint": "look"}, Level.PROBLEM, ExitCode.DOCKER),
        ({"guest_connected": False}, Level.PROBLEM, ExitCode.GUEST),
        ({"guest_digest": "old"}, Level.ADVICE, 0),
    ],
)
def test_what_is_wrong_with_it(changes: dict[str, object], level: Level, code: int) -> None:
    (finding,) = looked(**changes)
    assert (finding.level, finding.exit_code) == (level, code)
    assert str(changes.get("detail", "")) in finding.message


def test_no_shared_memory() -> None:
    bulk, runs = looked(bulk_memory=0, bulk_reason="qemu has no virtio-pmem-pci")
    assert (bulk.topic, bulk.level, runs.level) == ("bulk data", Level.ADVICE, Level.OK)


def test_a_control_link_that_is_not_what_a_vm_has() -> None:
    over_port = ControlLink(Transport.VIRTIO_SERIAL, 1.0)
    assert [finding.level for finding in looked(control=over_port)] == [Level.OK]
    link, runs = looked(control=ControlLink(Transport.SSH, 1.0, "silence"))
    assert (link.topic, link.level, runs.level) == ("control link", Level.ADVICE, Level.OK)
    assert link.message == "it goes over SSH: silence"
    lost = ControlLink(Transport.NONE, 1.0, "silence", "sshd is not there", "look", 3)
    link, health = looked(control=lost, guest_connected=False)
    assert (link.message, link.fix) == ("silence; nor over SSH: sshd is not there", "look")
    assert health.level is Level.PROBLEM


def test_ports_that_are_not_where_they_should_be() -> None:
    denied = replace(ROW, state=ForwardState.DENIED, reason=DENIED)
    _, finding = looked(ROW, denied)
    assert (finding.topic, finding.level) == ("ports", Level.ADVICE)
    assert finding.message == "port 80 needs a privilege on this host"
    assert finding.fix == "to allow it: sudo sysctl x=80; or elsewhere"
    taken = replace(ROW, state=ForwardState.CONFLICT, reason="port 80 is in use on the host by nginx")
    _, *found = looked(*[taken] * 7)
    assert len(found) == 6
    assert found[0].fix == "see: agentctl ports"
    assert found[-1].message == "and 2 more"


def test_at_rest() -> None:
    assert instance.at_rest(InstanceState()).level is Level.OK
    found = instance.at_rest(InstanceState(failure="the VM panicked", hint="agentctl logs"))
    assert (found.level, found.fix) == (Level.ADVICE, "agentctl logs")
    assert "the VM panicked" in found.message


async def test_nobody_is_asked_where_nobody_is(instance_paths: InstancePaths) -> None:
    assert await instance.ask(instance_paths) is None


async def test_a_host_agent_that_does_not_answer(
    instance_paths: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "RESTART_TIME", 0.05)
    with state.locked(instance_paths.lock) as ours:
        assert ours
        found = await instance.ask(instance_paths)
    assert isinstance(found, Finding)
    assert found.level is Level.PROBLEM


@pytest.fixture
def instance_paths(request: pytest.FixtureRequest) -> InstancePaths:
    """``instance`` is a module here."""
    paths: InstancePaths = request.getfixturevalue("instance")
    return paths
