"""Ending an instance whose host agent cannot do it: it was killed, it hangs, it is of another version."""

from __future__ import annotations

import logging
import signal

import trio

from host_agent import state
from host_agent.boot import vm_files
from host_agent.cleanup import clean_up, remember
from host_agent.client import RESTART_TIME
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from host_agent.qmp import QmpClosed, QmpError
from host_agent.vm import VirtualMachine, kill_recorded

logger = logging.getLogger(__name__)

#: How long a guest that nobody but its power button can be asked through may take, seconds.
POWER_BUTTON_TIME = 120.0

#: How long agent and keeper may take to be gone after they have said that the instance has stopped, seconds: nothing
#: is left to do then, but on a machine that is busy also that takes time.
GONE_TIME = 30.0


async def lock_is_free(paths: InstancePaths, timeout: float = RESTART_TIME) -> bool:
    """Whether agent and keeper have gone within ``timeout`` seconds."""
    with trio.move_on_after(timeout):
        while state.is_locked(paths.lock):
            await trio.sleep(0.02)
    return not state.is_locked(paths.lock)


async def end_orphan(paths: InstancePaths) -> bool:
    """End a VM whose agent and keeper were both killed, in good order; whether there was anything to end.

    What the dead left behind is removed in any case: sockets, and the docker context.
    """
    if not paths.directory.exists():
        return False
    with state.locked(paths.lock) as ours:
        if not ours:
            return False
        _remember_stopped(paths)
        vm = await VirtualMachine.adopt(vm_files(paths))
        if vm is not None:
            await _power_down(vm)
        clean_up(paths)
    return vm is not None


async def _power_down(vm: VirtualMachine) -> None:
    try:
        await vm.powerdown()
        with trio.move_on_after(POWER_BUTTON_TIME):
            await vm.wait()
    except (QmpClosed, QmpError) as error:
        logger.warning("the power button does not work: %s", error)
    if vm.alive():
        await vm.quit()


async def end_by_force(paths: InstancePaths) -> None:
    """Kill the host agent and QEMU, which they may notice at any point of what they were doing."""
    _remember_stopped(paths)
    if agent := ProcessIdentity.read(paths.agent_identity):
        agent.send_signal(signal.SIGKILL)
    kill_recorded(paths.qemu_identity)
    # The keeper ends by itself: nothing is wanted of it any more.
    await lock_is_free(paths)
    with state.locked(paths.lock) as ours:
        if ours:
            clean_up(paths)


def _remember_stopped(paths: InstancePaths) -> None:
    if paths.state.exists():
        remember(paths, wanted=False, stopping=False, failure="", hint="")
