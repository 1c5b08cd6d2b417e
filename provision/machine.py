"""The virtual machine as data, and the QEMU command line it means.

The law here: pure. Nothing is opened, measured or looked up; the same ``Machine`` gives the same
``argv`` on every host. What the devices are for stands in docs/design.md, and the order of the disks
is part of the contract with the image: the root is the first virtio-blk device, so ``/dev/vda``.
Option syntax: qemu-system-x86_64(1); tried with QEMU 7.2.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from provision.errors import ProvisionError

MIB = 1 << 20
GIB = 1 << 30

# sun_path holds 104 bytes with its final NUL on macOS, 108 on Linux; one limit for both, so that an
# instance directory that works on one works on the other.
MAX_SOCKET_PATH = 103

# Below this Linux 6.12 has no room to unpack itself and its initrd.
MIN_MEMORY = 256 * MIB

# What a PC has no room for below 4 GiB, because of its devices, it has from there on.
_BEHIND_LOW_MEMORY = 4 * GIB

# QEMU keeps 20 bytes of a virtio-blk serial; these are what udev shows as virtio-SERIAL.
ROOT_SERIAL = "agentctl-root"
DATA_SERIAL = "agentctl-data"
AGENT_SERIAL = "agentctl-agent"

# The name by which QEMU's monitor knows the data disk.
DATA_NODE = "data"

# One port for each plane, so that a long file transfer never stands before a command.
CONTROL_PORT = "org.agentctl.control"
FILES_PORT = "org.agentctl.files"
VIEW_PORT = "org.agentctl.view"

# The name by which QEMU's monitor knows the network.
NETWORK = "net"

# slirp's own default, said out loud: the guest is .15, the host's loopback .2, the name server .3.
GUEST_NETWORK = "10.0.2.0/24"
GUEST_ADDRESS = "10.0.2.15"
HOST_ADDRESS = "10.0.2.2"
NAME_SERVER_ADDRESS = "10.0.2.3"

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Accelerator(StrEnum):
    """What runs the guest's instructions: the Linux or macOS hypervisor, or QEMU's own translator."""

    KVM = "kvm"
    HVF = "hvf"
    TCG = "tcg"


class Arch(StrEnum):
    """The guest's instruction set, by QEMU's name for it. AARCH64 is built but untested."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"

    @property
    def qemu(self) -> str:
        """The name of the program that emulates this machine."""
        return f"qemu-system-{self.value}"


@dataclass(frozen=True, slots=True)
class _Board:
    """What differs between the boards of the two architectures."""

    machine: str
    console: str
    tcg_cpu: str
    tcg_cmdline: tuple[str, ...]
    has_vmgenid: bool
    has_memmap: bool


_BOARDS = {
    Arch.X86_64: _Board(
        # Nothing here uses these four; each is a device less for the guest to probe.
        machine="q35,vmport=off,usb=off,sata=off,smbus=off",
        console="ttyS0",
        # la57: four levels of page tables instead of five, a shorter walk for each TLB miss. erms: without it Linux
        # copies by REP MOVSQ instead of MOVSB, of which TCG does one at a time: 1.1 ms for a MiB, not 3.9.
        tcg_cpu="max,la57=off,erms=off",
        # QEMU 7.2 now and then leaves garbage in EFLAGS after CMPXCHG16B, which Linux's slab allocator
        # uses where it can: a double fault in __kmalloc in 7 of 40 boots of a 6.12 kernel with two CPUs,
        # in none of 60 when the kernel is told not to use it. The CPU keeps the feature, since programs
        # built for x86-64-v2 (all of RHEL 9, for one) refuse to start without it.
        tcg_cmdline=("clearcpuid=cx16",),
        has_vmgenid=True,
        has_memmap=True,
    ),
    Arch.AARCH64: _Board(
        machine="virt",
        console="ttyAMA0",
        tcg_cpu="max",
        tcg_cmdline=(),
        has_vmgenid=False,
        has_memmap=False,
    ),
}


class MachineError(ProvisionError):
    """A machine that QEMU could not start as described; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class SerialPort:
    """A virtio-serial port: ``/dev/virtio-ports/NAME`` in the guest, a listening socket on the host."""

    name: str
    socket: Path


@dataclass(frozen=True, slots=True)
class BulkMemory:
    """Memory that host and guest share: a file of ``size`` bytes, which the guest has as ``/dev/pmem0``.

    Whole MiB. The file is there, with that size, when QEMU opens it. Where the kernel can be told on its command line
    that memory of this kind is at an address (x86), it is told so and has no driver for the device: QEMU 7.2 saves
    nothing of a virtio-pmem device with a VM, and whoever had used its queue would wait for it ever after.
    """

    path: Path
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One boot of an instance. Paths are absolute, ``memory`` is in bytes and whole MiB.

    QEMU creates the sockets (``qmp``, ``events`` and those of ``serial_ports``), so they are only as private as
    the folder they are in: that folder must be 0700. ``events`` is a second monitor, for who only
    listens. ``root`` is a qcow2 overlay that does not outlive the boot, ``data`` and ``agent`` are raw; without
    ``data`` the machine has no data disk, without ``bulk`` no shared memory. ``sandbox`` is for QEMUs
    built with seccomp.

    Raises MachineError when the numbers or paths cannot work.
    """

    accelerator: Accelerator
    arch: Arch = Arch.X86_64
    name: str = "agentctl"
    uuid: UUID
    cpus: int
    memory: int
    kernel: Path
    initrd: Path
    cmdline: tuple[str, ...] = ()
    root: Path
    agent: Path
    data: Path | None = None
    bulk: BulkMemory | None = None
    qmp: Path
    events: Path | None = None
    console: Path
    serial_ports: tuple[SerialPort, ...] = ()
    hotplug_ports: int = 2
    sandbox: bool = True

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise MachineError(f"A machine needs at least one CPU, not {self.cpus}.")
        if self.memory < MIN_MEMORY:
            raise MachineError(f"A machine needs at least {MIN_MEMORY // MIB} MiB of memory.")
        if self.memory % MIB:
            raise MachineError("The memory of a machine must be whole MiB.")
        bulk = self.bulk.path if self.bulk is not None else None
        for path in (self.kernel, self.initrd, self.root, self.agent, self.data, bulk, self.console):
            if path is not None and not path.is_absolute():
                raise MachineError(f"{path} must be an absolute path.")
        if self.bulk is not None and (self.bulk.size <= 0 or self.bulk.size % MIB):
            raise MachineError("The memory that a machine shares with its host must be whole MiB.")
        events = () if self.events is None else (self.events,)
        for socket in (self.qmp, *events, *(port.socket for port in self.serial_ports)):
            _check_socket(socket)

    @property
    def kernel_cmdline(self) -> str:
        """The guest kernel's command line. ``panic=-1`` reboots at once, and QEMU then exits.

        ``loglevel=6`` keeps the lines that the boot is watched by (docs/design.md, boot) on the console.
        """
        board = _BOARDS[self.arch]
        return " ".join(
            (
                f"console={board.console}",
                "panic=-1",
                "loglevel=6",
                "root=/dev/vda",
                "rw",
                f"systemd.machine_id={self.uuid.hex}",
                *(board.tcg_cmdline if self.accelerator is Accelerator.TCG else ()),
                *self._bulk_cmdline(),
                *self.cmdline,
            )
        )

    def _bulk_cmdline(self) -> tuple[str, ...]:
        if self.bulk is None or not _BOARDS[self.arch].has_memmap:
            return ()
        # Because there can be memory behind 4 GiB Linux would take 64 MiB of the guest's for devices that reach no
        # further (swiotlb). Virtio's reach all of it.
        return (f"memmap={self.bulk.size // MIB}M!{self._bulk_address():#x}", "swiotlb=noforce")

    def _bulk_address(self) -> int:
        """Where the guest has the shared memory: behind all RAM, however much of it QEMU puts below 4 GiB.

        At a GiB, so that it can be mapped by huge pages.
        """
        return -(-(_BEHIND_LOW_MEMORY + self.memory) // GIB) * GIB

    def argv(self, qemu: Path) -> list[str]:
        """The whole command line, the program first."""
        return [
            str(qemu),
            *_platform(self.arch, self.accelerator),
            *self._identity(),
            *self._boot(),
            *self._control(),
            *self._disks(),
            *self._devices(),
        ]

    def _identity(self) -> list[str]:
        # fmt: off
        return [
            "-name", escape(self.name),
            "-uuid", str(self.uuid),
            *(["-sandbox", SANDBOX] if self.sandbox else []),
        ]
        # fmt: on

    def _boot(self) -> list[str]:
        # QEMU takes these values as they are: a comma in them is a comma.
        # fmt: off
        return [
            "-smp", str(self.cpus),
            "-m", self._memory(),
            "-kernel", str(self.kernel),
            "-initrd", str(self.initrd),
            "-append", self.kernel_cmdline,
        ]
        # fmt: on

    def _memory(self) -> str:
        # A virtio-pmem device is plugged behind the RAM; it takes address space of a region that only exists
        # if there can be more memory than there is, and none of the slots of DIMMs. The region begins at 4 GiB or
        # where the RAM ends, so it reaches to the end of the device in either case.
        if self.bulk is None:
            return f"{self.memory // MIB}M"
        room = self.bulk.size
        if _BOARDS[self.arch].has_memmap:
            room += self._bulk_address() - _BEHIND_LOW_MEMORY
        return f"size={self.memory // MIB}M,maxmem={(self.memory + room) // MIB}M"

    def _control(self) -> list[str]:
        # fmt: off
        return [
            "-chardev", f"socket,id=qmp,path={escape(self.qmp)},server=on,wait=off",
            "-mon", "chardev=qmp,mode=control",
            *self._events(),
            # Appending, so that it goes on at the start when the file is cut to keep it small.
            "-chardev", f"file,id=console,path={escape(self.console)},append=on",
            "-serial", "chardev:console",
        ]
        # fmt: on

    def _events(self) -> list[str]:
        if self.events is None:
            return []
        # fmt: off
        return [
            "-chardev", f"socket,id=events,path={escape(self.events)},server=on,wait=off",
            "-mon", "chardev=events,mode=control",
        ]
        # fmt: on

    def _disks(self) -> list[str]:
        # The root overlay does not outlive the boot: its flushes need not reach the host's disk.
        # fmt: off
        argv = [
            "-blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={escape(self.root)},"
                         "discard=unmap,detect-zeroes=unmap,cache.no-flush=on",
            "-device", f"virtio-blk-pci,id=root,drive=root,serial={ROOT_SERIAL}",
            "-blockdev", "driver=raw,node-name=agent,read-only=on,"
                         f"file.driver=file,file.filename={escape(self.agent)}",
            "-device", f"virtio-blk-pci,id=agent,drive=agent,serial={AGENT_SERIAL}",
        ]
        if self.data is not None:
            argv += [
                "-blockdev", f"driver=raw,node-name={DATA_NODE},file.driver=file,file.filename={escape(self.data)},"
                             "discard=unmap,detect-zeroes=unmap",
                "-device", f"virtio-blk-pci,id=data,drive=data,serial={DATA_SERIAL}",
            ]
        # fmt: on
        return argv

    def _devices(self) -> list[str]:
        # An empty romfile: the guest never boots from the network, so no PXE ROM is needed.
        # fmt: off
        argv = [
            "-netdev", f"user,id={NETWORK},net={GUEST_NETWORK}",
            "-device", f"virtio-net-pci,netdev={NETWORK},romfile=",
            "-device", "virtio-rng-pci",
            "-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on",
            "-device", "virtio-serial-pci,id=serial",
        ]
        for port in self.serial_ports:
            argv += [
                "-chardev", f"socket,id={port.name},path={escape(port.socket)},server=on,wait=off",
                "-device", f"virtserialport,bus=serial.0,chardev={port.name},name={port.name}",
            ]
        for number in range(self.hotplug_ports):
            argv += ["-device", f"pcie-root-port,id=hotplug{number},chassis={number + 1},slot={number + 1}"]
        if _BOARDS[self.arch].has_vmgenid:
            argv += ["-device", "vmgenid,guid=auto"]
        if self.bulk is not None:
            board = _BOARDS[self.arch]
            address = f",memaddr={self._bulk_address():#x}" if board.has_memmap else ""
            # share: what either writes is in the file at once. Not preallocated here, since who made it did that.
            argv += [
                "-object", f"memory-backend-file,id=bulk,mem-path={escape(self.bulk.path)},share=on,prealloc=off,"
                           f"size={self.bulk.size // MIB}M",
                "-device", f"virtio-pmem-pci,id=bulk-device,memdev=bulk{address}",
            ]
        # fmt: on
        return argv


def probe_argv(qemu: Path, accelerator: Accelerator, kernel: Path, arch: Arch = Arch.X86_64) -> list[str]:
    """The smallest machine that shows whether an accelerator runs ``kernel``, its console on stdout.

    Board and CPU are those of the real machine, because it is on them that a hypervisor fails.
    """
    # fmt: off
    return [
        str(qemu),
        *_platform(arch, accelerator),
        "-smp", "1",
        "-m", "256M",
        "-kernel", str(kernel),
        "-append", f"console={_BOARDS[arch].console} panic=-1 loglevel=6",
        "-chardev", "stdio,id=console,signal=off",
        "-serial", "chardev:console",
    ]
    # fmt: on


def escape(value: str | Path) -> str:
    """``value`` inside a QEMU option list, where a comma separates and two commas are one."""
    return str(value).replace(",", ",,")


def _platform(arch: Arch, accelerator: Accelerator) -> list[str]:
    board = _BOARDS[arch]
    accel, cpu = accelerator.value, "host"
    if accelerator is Accelerator.TCG:
        accel, cpu = "tcg,thread=multi", board.tcg_cpu
    # fmt: off
    return [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        "-machine", board.machine,
        "-accel", accel,
        "-cpu", cpu,
    ]
    # fmt: on


def _check_socket(path: Path) -> None:
    if not path.is_absolute():
        raise MachineError(f"{path} must be an absolute path.")
    if (length := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise MachineError(f"The socket path {path} is {length} bytes long; {MAX_SOCKET_PATH} is the limit.")
