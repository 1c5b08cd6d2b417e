"""How the host agent ends a VM and notices what befalls it, with a VM that a test scripts."""

from __future__ import annotations

import math
import os
import shutil
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn, cast

import pytest
import trio
import trio.testing

from host_agent import daemon, groups, ssh_agent, state, vm_watch
from host_agent.configuration import config
from host_agent.console import Farewell
from host_agent.daemon import HostAgent
from host_agent.errors import ExitCode, UserError
from host_agent.guest_settings import Script
from host_agent.paths import Home, InstancePaths
from host_agent.probe import Verdict
from host_agent.process import ProcessIdentity
from host_agent.qmp import QmpClosed, QmpEvent
from host_agent.state import InstanceState
from host_agent.vm import BootFailure, RebootPolicy, RestartPolicy, VirtualMachine
from protocol.api import ChangePorts, MountSpec, PortRule, PortSettings, Stage, StopInstance
from protocol.errors import LinkError
from provision.machine import Accelerator
from tests.host_agent import guest_values

Usage = namedtuple("Usage", "total used free")


@dataclass
class ScriptedVm:
    """Ends ``shuts_down_after`` seconds after its power button; its monitor may be dead."""

    shuts_down_after: float = 5.0
    monitor_works: bool = True
    said: list[str] = field(default_factory=list)
    state: str = "running"
    ended: bool = False
    last_words: Farewell | None = None
    identity: ProcessIdentity = field(default_factory=lambda: ProcessIdentity(4711, "a birth"))
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)

    def alive(self) -> bool:
        return not self.ended

    async def wait(self) -> str:
        with self.waiting:
            await trio.sleep_forever()
        self.ended = True
        return "QEMU ended"

    def farewell(self) -> Farewell | None:
        assert self.ended
        return self.last_words

    def ends(self, last_words: Farewell | None) -> None:
        self.last_words = last_words
        self.waiting.cancel()

    async def powerdown(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self.monitor_works:
            raise QmpClosed("no answer")
        self.said.append("powerdown")
        self.waiting.deadline = trio.current_time() + self.shuts_down_after

    async def quit(self) -> str:
        await trio.lowlevel.checkpoint()
        self.said.append("quit")
        self.waiting.cancel()
        return "QEMU ended"

    async def run_state(self) -> str:
        await trio.lowlevel.checkpoint()
        return self.state

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[NoReturn]:
        raise QmpClosed("nobody is at home")
        yield

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[QmpEvent]]:
        raise QmpClosed("no second monitor")
        yield

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        self.said.append("resume")
        self.state = "running"


@pytest.fixture
def agent(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> HostAgent:
    """An agent whose guest cannot be reached."""
    made = HostAgent(Home(instance.directory.parent.parent), instance, -1)

    async def nobody(timeout: float) -> object:
        raise LinkError("nobody there")

    monkeypatch.setattr(made._guest, "wait", nobody)
    return made


def give(agent: HostAgent, vm: ScriptedVm) -> None:
    agent._vm = cast(VirtualMachine, vm)


async def test_a_guest_without_an_agent_is_shut_down_by_its_power_button(
    agent: HostAgent, autojump_clock: trio.testing.MockClock
) -> None:
    vm = ScriptedVm()
    give(agent, vm)
    await agent._shut_down()
    assert vm.said == ["powerdown"]


async def test_an_agent_that_no_way_leads_to_is_not_waited_for(
    instance: InstancePaths, autojump_clock: trio.testing.MockClock
) -> None:
    """The port is lost, and SSH is no way: the power button is pressed at once."""
    agent, vm = HostAgent(Home(instance.directory.parent.parent), instance, -1), ScriptedVm()
    give(agent, vm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent._fallback.run)
        attending = trio.CancelScope()

        async def attend() -> None:
            with attending:
                await agent._fallback.attend(cast(VirtualMachine, vm))

        nursery.start_soon(attend)
        await trio.sleep(60)
        control = (await agent.status()).control
        assert control is not None
        assert control.problem == "the VM has not told the host key of its SSH server"
        attending.cancel()
        started = trio.current_time()
        await agent._shut_down()
        assert vm.said == ["powerdown"]
        assert trio.current_time() - started < daemon.GUEST_RETURN_TIME
        nursery.cancel_scope.cancel()


async def test_a_vm_that_stands_still_goes_on_to_shut_down(
    agent: HostAgent, autojump_clock: trio.testing.MockClock
) -> None:
    vm = ScriptedVm(state="paused")
    give(agent, vm)
    await agent._shut_down()
    assert vm.said == ["resume", "powerdown"]


async def test_one_without_room_on_the_disk_is_ended_soon(
    agent: HostAgent, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = ScriptedVm(state="io-error")

    async def resume() -> None:
        await trio.lowlevel.checkpoint()
        vm.said.append("resume")  # and is stopped again by its next write

    monkeypatch.setattr(vm, "resume", resume)
    give(agent, vm)
    started = trio.current_time()
    await agent._shut_down()
    assert vm.said == ["resume", "quit"]
    assert trio.current_time() - started < 10
    assert any("disk is full" in event.message for event in agent._events.subscribe(lambda event: None))


async def test_one_that_does_not_end_is_ended(
    agent: HostAgent, autojump_clock: trio.testing.MockClock
) -> None:
    vm = ScriptedVm(shuts_down_after=math.inf)
    give(agent, vm)
    started = trio.current_time()
    await agent._shut_down()
    assert vm.said == ["powerdown", "quit"]
    assert trio.current_time() - started >= daemon.SHUTDOWN_TIME


async def test_one_that_cannot_even_be_asked_is_ended_at_once(agent: HostAgent) -> None:
    vm = ScriptedVm(monitor_works=False)
    give(agent, vm)
    await agent._shut_down()
    assert vm.said == ["quit"]


async def test_force_asks_nobody(agent: HostAgent) -> None:
    vm = ScriptedVm()
    give(agent, vm)
    with trio.move_on_after(0):
        await agent.stop(StopInstance(force=True))
    await agent._shut_down()
    assert vm.said == ["quit"]


async def test_force_while_it_shuts_down_ends_it_at_once(
    agent: HostAgent, autojump_clock: trio.testing.MockClock
) -> None:
    vm = ScriptedVm(shuts_down_after=100)
    give(agent, vm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent._shut_down)
        await trio.sleep(10)
        assert vm.said == ["powerdown"]
        nursery.start_soon(agent.stop, StopInstance(force=True))
        await trio.sleep(1)
        assert vm.said == ["powerdown", "quit"]
        agent._over.set()
    assert trio.current_time() < 20


async def test_a_vm_that_was_not_adopted_yet_is_shut_down_all_the_same(
    agent: HostAgent, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop may come while this agent still looks for the VM of the one before it."""
    vm = ScriptedVm()

    async def adopt(_: object) -> ScriptedVm:
        await trio.lowlevel.checkpoint()
        return vm

    monkeypatch.setattr(VirtualMachine, "adopt", adopt)
    assert agent._vm is None
    await agent._shut_down()
    assert vm.said == ["powerdown"]


async def test_a_stop_is_remembered_for_whoever_comes_after_us(
    agent: HostAgent, instance: InstancePaths, autojump_clock: trio.testing.MockClock
) -> None:
    state.save(instance.state, InstanceState(wanted=True))
    with trio.move_on_after(1):
        await agent.stop(StopInstance())
    assert state.load(instance.state).stopping
    assert (await agent.status()).stage is Stage.STOPPING


async def test_a_full_disk_of_the_host_is_said_and_the_vm_goes_on_when_there_is_room(
    agent: HostAgent, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = ScriptedVm(state="io-error")
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent._vm_watch.run, vm)
        await trio.sleep(3 * vm_watch.INTERVAL)
        assert vm.said == []
        status = await agent.status()
        assert (status.detail, status.disk_state) == (vm_watch.DISK_FULL, "full")
        free = vm_watch.RESUME_SPACE
        await trio.sleep(2 * vm_watch.INTERVAL)
        assert vm.said == ["resume"]
        status = await agent.status()
        assert status.detail != vm_watch.DISK_FULL
        # It goes on, and will soon be stopped again.
        assert (status.disk_state, status.host_free) == ("low", free)
        nursery.cancel_scope.cancel()
    kinds = [event.kind for event in agent._events.subscribe(lambda event: None)]
    assert [kind for kind in kinds if kind.startswith("disk")] == ["disk-full", "disk-has-room", "disk-low"]


async def test_a_mount_that_is_added_is_kept_for_the_next_start(
    agent: HostAgent, instance: InstancePaths, autojump_clock: trio.testing.MockClock
) -> None:
    added = MountSpec("/srv/data", "/data", read_only=True)
    await agent._files.add([added])
    kept = config.load(instance, config.Host.measure()).mounts
    assert kept == agent._files.specs
    assert kept[-1] == added
    status = await agent.status()
    assert (status.mounts, status.mounts_working, status.file_server_pid) == (len(kept), 0, 0)


async def test_a_rule_of_ports_that_is_added_is_kept_for_the_next_start(
    agent: HostAgent, instance: InstancePaths
) -> None:
    web = PortRule(guest_port=80, ports=1, host_port=8080)
    agent._ports.change(ChangePorts([web], lan=True, privileged_offset=10000))
    kept = config.load(instance, config.Host.measure())
    assert kept.ports == PortSettings([web], lan=True, privileged_offset=10000)
    again = HostAgent(instance.home, instance, -1)
    assert again._ports.settings == kept.ports
    instance.config.write_text("cpus: [")
    again = HostAgent(instance.home, instance, -1)
    assert again._ports.settings == kept.ports, "also where the file is not understood just now"
    await trio.lowlevel.checkpoint()


# --- what runs in the guest -----------------------------------------------------------------------


def ask_for(instance: InstancePaths, **values: object) -> None:
    guest = guest_values.from_json(values)
    config.save(instance, config.InstanceConfig.default(config.Host.measure()).with_guest(guest))


async def test_settings_of_a_vm_that_runs_change_when_it_is_asked_for_and_not_when_an_agent_dies(
    instance: InstancePaths,
) -> None:
    home = Home(instance.directory.parent.parent)
    ask_for(instance, environment={"A": "1"})
    first = HostAgent(home, instance, -1)
    running = ProcessIdentity.of(os.getpid())
    assert running is not None
    running.write(instance.qemu_identity)
    ask_for(instance, environment={"A": "2"}, provision=["true"], ssh_agent=True)
    second = HostAgent(home, instance, -1)
    assert first._network.own == second._network.own == {"A": "1"}
    notes = await second.reload()
    assert "provision scripts run at the next start of the VM" in notes
    third = HostAgent(home, instance, -1)
    assert third._network.own == {"A": "2", "SSH_AUTH_SOCK": ssh_agent.GUEST_SOCKET}
    instance.config.write_text("nonsense")
    with pytest.raises(UserError):
        await third.reload()


async def test_scripts_run_once_docker_is_there_and_what_fails_is_in_the_status(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scripted:
        def __init__(self, scripts: Sequence[Script], *_: object) -> None:
            stages.append(tested._stage)
            assert [script.script for script in scripts] == ["exit 3"]

        async def run(self) -> list[str]:
            await trio.lowlevel.checkpoint()
            return ["it failed"]

    stages: list[Stage] = []
    monkeypatch.setattr(daemon, "Provisioning", Scripted)
    tested = HostAgent(Home(instance.directory.parent.parent), instance, -1)
    await tested._provision()
    assert stages == []
    ask_for(instance, provision=["exit 3"])
    instance.running_config.unlink()
    tested = HostAgent(Home(instance.directory.parent.parent), instance, -1)
    await tested._provision()
    assert stages == [Stage.PROVISIONING]
    assert (await tested.status()).warnings == ["it failed"]


# --- a guest that ends by itself -------------------------------------------------------------------


@dataclass
class Boots:
    """Each boot is another VM; Docker is there as soon as it is asked for."""

    agent: HostAgent
    vms: list[ScriptedVm] = field(default_factory=list)
    connected: list[trio.Event] = field(default_factory=list)

    async def boot(self) -> ScriptedVm:
        await trio.lowlevel.checkpoint()
        self.agent._enter(Stage.BOOTING, "booting the VM")
        self.connected.append(self.agent._connected)
        vm = ScriptedVm()
        self.vms.append(vm)
        give(self.agent, vm)
        return vm

    async def docker(self) -> None:
        await trio.lowlevel.checkpoint()
        self.agent._enter(Stage.RUNNING, "ready")


async def idle(_: object) -> None:
    await trio.sleep_forever()


@pytest.fixture
def boots(agent: HostAgent, monkeypatch: pytest.MonkeyPatch) -> Boots:
    made = Boots(agent)
    monkeypatch.setattr(agent, "_boot", made.boot)
    monkeypatch.setattr(agent, "_serve_docker", made.docker)
    # In a thread, for which no clock that jumps would wait.
    monkeypatch.setattr(daemon.agentlog, "keep_bounded", idle)
    return made


async def test_a_guest_that_reboots_is_booted_again(
    agent: HostAgent, boots: Boots, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent._work_until_it_ends)
        await trio.sleep(1000)
        boots.vms[0].ends(Farewell.REBOOT)
        await trio.sleep(1000)
        assert (await agent.status()).stage is Stage.RUNNING
        # Nobody may take the last boot's connection, or its readiness, for that of this one.
        assert len(set(boots.connected)) == 2
        told = [event.fields.get("stage", event.kind) for event in agent._events.subscribe(lambda _: None)]
        assert told == ["rebooting", "booting", "running"]
        boots.vms[1].ends(Farewell.POWER_OFF)
    assert len(boots.vms) == 2


async def test_one_that_does_nothing_but_reboot_ends_the_instance(
    agent: HostAgent, boots: Boots, autojump_clock: trio.testing.MockClock
) -> None:
    allowed = RebootPolicy().allowed

    async def reboot_again_and_again() -> None:
        for number in range(allowed + 1):
            await trio.sleep(10)
            boots.vms[number].ends(Farewell.REBOOT)

    with pytest.raises(UserError, match="has rebooted 5 times in a row"), groups.collapsed():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reboot_again_and_again)
            await agent._work_until_it_ends()
    assert len(boots.vms) == allowed + 1


async def test_a_guest_that_ends_otherwise_is_not_booted_again(
    agent: HostAgent, boots: Boots, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(UserError, match="ended unexpectedly: QEMU ended") as caught, groups.collapsed():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent._work_until_it_ends)
            await trio.sleep(1)
            boots.vms[0].ends(None)
    assert caught.value.exit_code is ExitCode.BOOT
    assert len(boots.vms) == 1


async def test_a_stop_while_it_reboots_is_obeyed(
    agent: HostAgent,
    boots: Boots,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:

        async def work() -> None:
            with agent._work:
                await agent._work_until_it_ends()
            await agent._shut_down()
            agent._over.set()

        nursery.start_soon(work)
        await trio.sleep(1)
        monkeypatch.setattr(agent, "_boot", trio.sleep_forever)
        boots.vms[0].ends(Farewell.REBOOT)
        await trio.sleep(1)
        await agent.stop(StopInstance())
    assert boots.vms[0].said == []


async def test_boots_that_were_tried_again_are_counted_over_all_reboots(
    agent: HostAgent, instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = ScriptedVm()

    class Booter:
        """The first try fails, the second does not."""

        def __init__(self, *_: object) -> None:
            self.policy = RestartPolicy()
            self.verdict = Verdict(Accelerator.TCG, "asked for")
            self.bulk_memory, self.bulk_reason = 0, "none"

        async def boot(self, _: trio.Event, started: Callable[[VirtualMachine], None]) -> ScriptedVm:
            await trio.lowlevel.checkpoint()
            started(cast(VirtualMachine, vm))
            self.policy.retry(BootFailure("the guest's kernel panicked", ()))
            started(cast(VirtualMachine, vm))
            return vm

    monkeypatch.setattr(daemon, "Booter", Booter)
    monkeypatch.setattr(agent, "_image", object())
    for retried in (1, 2):
        await agent._boot()
        assert state.load(instance.state).boot_restarts == retried
