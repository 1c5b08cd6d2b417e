"""What a VM that runs for weeks needs: its clock stays right, its disk grows, and what it does not use is given back."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from pathlib import Path

import pytest

from host_agent.errors import ExitCode
from tests.e2e.harness import Instance, eventually
from tests.e2e.test_bulk_restore import Monitor

pytestmark = pytest.mark.vm

MIB = 1 << 20
GIB = 1 << 30


def clock_is_right(vm: Instance) -> bool:
    """The guest's clock shows what this machine's showed while it was looked at, give or take 0.1 s."""
    before = time.time()
    shown = float(vm.guest("date +%s.%N"))
    return before - 0.1 <= shown <= time.time() + 0.1


def resident(pid: int) -> int:
    """Bytes of this machine's memory that are the process's own (statm, proc(5))."""
    _, total, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(total) - int(shared)) * 4096


def test_the_clock_of_a_vm_that_stood_still_is_right_at_once(vm: Instance) -> None:
    assert clock_is_right(vm)
    with closing(Monitor(vm.directory / "qmp.sock")) as monitor:
        monitor.ask("stop")
        time.sleep(2)
        monitor.ask("cont")
    time.sleep(1)
    assert clock_is_right(vm)
    told = re.findall(r"the VM's clock was ([0-9.]+) s behind", (vm.directory / "agent.log").read_text())
    assert 1.8 < float(told[-1]) < 4


def test_a_disk_in_use_grows_and_gives_back_what_it_does_not_need(vm: Instance) -> None:
    disk = vm.directory / "data.img"
    before = json.loads(vm.agentctl("disk", "--json").stdout)
    size = before["size"] + GIB
    grown = json.loads(vm.agentctl("disk", "grow", f"{size}B", "--json").stdout)
    assert (grown["size"], disk.stat().st_size) == (size, size)
    filesystem = int(vm.guest("df -B1 --output=size /var/lib/docker | tail -1"))
    assert filesystem > before["size"]
    assert vm.status()["disk"] == size
    refused = vm.agentctl("disk", "grow", "4GiB", check=False)
    assert (refused.returncode, b"never shrinks" in refused.stderr) == (ExitCode.RESOURCES, True)

    # Without the guest's own discards, as after a crash of it: only what is asked for is given back.
    vm.guest(
        "mount -o remount,nodiscard /var/lib/agentctl && head -c 200000000 /dev/urandom >/home/large && sync"
        " && rm /home/large && sync"
    )
    full = json.loads(vm.agentctl("disk", "--json").stdout)["allocated"]
    compacted = json.loads(vm.agentctl("disk", "compact", "--json").stdout)
    vm.guest("mount -o remount,discard /var/lib/agentctl")
    assert full - compacted["allocated"] > 150_000_000
    assert compacted["given_back"] > 150_000_000
    assert compacted["used"] < compacted["allocated"] + 100 * MIB


def test_memory_that_the_vm_does_not_use_any_more_is_given_back(vm: Instance) -> None:
    pid = vm.status()["qemu_pid"]
    vm.guest("head -c 200000000 /dev/zero >/dev/shm/large")
    full = resident(pid)
    vm.guest("rm /dev/shm/large")
    eventually(lambda: full - resident(pid) > 150_000_000)
