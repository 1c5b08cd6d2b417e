"""The memory that host and VM share: there, one piece, the same bytes on both sides, and gone with the VM."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from host_agent import bulk_memory
from host_agent.paths import InstancePaths
from protocol.bulk import SLOT
from protocol.region import FILE_SIZE, FILES
from protocol.session import Role
from tests.e2e.harness import Instance, eventually

pytestmark = pytest.mark.vm

FOLDER = "/run/agentctl/bulk"
MEMORY_NAME = "/memfd:agentctl-bulk"

# In the middle of the files plane's halves, where slots are used last: these are the agents' own.
OF_HOST = FILES.first + FILES.slots // 2
OF_GUEST = OF_HOST + FILES.slots

# What an agent does: maps the file, and says where it is; then takes commands, one a line.
GUEST = """
import json, resource, sys
from guest_agent.bulk_memory import open_region
region, extents = open_region()
before = resource.getrusage(resource.RUSAGE_SELF)
sum(region.view(slot)[0] for slot in range(384))
after = resource.getrusage(resource.RUSAGE_SELF)
faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
print(json.dumps({"extents": extents, "faults": faults}), flush=True)
for line in sys.stdin:
    slot, at, text = line.split()
    view = region.view(int(slot))
    if text != "?":
        view[int(at) : int(at) + len(text)] = text.encode()
    print(bytes(view[int(at) : int(at) + 5]).decode(), flush=True)
"""


def holders(memory: os.stat_result) -> list[int]:
    """The processes that have this memory open or mapped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = any(_is(memory, path) for path in (process / "fd").iterdir())
            mapped = (line.split() for line in (process / "maps").read_text().splitlines())
            if opened or any(str(memory.st_ino) == row[4] and MEMORY_NAME in row for row in mapped):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def _is(memory: os.stat_result, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(memory, path.stat())
    return False


def memory_of(vm: Instance) -> Path:
    found = bulk_memory.find(InstancePaths(vm.directory), vm.status()["qemu_pid"])
    assert found is not None
    return found


def test_it_is_mounted_for_root_alone(vm: Instance) -> None:
    status = vm.status()
    assert (status["bulk_memory"], status["bulk_reason"]) == (64 << 20, "")
    assert b"shared memory, 64 MiB" in vm.agentctl("status").stdout
    source, kind, options = vm.guest(f"findmnt -n -o SOURCE,FSTYPE,OPTIONS {FOLDER}").split()
    assert (source, kind) == ("/dev/pmem0", "ext4")
    assert {"dax=always", "nosuid", "nodev", "noexec", "noatime"} <= set(options.split(","))
    assert vm.guest(f"stat -c '%a %U' {FOLDER} {FOLDER}/slots").splitlines() == ["700 root", "600 root"]
    denied = vm.agentctl("exec", "cat", f"{FOLDER}/slots", check=False)
    assert denied.returncode != 0
    assert b"Permission denied" in denied.stderr


def test_a_byte_that_one_side_writes_the_other_reads(vm: Instance) -> None:
    with vm.popen(
        *("exec", "-T", "-u", "root", "-e", "PYTHONPATH=/run/agentctl/agent", "python3", "-c", GUEST),
        stdin=-1,
        stdout=-1,
    ) as agent:
        assert agent.stdin is not None
        assert agent.stdout is not None

        def ask(slot: int, at: int, text: str) -> str:
            assert agent.stdin is not None
            assert agent.stdout is not None
            agent.stdin.write(f"{slot} {at} {text}\n".encode())
            agent.stdin.flush()
            return agent.stdout.readline().decode().strip()

        told = json.loads(agent.stdout.readline())
        offset, length = told["extents"]
        assert length == FILE_SIZE
        # Mapped by huge pages: else there would be a fault for each slot.
        assert told["faults"] < 100
        region = bulk_memory.map_region(memory_of(vm), told["extents"])
        for slot, at in ((OF_HOST, 0), (OF_HOST, SLOT - 5), (OF_GUEST, 4096), (OF_GUEST, SLOT - 5)):
            assert ask(slot, at, "guest") == "guest"
            assert bytes(region.view(slot)[at : at + 5]) == b"guest"
            region.view(slot)[at : at + 5] = b"host!"
            assert ask(slot, at, "?") == "host!"
        with memory_of(vm).open("rb") as memory:
            memory.seek(offset + OF_GUEST * SLOT + SLOT - 5)
            assert memory.read(5) == b"host!"
        own, _ = region.halves(FILES, Role.HOST)
        at = FILES.slots // 2 * SLOT + 7
        own[at : at + 5] = b"files"
        assert ask(OF_HOST, 7, "?") == "files"
        agent.stdin.close()
    region.close()


def test_a_host_agent_that_comes_later_finds_it(vm: Instance) -> None:
    before = vm.status()
    same = memory_of(vm).stat().st_ino
    os.kill(before["agent_pid"], signal.SIGKILL)
    eventually(lambda: vm.status()["agent_restarts"] > before["agent_restarts"])
    assert memory_of(vm).stat().st_ino == same
    assert vm.status()["bulk_memory"] == 64 << 20


def test_it_goes_with_a_qemu_that_is_killed(vm: Instance) -> None:
    qemu = vm.status()["qemu_pid"]
    memory = memory_of(vm).stat()
    assert qemu in holders(memory)
    os.kill(qemu, signal.SIGKILL)
    eventually(lambda: vm.processes() == [])
    assert holders(memory) == []
    assert not InstancePaths(vm.directory).bulk_memory.exists()


def test_no_bulk_has_none_of_it_and_is_remembered(vm: Instance) -> None:
    vm.agentctl("up", "--no-bulk")
    status = vm.status()
    assert (status["bulk_memory"], status["bulk_reason"]) == (0, "asked for with --no-bulk")
    assert b"inline (asked for with --no-bulk)" in vm.agentctl("status").stdout
    assert bulk_memory.find(InstancePaths(vm.directory), status["qemu_pid"]) is None
    assert vm.guest("ls /dev/pmem0 2>/dev/null || true") == ""
    assert "bulk" not in vm.guest("mount; systemctl --failed --plain --no-legend")
    # Joined, it says what only a restart changes.
    assert b"bulk stay as they are until you restart it" in vm.agentctl("up", "--bulk").stderr
    assert vm.agentctl("up").stderr.count(b"bulk") == 0
    vm.agentctl("stop")
    vm.agentctl("up", "--bulk")
    assert vm.status()["bulk_memory"] == 64 << 20
    assert vm.guest(f"findmnt -n -o SOURCE {FOLDER}") == "/dev/pmem0\n"
