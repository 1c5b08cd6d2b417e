"""The QEMU command line, in full for each accelerator, and what a machine refuses to be."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from provision.errors import ProvisionError
from provision.machine import (
    GIB,
    MAX_SOCKET_PATH,
    MIB,
    Accelerator,
    Arch,
    BulkMemory,
    Machine,
    MachineError,
    SerialPort,
    probe_argv,
)

MACHINE = Machine(
    accelerator=Accelerator.KVM,
    uuid=UUID("00112233-4455-6677-8899-aabbccddeeff"),
    cpus=4,
    memory=2048 * MIB,
    kernel=Path("/i/kernel"),
    initrd=Path("/i/initrd"),
    root=Path("/v/root.qcow2"),
    agent=Path("/v/agent.tar"),
    data=Path("/v/data.img"),
    qmp=Path("/v/qmp.sock"),
    events=Path("/v/events.sock"),
    console=Path("/v/console.log"),
    serial_ports=(
        SerialPort("org.agentctl.control", Path("/v/control.sock")),
        SerialPort("org.agentctl.files", Path("/v/files.sock")),
    ),
)

CMDLINE = (
    "console=ttyS0 panic=-1 loglevel=6 root=/dev/vda rw systemd.machine_id=00112233445566778899aabbccddeeff"
)


def golden(accel: str, cpu: str, cmdline: str) -> list[str]:
    # fmt: off
    return [
        "/usr/bin/qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        "-machine", "q35,vmport=off,usb=off,sata=off,smbus=off",
        "-accel", accel,
        "-cpu", cpu,
        "-name", "agentctl",
        "-uuid", "00112233-4455-6677-8899-aabbccddeeff",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-smp", "4",
        "-m", "2048M",
        "-kernel", "/i/kernel",
        "-initrd", "/i/initrd",
        "-append", cmdline,
        "-chardev", "socket,id=qmp,path=/v/qmp.sock,server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", "socket,id=events,path=/v/events.sock,server=on,wait=off",
        "-mon", "chardev=events,mode=control",
        "-chardev", "file,id=console,path=/v/console.log,append=on",
        "-serial", "chardev:console",
        "-blockdev", "driver=qcow2,node-name=root,file.driver=file,file.filename=/v/root.qcow2,"
                     "discard=unmap,detect-zeroes=unmap,cache.no-flush=on",
        "-device", "virtio-blk-pci,id=root,drive=root,serial=agentctl-root",
        "-blockdev", "driver=raw,node-name=agent,read-only=on,"
                     "file.driver=file,file.filename=/v/agent.tar",
        "-device", "virtio-blk-pci,id=agent,drive=agent,serial=agentctl-agent",
        "-blockdev", "driver=raw,node-name=data,file.driver=file,file.filename=/v/data.img,"
                     "discard=unmap,detect-zeroes=unmap",
        "-device", "virtio-blk-pci,id=data,drive=data,serial=agentctl-data",
        "-netdev", "user,id=net,net=10.0.2.0/24",
        "-device", "virtio-net-pci,netdev=net,romfile=",
        "-device", "virtio-rng-pci",
        "-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on",
        "-device", "virtio-serial-pci,id=serial",
        "-chardev", "socket,id=org.agentctl.control,path=/v/control.sock,server=on,wait=off",
        "-device", "virtserialport,bus=serial.0,chardev=org.agentctl.control,name=org.agentctl.control",
        "-chardev", "socket,id=org.agentctl.files,path=/v/files.sock,server=on,wait=off",
        "-device", "virtserialport,bus=serial.0,chardev=org.agentctl.files,name=org.agentctl.files",
        "-device", "pcie-root-port,id=hotplug0,chassis=1,slot=1",
        "-device", "pcie-root-port,id=hotplug1,chassis=2,slot=2",
        "-device", "vmgenid,guid=auto",
    ]
    # fmt: on


@pytest.mark.parametrize(
    ("accelerator", "accel", "cpu", "cmdline"),
    [
        (Accelerator.KVM, "kvm", "host", CMDLINE),
        (Accelerator.HVF, "hvf", "host", CMDLINE),
        (Accelerator.TCG, "tcg,thread=multi", "max,la57=off,erms=off", f"{CMDLINE} clearcpuid=cx16"),
    ],
)
def test_the_command_line(accelerator: Accelerator, accel: str, cpu: str, cmdline: str) -> None:
    machine = dataclasses.replace(MACHINE, accelerator=accelerator)
    assert machine.argv(Path("/usr/bin/qemu-system-x86_64")) == golden(accel, cpu, cmdline)


def test_the_command_line_of_the_probe() -> None:
    # fmt: off
    assert probe_argv(Path("/q"), Accelerator.KVM, Path("/i/kernel")) == [
        "/q",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        "-machine", "q35,vmport=off,usb=off,sata=off,smbus=off",
        "-accel", "kvm",
        "-cpu", "host",
        "-smp", "1",
        "-m", "256M",
        "-kernel", "/i/kernel",
        "-append", "console=ttyS0 panic=-1 loglevel=6",
        "-chardev", "stdio,id=console,signal=off",
        "-serial", "chardev:console",
    ]
    # fmt: on


def test_what_is_optional_leaves_nothing_behind() -> None:
    machine = dataclasses.replace(MACHINE, data=None, serial_ports=(), sandbox=False, hotplug_ports=0)
    argv = machine.argv(Path("/q"))
    for absent in ("-sandbox", "data", "virtserialport", "pcie-root-port"):
        assert not [word for word in argv if absent in word]


def test_shared_memory_is_the_last_device_and_has_address_space() -> None:
    """Behind all others, so that nothing has another address or name with it than without."""
    machine = dataclasses.replace(MACHINE, bulk=BulkMemory(Path("/proc/7/fd/8"), 64 * MIB))
    argv = machine.argv(Path("/usr/bin/qemu-system-x86_64"))
    plain = golden("kvm", "host", f"{CMDLINE} memmap=64M!0x180000000 swiotlb=noforce")
    plain[plain.index("-m") + 1] = "size=2048M,maxmem=4160M"
    # fmt: off
    assert argv == [
        *plain,
        "-object", "memory-backend-file,id=bulk,mem-path=/proc/7/fd/8,share=on,prealloc=off,size=64M",
        "-device", "virtio-pmem-pci,id=bulk-device,memdev=bulk,memaddr=0x180000000",
    ]
    # fmt: on


@pytest.mark.parametrize(
    ("memory", "address"),
    [(256, 5 * GIB), (1024, 5 * GIB), (1025, 6 * GIB), (2816, 7 * GIB), (65536, 68 * GIB)],
)
def test_shared_memory_is_behind_all_ram_at_a_gib(memory: int, address: int) -> None:
    bulk = BulkMemory(Path("/b"), 64 * MIB)
    machine = dataclasses.replace(MACHINE, memory=memory * MIB, bulk=bulk)
    argv = machine.argv(Path("/q"))
    assert f" memmap=64M!{address:#x} " in machine.kernel_cmdline
    assert argv[-1].endswith(f",memaddr={address:#x}")
    # The region for such devices begins at 4 GiB at the earliest.
    maxmem = int(argv[argv.index("-m") + 1].partition("maxmem=")[2].removesuffix("M")) * MIB
    assert 4 * GIB + maxmem - machine.memory >= address + bulk.size


def test_shared_memory_has_a_driver_where_the_command_line_cannot_tell_of_it() -> None:
    bulk = BulkMemory(Path("/b"), 64 * MIB)
    machine = dataclasses.replace(MACHINE, arch=Arch.AARCH64, accelerator=Accelerator.HVF, bulk=bulk)
    argv = machine.argv(Path("/q"))
    assert "memmap" not in machine.kernel_cmdline
    assert argv[argv.index("-m") + 1] == "size=2048M,maxmem=2112M"
    assert argv[-1] == "virtio-pmem-pci,id=bulk-device,memdev=bulk"


def test_another_architecture_has_its_own_board() -> None:
    machine = dataclasses.replace(MACHINE, arch=Arch.AARCH64, accelerator=Accelerator.HVF)
    argv = machine.argv(Path("/q"))
    assert argv[argv.index("-machine") + 1] == "virt"
    assert machine.kernel_cmdline.startswith("console=ttyAMA0 ")
    assert "vmgenid,guid=auto" not in argv
    assert machine.arch.qemu == "qemu-system-aarch64"


def test_the_root_is_the_first_disk() -> None:
    disks = [word for word in MACHINE.argv(Path("/q")) if word.startswith("virtio-blk-pci")]
    assert disks[0].endswith("serial=agentctl-root")


def test_kernel_arguments_are_appended() -> None:
    machine = dataclasses.replace(MACHINE, cmdline=("quiet", "agentctl.debug=1"))
    assert machine.kernel_cmdline == f"{CMDLINE} quiet agentctl.debug=1"


def test_commas_are_doubled_where_qemu_splits_and_only_there() -> None:
    odd = Path("/a,b")
    machine = dataclasses.replace(
        MACHINE,
        kernel=odd / "kernel",
        initrd=odd / "initrd",
        root=odd / "root",
        agent=odd / "agent",
        data=odd / "data",
        bulk=BulkMemory(odd / "bulk", MIB),
        qmp=odd / "qmp",
        events=odd / "events",
        console=odd / "console",
        serial_ports=(SerialPort("p", odd / "port"),),
    )
    argv = machine.argv(Path("/a,b/qemu"))
    plain = [word for word in argv if "/a,b/" in word]
    assert plain == ["/a,b/qemu", "/a,b/kernel", "/a,b/initrd"]
    doubled = [word.split("/a,,b/")[1].split(",")[0] for word in argv if "/a,,b/" in word]
    assert doubled == ["qmp", "events", "console", "root", "agent", "data", "port", "bulk"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpus": 0}, "at least one CPU, not 0"),
        ({"cpus": -1}, "at least one CPU"),
        ({"memory": 255 * MIB}, "at least 256 MiB"),
        ({"memory": 512 * MIB + 1}, "whole MiB"),
        ({"kernel": Path("kernel")}, "absolute"),
        ({"data": Path("data.img")}, "absolute"),
        ({"bulk": BulkMemory(Path("bulk"), MIB)}, "absolute"),
        ({"bulk": BulkMemory(Path("/b"), MIB + 1)}, "whole MiB"),
        ({"bulk": BulkMemory(Path("/b"), 0)}, "whole MiB"),
        ({"qmp": Path("qmp.sock")}, "absolute"),
        ({"qmp": Path("/" + "x" * MAX_SOCKET_PATH)}, "104 bytes long; 103 is the limit"),
        ({"qmp": Path("/" + "ü" * 60)}, "121 bytes long"),
        ({"events": Path("events.sock")}, "absolute"),
        ({"serial_ports": (SerialPort("p", Path("/" + "x" * 200)),)}, "201 bytes long"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message) as caught:
        dataclasses.replace(MACHINE, **change)  # type: ignore[arg-type]
    assert isinstance(caught.value, ProvisionError)


def test_the_longest_socket_path_is_accepted() -> None:
    path = Path("/" + "x" * (MAX_SOCKET_PATH - 1))
    assert dataclasses.replace(MACHINE, qmp=path).qmp == path


def _kernel_image() -> bytes:
    """Just enough of a bzImage that QEMU loads it (Documentation/arch/x86/boot.rst): one setup sector."""
    image = bytearray(64 << 10)
    image[0x1F1] = 1  # setup_sects
    image[0x202:0x208] = b"HdrS" + (0x020F).to_bytes(2, "little")  # boot protocol 2.15
    image[0x211] = 1  # loadflags: LOADED_HIGH
    image[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")  # initrd_addr_max
    return bytes(image)


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64")
@pytest.mark.parametrize("memory", [256, 3000, 6144], ids="{} MiB".format)
def test_qemu_builds_this_machine(tmp_path: Path, memory: int) -> None:
    """A real QEMU takes every option, a comma in every path; its CPUs are not started."""
    home = tmp_path / "a,b"
    home.mkdir(mode=0o700)
    for name in ("initrd", "agent.tar", "data.img"):
        (home / name).write_bytes(bytes(1 << 20))
    (home / "agent.tar").chmod(0o400)
    (home / "bulk").write_bytes(bytes(64 * MIB))
    (home / "kernel").write_bytes(_kernel_image())
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "root.qcow2", "1M"]
    subprocess.run(create, cwd=home, check=True, timeout=60)
    machine = dataclasses.replace(
        MACHINE,
        accelerator=Accelerator.TCG,
        cpus=2,
        memory=memory * MIB,
        kernel=home / "kernel",
        initrd=home / "initrd",
        root=home / "root.qcow2",
        agent=home / "agent.tar",
        data=home / "data.img",
        bulk=BulkMemory(home / "bulk", 64 * MIB),
        qmp=home / "q",
        events=home / "e",
        console=home / "c",
        serial_ports=(SerialPort("org.agentctl.control", home / "p"),),
    )
    argv = [*machine.argv(Path("qemu-system-x86_64")), "-S", "-qmp", "stdio"]
    commands = ("qmp_capabilities", "query-block", "query-uuid", "query-chardev", "query-memory-devices")
    script = "".join(json.dumps({"execute": command}) for command in (*commands, "quit"))
    done = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    blocks, uuid, chardevs, memory_devices = (answer["return"] for answer in answers[2:6])
    drives = {block["inserted"]["node-name"]: block["inserted"] for block in blocks}
    assert {name: drive["ro"] for name, drive in drives.items()} == {
        "root": False,
        "agent": True,
        "data": False,
    }
    assert drives["data"]["detect_zeroes"] == "unmap"
    assert drives["root"]["cache"]["no-flush"]
    assert not drives["data"]["cache"]["no-flush"]
    assert uuid["UUID"] == str(MACHINE.uuid)
    assert {"qmp", "events", "console", "org.agentctl.control"} <= {chardev["label"] for chardev in chardevs}
    assert [(device["type"], device["data"]["size"]) for device in memory_devices] == [
        ("virtio-pmem", 64 * MIB)
    ]
    assert memory_devices[0]["data"]["memaddr"] == -(-memory // 1024) * GIB + 4 * GIB
