"""The host agent of one instance: the process that boots its VM and makes it feel like localhost.

    python -m host_agent.daemon DIRECTORY --lock-fd FD --keeper-fd FD [--store-fds FD,FD,FD,FD]

The composition root of a VM. What every agent is, is in ``instance_agent``; here is put together what boots, watches
and ends QEMU, and nothing is decided. The law: if the agent is killed, the next one finds the VM running and takes it
over.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from host_agent import (
    agentlog,
    clock_jumps,
    containerd,
    disk_upkeep,
    docker_context,
    docker_ready,
    guest_units,
    ssh,
    state,
)
from host_agent.boot import Booter, vm_files
from host_agent.bulk_memory import SIZE as BULK_MEMORY_SIZE
from host_agent.bulk_plane import plane
from host_agent.cleanup import remember
from host_agent.configuration import config as configuration
from host_agent.console import Farewell
from host_agent.disk_room import DiskState
from host_agent.disk_upkeep import DiskUpkeep
from host_agent.docker_context import Activation
from host_agent.docker_socket import docker_forwarder
from host_agent.errors import ExitCode, UserError
from host_agent.fallback import Fallback
from host_agent.guest_clock import ClockKeeper
from host_agent.guest_setup import GuestSetup
from host_agent.host_network import HostNetwork
from host_agent.instance_agent import InstanceAgent, main
from host_agent.paths import Home, InstancePaths
from host_agent.provisioning import Provisioning
from host_agent.qmp import QmpClosed, QmpError
from host_agent.vm import RebootPolicy, VirtualMachine
from host_agent.vm_watch import DISK_FULL, DISK_FULL_HINT, VmWatch
from protocol.api import Configure, InstanceStatus, Mounts, ServeView, Shutdown, Stage
from protocol.errors import AgentctlProtocolError, RpcError
from protocol.link import Link
from protocol.region import CONTROL
from provision import image as images
from provision import recipe as recipes

logger = logging.getLogger(__name__)

#: How long the guest may take to shut down in good order, seconds: longer than systemd there gives Docker
#: (TimeoutStopSec in provision/guest), which waits for containers as long as they ask for.
SHUTDOWN_TIME = 120.0

#: How long the guest agent may take to come back, and to answer that it shuts down, seconds.
GUEST_RETURN_TIME = 15.0
SHUTDOWN_REPLY_TIME = 30.0

#: How soon a VM that goes on has tried again what it could not write, seconds.
WRITE_TIME = 2.0


class HostAgent(InstanceAgent):
    """One run of an instance, from QEMU's start (or adoption) to its end."""

    def __init__(self, home: Home, paths: InstancePaths, lock: int, store: Sequence[int] = ()) -> None:
        super().__init__(home, paths, lock, store, bulk=plane(CONTROL, paths))
        self._recipe = recipes.load(runtime=self._config.runtime)
        self._image = images.find(home.images, self._recipe.digest)
        self._vm: VirtualMachine | None = None
        self._connected = trio.Event()
        self._network = HostNetwork(
            self._config.network, docker_context.context_name(paths.name), self._events.say
        )
        self._clock = ClockKeeper(lambda: self._guest.current, self._events.say)
        self._vm_watch = VmWatch(
            paths.data_disk, lambda: self._config.disk, self._events.say, resumed=self._clock.look
        )
        self._fallback = Fallback(paths, self._guest, lambda: self._vm, self._events.say)
        self._disk = DiskUpkeep(
            paths,
            lambda: self._guest.current,
            lambda: self._vm,
            lambda: self._config.disk,
            lambda size: self._remember(disk=size),
        )
        self._setup = GuestSetup(self._config.guest, paths.ssh_agent, self._network, self._events.say)
        self._provision_problems: list[str] = []
        self._serve(
            self._setup.sockets,
            disk=self._disk.report,
            change_disk=self._disk.grow,
            compact_disk=self._disk.compact,
        )

    async def _start_beside(self, nursery: trio.Nursery) -> None:
        await nursery.start(self._network.run)
        await nursery.start(self._setup.run)
        nursery.start_soon(self._clock.run)
        nursery.start_soon(clock_jumps.watch, self._clock.look)
        nursery.start_soon(self._disk.run)
        nursery.start_soon(self._fallback.run)

    async def _work_until_it_ends(self) -> None:
        self._vm = await VirtualMachine.adopt(vm_files(self._paths))
        if state.load(self._paths.state).stopping:
            # The agent before us was killed while it stopped the instance; that is what is still wanted.
            self._enter(Stage.STOPPING, "stopping")
            return
        if self._vm is None:
            vm = await self._boot()
        else:
            vm = self._vm
            self._events.say("adopted", "found the VM running", pid=str(vm.identity.pid))
        reboots = RebootPolicy()
        while True:
            booted_at = trio.current_time()
            ending = await self._serve_until_it_ends(vm)
            match vm.farewell():
                case Farewell.POWER_OFF:
                    self._events.say("powered-off", "the guest powered itself off")
                    return
                case Farewell.REBOOT:
                    reboots.rebooted(trio.current_time() - booted_at)
                    vm = await self._reboot()
                case None:
                    message = f"the VM ended unexpectedly: {ending}"
                    raise UserError(message, "start it again: agentctl up", ExitCode.BOOT)

    async def _serve_until_it_ends(self, vm: VirtualMachine) -> str:
        """One run of the guest's kernel; how QEMU ended, in a clause."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_docker)
            nursery.start_soon(self._vm_watch.run, vm)
            nursery.start_soon(self._fallback.attend, vm)
            for log in (self._paths.console_log, self._paths.qemu_log):
                nursery.start_soon(agentlog.keep_bounded, log)
            ending = await vm.wait()
            nursery.cancel_scope.cancel()
        return ending

    async def _reboot(self) -> VirtualMachine:
        """What the guest asked for: a start like any other, on a fresh root, with what was kept."""
        self._events.begin()
        self._events.say("rebooting", "the guest reboots")
        self._connected = trio.Event()
        return await self._boot()

    async def _boot(self) -> VirtualMachine:
        if self._image is None:
            raise UserError("the guest image is not built yet", "run: agentctl up", ExitCode.BOOT)
        configuration.check(self._config, self._host)
        self._enter(Stage.BOOTING, "booting the VM")
        booter = Booter(self._home, self._paths, self._config, self._image, self._events)
        restarts_before = state.load(self._paths.state).boot_restarts

        def started(vm: VirtualMachine) -> None:
            self._vm = vm
            assert booter.verdict is not None
            remember(
                self._paths,
                accelerator=booter.verdict.accelerator.value,
                accelerator_reason=booter.verdict.reason,
                boot_restarts=restarts_before + booter.policy.restarts,
                bulk_memory=booter.bulk_memory,
                bulk_reason=booter.bulk_reason,
                host_keys="",
            )

        return await booter.boot(self._connected, started)

    async def _serve_docker(self) -> None:
        """The docker socket, and the context once dockerd answers on it; or containerd's where that is wanted."""
        paths, dial = self._paths, self._guest.dial
        async with trio.open_nursery() as nursery:
            if self._containerd:
                forwarder = containerd.containerd_forwarder(paths.containerd_socket, dial)
            else:
                forwarder = docker_forwarder(paths.docker_socket, dial, self._files.mounted)
            await nursery.start(forwarder.run)
            self._enter(Stage.DOCKER, "waiting for containerd" if self._containerd else "waiting for Docker")
            if failure := await self._docker_failure():
                self._enter(Stage.DOCKER, *failure)
                self._events.say("docker-failed", self._detail, hint=self._hint)
                return
            if not self._containerd:
                await self._activate_context()
            await self._provision()
            self._enter(Stage.RUNNING, "ready")

    @property
    def _containerd(self) -> bool:
        """There is no Docker, nor who speaks its language."""
        return self._config.runtime == recipes.CONTAINERD

    async def _provision(self) -> None:
        """Foreign programs, and the user's scripts. What fails is said; the instance is up all the same."""
        guest = self._config.guest
        if guest.architectures or guest.provision:
            self._enter(Stage.PROVISIONING, "setting up what is to run in the VM")
        await self._setup.use_architectures(self._guest.wait)
        if guest.provision:
            say, log = self._events.say, self._paths.provision_log
            self._provision_problems = await Provisioning(guest.provision, self._guest.dial, say, log).run()

    async def _docker_failure(self) -> tuple[str, str] | None:
        """None once dockerd answers; or, as a sentence and a hint, why it will not."""
        unit, ready = "docker.service", docker_ready.wait_until_ready
        if self._containerd:
            unit, ready = "containerd.service", containerd.wait_until_ready
        failure: tuple[str, str] | None = guest_units.NEEDED[unit]
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                nonlocal failure
                failure = await guest_units.wait_for_failure(self._guest.dial)
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            if await ready(self._guest.dial):
                failure = None
            nursery.cancel_scope.cancel()
        return failure

    async def _activate_context(self) -> None:
        directory = docker_context.config_dir(os.environ)
        name = docker_context.context_name(self._paths.name)
        before = state.load(self._paths.state).previous_context
        remembered = None if before is None else Activation(name, before, active=True)

        def write() -> Activation:
            docker_context.create(directory, name, self._paths.docker_socket, f"agentctl {self._paths.name}")
            return docker_context.activate(directory, name, remembered)

        try:
            activation = await trio.to_thread.run_sync(write)
        except OSError as error:
            self._events.say("docker-context", f"the docker context could not be written: {error}")
            return
        remember(self._paths, previous_context=activation.previous if activation.active else None)
        message = activation.warning or f"docker context {name} is active"
        self._events.say("docker-context", message, context=name)

    # --- the guest's side -------------------------------------------------------------------------

    async def _guest_up(self, link: Link) -> None:
        keys = await trio.to_thread.run_sync(ssh.authorized_keys, self._paths)
        configured = await link.request(
            Configure(
                hostname=docker_context.context_name(self._paths.name),
                clock_ns=time.time_ns(),
                user=ssh.guest_user(),
                uid=os.geteuid(),
                authorized_keys=keys,
            )
        )
        self._setup.link_up(link)
        self._network.link_up(link)
        self._sockets.link_up(link)
        if self._view.is_wanted:  # its agent may have been killed, and that which serves the view with it
            with suppress(RpcError):
                await link.request(ServeView(True))
        self._events.say(
            "guest-connected",
            "the guest agent is connected",
            clock_step_ms=str(configured.clock_step_ns // 1_000_000),
        )
        self._connected.set()
        self._clock.look()  # last, so that it finds this session

    async def _serve_view(self, wanted: bool) -> None:
        if not self._paths.view_socket.exists():
            raise UserError(
                "this VM was started by an agentctl without a view, and has no port for it",
                "restart it: agentctl restart",
                ExitCode.USAGE,
            )
        if not wanted and self._guest.current is None:
            return
        try:
            link = await self._guest.wait()
            await link.request(ServeView(wanted))
        except AgentctlProtocolError as error:
            raise UserError(
                f"the guest cannot be asked: {error}", "see: agentctl status", ExitCode.GUEST
            ) from None

    # --- ends -------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """In good order if the guest can be asked, by the power button else, and at last by force."""
        if self._vm is None:
            # A stop that came while we were only finding out whether there is a VM.
            self._vm = await VirtualMachine.adopt(vm_files(self._paths))
        vm = self._vm
        if vm is None or not vm.alive():
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._quit_when_forced, vm)
            if not self._forced.is_set():
                nursery.start_soon(self._shut_down_in_time, vm)
            await vm.wait()
            nursery.cancel_scope.cancel()

    async def _quit_when_forced(self, vm: VirtualMachine) -> None:
        """Whoever loses patience with a shutdown may say so while it is under way."""
        await self._forced.wait()
        await vm.quit()

    async def _shut_down_in_time(self, vm: VirtualMachine) -> None:
        if not await self._made_to_run(vm):
            self._events.say(
                "forced", "the host's disk is full, so that the guest cannot shut down; ending it"
            )
            await vm.quit()
            return
        patience = await self._ask_guest_to_shut_down(vm)
        await trio.sleep(patience)
        self._events.say("forced", f"the guest did not shut down within {patience:.0f} s; ending it")
        await vm.quit()

    async def _made_to_run(self, vm: VirtualMachine) -> bool:
        """Let a VM that stands still go on, since it cannot shut down else; False if it has no room for that."""
        with suppress(QmpClosed, QmpError):
            if await vm.run_state() in ("paused", "io-error"):
                await vm.resume()
                await trio.sleep(WRITE_TIME)
                return await vm.run_state() != "io-error"
        return True

    async def _ask_guest_to_shut_down(self, vm: VirtualMachine) -> float:
        """How long the guest may take now, seconds; 0 if there is no way to ask it."""
        try:
            # After a restart of this agent the session may not be there yet.
            link = await self._guest.wait(0 if self._fallback.hopeless else GUEST_RETURN_TIME)
            await link.request(Shutdown(), timeout=SHUTDOWN_REPLY_TIME)
            return SHUTDOWN_TIME
        except AgentctlProtocolError as error:
            logger.warning("the guest agent could not be asked to shut down: %s", error)
        try:
            await vm.powerdown()
            return SHUTDOWN_TIME
        except (QmpClosed, QmpError) as error:
            logger.warning("the power button does not work: %s", error)
            return 0.0

    async def _clean_up(self) -> None:
        if self._vm is not None and self._vm.alive():
            await self._vm.quit()
        await super()._clean_up()

    # --- what is known ----------------------------------------------------------------------------

    async def status(self) -> InstanceStatus:
        current = state.load(self._paths.state)
        link = self._guest.current
        bulk_memory, bulk_reason = self._bulk(current)
        disk_full = self._vm_watch.state is DiskState.FULL
        disk = disk_upkeep.at_rest(self._paths, self._config.disk)
        status = await self._status(current, link)
        return replace(
            status,
            detail=DISK_FULL if disk_full else status.detail,
            hint=DISK_FULL_HINT if disk_full else status.hint,
            accelerator=current.accelerator,
            cpus=self._config.cpus,
            memory=self._config.memory,
            disk=self._config.disk,
            image=self._recipe.digest,
            qemu_pid=self._vm.identity.pid if self._vm and self._vm.alive() else 0,
            docker_socket="" if self._containerd else str(self._paths.docker_socket),
            docker_context="" if self._containerd else docker_context.context_name(self._paths.name),
            accelerator_reason=current.accelerator_reason,
            bulk_memory=bulk_memory,
            bulk_reason=bulk_reason,
            disk_state=self._vm_watch.state.value,
            disk_allocated=disk.allocated,
            host_free=disk.free,
            warnings=[*self._setup.problems, *self._provision_problems],
            runtime=self._config.runtime,
            containerd_socket=str(self._paths.containerd_socket) if self._containerd else "",
            control=self._fallback.control if self._vm and self._vm.alive() else None,
        )

    async def _remove_mounts(self, guest_paths: Sequence[str]) -> Mounts:
        await trio.lowlevel.checkpoint()
        raise UserError(
            f"containers may be using {', '.join(guest_paths)}: a VM is left a folder less by a restart",
            "take it out of the file: agentctl config edit, then agentctl restart",
            ExitCode.USAGE,
        )

    async def reload(self) -> list[str]:
        guest = configuration.load(self._paths, self._host).guest
        self._config = self._config.with_guest(guest)
        configuration.save_kept(self._paths.running_config, self._config)
        return await self._setup.change(guest, self._guest.current, self._sockets.use_own)

    def _bulk(self, current: state.InstanceState) -> tuple[int, str]:
        """Bytes of memory that payloads go through, and in a clause why there are none."""
        link = self._guest.current
        if link is not None and link.bulk.active:
            return BULK_MEMORY_SIZE, ""  # also of a VM that was taken over without its records
        if current.bulk_memory and link is not None:
            return 0, "the guest does not offer the memory that it was given"
        return current.bulk_memory, current.bulk_reason


if __name__ == "__main__":
    main(lambda home, paths, given: HostAgent(home, paths, given.lock, given.store))
