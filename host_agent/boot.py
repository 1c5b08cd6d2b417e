"""From nothing to a guest that answers: accelerator, disks, QEMU, and one more try if the boot goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import trio

from host_agent import bulk_memory, disks
from host_agent.bulk_memory import NOT_WANTED, NoBulkMemory
from host_agent.configuration.config import InstanceConfig
from host_agent.console import ConsoleEvent, ConsoleWatcher, StageReached, limits_for
from host_agent.errors import ExitCode, UserError
from host_agent.events import EventLog
from host_agent.paths import Home, InstancePaths
from host_agent.probe import Preference, Verdict, choose, describe_qemu
from host_agent.vm import BootFailure, RestartPolicy, VirtualMachine, VmFiles, watch_boot
from provision.errors import ProvisionError
from provision.image import Image
from provision.machine import (
    CONTROL_PORT,
    FILES_PORT,
    VIEW_PORT,
    Arch,
    BulkMemory,
    Machine,
    MachineError,
    SerialPort,
)
from provision.recipe import debian_architecture

_ARCHITECTURES = {"amd64": Arch.X86_64, "arm64": Arch.AARCH64}


def find_qemu() -> Path:
    """The QEMU for this machine's guests; raises ``UserError`` if it is not installed."""
    try:
        architecture = debian_architecture()
    except ProvisionError as error:
        raise UserError(error.message, error.hint, ExitCode.DEPENDENCY) from None
    name = _ARCHITECTURES[architecture].qemu
    found = shutil.which(name)
    if found is None:
        package = {"amd64": "qemu-system-x86", "arm64": "qemu-system-arm"}[architecture]
        raise UserError(
            f"{name} is missing", f"install it: sudo apt-get install {package}", ExitCode.DEPENDENCY
        )
    return Path(found)


def vm_files(paths: InstancePaths) -> VmFiles:
    return VmFiles(
        identity=paths.qemu_identity,
        qmp=paths.qmp_socket,
        console=paths.console_log,
        log=paths.qemu_log,
        events=paths.events_socket,
    )


class Booter:
    """Boots one instance. ``connected`` must be set by whoever sees the guest agent answer.

    ``bulk_memory`` bytes are shared with the VM that is being started, and if none are, ``bulk_reason`` says why.
    """

    def __init__(
        self,
        home: Home,
        paths: InstancePaths,
        config: InstanceConfig,
        image: Image,
        events: EventLog,
    ) -> None:
        self._home = home
        self._paths = paths
        self._config = config
        self._image = image
        self._events = events
        self.policy = RestartPolicy()
        self.verdict: Verdict | None = None
        self.bulk_memory = 0
        self.bulk_reason = ""

    async def boot(self, connected: trio.Event, started: Callable[[VirtualMachine], None]) -> VirtualMachine:
        """A VM whose guest agent is connected; ``started`` is told each QEMU as soon as it runs.

        Raises ``UserError`` when it does not come up; then no QEMU is left running.
        """
        qemu = find_qemu()
        described = await describe_qemu(qemu)
        verdict = await self._choose(qemu)
        self.verdict = verdict
        while True:
            # Memory and disks are made afresh for a second try, too: the first may have died while writing to them.
            with ExitStack() as until_booted:
                bulk = await self._bulk(qemu, until_booted)
                try:
                    argv = self._machine(verdict, bulk, sandbox=described.sandbox).argv(qemu)
                except MachineError as error:
                    raise UserError(error.message, error.hint, ExitCode.USAGE) from None
                await trio.to_thread.run_sync(disks.prepare, self._paths, self._image, self._config.disk)
                _remove_sockets(self._paths)
                self._events.say("booting", "starting the VM", accelerator=verdict.accelerator.value)
                vm = await VirtualMachine.start(argv, vm_files(self._paths))
                started(vm)
                failure = await self._watch(vm, verdict, connected)
            if failure is None:
                self.policy.booted()
                return vm
            self._events.say("boot-failed", self.policy.retry(failure), reason=failure.reason)

    async def _bulk(self, qemu: Path, until_booted: ExitStack) -> BulkMemory | None:
        """Memory to share with the VM, if it is wanted and can be had."""
        try:
            if not self._config.bulk:
                raise NoBulkMemory(NOT_WANTED)
            await bulk_memory.check_device(qemu)
            bulk = until_booted.enter_context(bulk_memory.created(self._paths))
        except NoBulkMemory as reason:
            self.bulk_memory, self.bulk_reason = 0, str(reason)
            if self._config.bulk:
                self._events.say("no-bulk", f"no memory is shared with the VM: {reason}")
            return None
        self.bulk_memory, self.bulk_reason = bulk.size, ""
        return bulk

    async def _choose(self, qemu: Path) -> Verdict:
        self._events.say("accelerator", "finding out how fast this machine can run a VM")
        verdict = await choose(
            Preference(self._config.accelerator),
            qemu=qemu,
            kernel=self._image.kernel,
            cache=self._home.cache / "accelerators.json",
        )
        self._events.say("accelerator", f"using {verdict.accelerator.value}: {verdict.reason}")
        return verdict

    async def _watch(self, vm: VirtualMachine, verdict: Verdict, connected: trio.Event) -> BootFailure | None:
        watcher = ConsoleWatcher(limits_for(verdict.accelerator), trio.current_time())
        try:
            return await watch_boot(vm, watcher, connected, self._report)
        except BaseException:
            with trio.CancelScope(shield=True):
                await vm.kill()
            raise

    def _report(self, event: ConsoleEvent) -> None:
        if isinstance(event, StageReached):
            self._events.say("boot-stage", f"guest: {event.stage.value}", stage=event.stage.value)

    def _machine(self, verdict: Verdict, bulk: BulkMemory | None, *, sandbox: bool) -> Machine:
        paths = self._paths
        return Machine(
            accelerator=verdict.accelerator,
            arch=_ARCHITECTURES[debian_architecture()],
            name=f"agentctl-{paths.name}",
            uuid=UUID(self._config.identity),
            cpus=self._config.cpus,
            memory=self._config.memory,
            kernel=self._image.kernel,
            initrd=self._image.initrd,
            cmdline=tuple(self._image.manifest.cmdline),
            root=paths.root_overlay,
            agent=paths.agent_drive,
            data=paths.data_disk,
            bulk=bulk,
            qmp=paths.qmp_socket,
            events=paths.events_socket,
            console=paths.console_log,
            serial_ports=(
                SerialPort(CONTROL_PORT, paths.control_socket),
                SerialPort(FILES_PORT, paths.files_socket),
                SerialPort(VIEW_PORT, paths.view_socket),
            ),
            sandbox=sandbox,
        )


def _remove_sockets(paths: InstancePaths) -> None:
    """QEMU's own of an earlier boot; nobody listens on them any more."""
    for socket in (
        paths.qmp_socket,
        paths.events_socket,
        paths.control_socket,
        paths.files_socket,
        paths.view_socket,
    ):
        socket.unlink(missing_ok=True)
