"""How the host agent ends a VM and notices what befalls it, with a VM that a test scripts."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from dataclasses import dataclass, field
from typing import cast

import pytest
import trio
import trio.testing

from host_agent import config, daemon, state
from host_agent.daemon import HostAgent
from host_agent.paths import Home, InstancePaths
from host_agent.qmp import QmpClosed
from host_agent.state import InstanceState
from host_agent.vm import VirtualMachine
from protocol.api import MountSpec, Stage, StopInstance
from protocol.errors import LinkError

Usage = namedtuple("Usage", "total used free")


@dataclass
class ScriptedVm:
    """Ends ``shuts_down_after`` seconds after its power button; its monitor may be dead."""

    shuts_down_after: float = 5.0
    monitor_works: bool = True
    said: list[str] = field(default_factory=list)
    state: str = "running"
    ended: bool = False
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)

    def alive(self) -> bool:
        return not self.ended

    async def wait(self) -> str:
        with self.waiting:
            await trio.sleep_forever()
        self.ended = True
        return "QEMU ended"

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
        nursery.start_soon(agent._watch_vm, vm)
        await trio.sleep(3 * daemon.VM_CHECK_INTERVAL)
        assert vm.said == []
        assert (await agent.status()).detail == daemon.DISK_FULL
        free = daemon.RESUME_SPACE
        await trio.sleep(2 * daemon.VM_CHECK_INTERVAL)
        assert vm.said == ["resume"]
        assert (await agent.status()).detail != daemon.DISK_FULL
        nursery.cancel_scope.cancel()
    kinds = [event.kind for event in agent._events.subscribe(lambda event: None)]
    assert [kind for kind in kinds if kind.startswith("disk")] == ["disk-full", "disk-has-room"]


async def test_a_mount_that_is_added_is_kept_for_the_next_start(
    agent: HostAgent, instance: InstancePaths, autojump_clock: trio.testing.MockClock
) -> None:
    added = MountSpec("/srv/data", "/data", read_only=True)
    await agent._files.add([added])
    kept = config.load(instance.config, config.Host.measure()).mounts
    assert kept == agent._files.specs
    assert kept[-1] == added
    status = await agent.status()
    assert (status.mounts, status.mounts_working, status.file_server_pid) == (len(kept), 0, 0)
