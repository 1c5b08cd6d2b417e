"""The memory that host and VM share: there, one piece, the same bytes on both sides, and gone with the VM."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from host_agent import bulk_filesystem, bulk_memory
from host_agent.paths import InstancePaths
from protocol.bulk import SLOT
from protocol.region import CONTROL, FILE_SIZE, FILES, Plane
from protocol.session import Role
from tests.e2e.harness import NO_NETWORK, PATIENCE, Instance, eventually
from tests.e2e.test_mounts import file_server_pid, files_agent_pid
from tests.e2e.test_ports import greeting, guest_server
from tests.free_ports import free_port

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


# --- what goes through it --------------------------------------------------------------------------

LARGE = 32 * 1000 * 1000  # more than the slots of a plane hold
COPIED = 10 * 1000 * 1000  # over and over
VICTIMS = ["guest agent", "files agent", "host agent", "file server"]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def halves_with(vm: Instance, plane: Plane, content: bytes) -> set[str]:
    """Whose slots of ``plane`` hold a piece of ``content``, which is random: that is the way it has gone."""
    region = bulk_memory.map_region(memory_of(vm), [bulk_filesystem.FILE_START, FILE_SIZE])
    try:
        # Pieces begin anywhere in a stream; a few bytes of a slot's beginning tell.
        return {
            role.value
            for role in (Role.HOST, Role.GUEST)
            for start in range(0, plane.slots * SLOT, SLOT)
            if bytes(region.halves(plane, role)[0][start : start + 32]) in content
        }
    finally:
        region.close()


def copied_in_a_container(vm: Instance, image: str, project: Path, size: int) -> bytes:
    """Have a container copy a file of random content, whole and intact; returns the content."""
    content = os.urandom(size)
    (project / "in").write_bytes(content)
    script = "sha256sum </src/in && cp /src/in /src/out && sync && sha256sum </src/out"
    options = ("--rm", *NO_NETWORK, "-v", f"{project}:/src", image, "/bin/busybox", "sh", "-c", script)
    wanted = hashlib.sha256(content).hexdigest()
    assert [line.split()[0] for line in vm.docker("run", *options).splitlines()] == [wanted, wanted]
    assert digest(project / "out") == wanted
    return content


def echoed(port: int, content: bytes) -> bytes:
    """What comes back of ``content``; raises ``OSError`` if the connection is reset, or ends before there is a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        stream = connection.makefile("rb")
        if not (greeted := stream.readline()):
            raise ConnectionResetError("nobody has answered")
        assert greeted == b"it\n"

        def send() -> None:
            with suppress(OSError):
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            return stream.read()
        finally:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join()


def test_a_large_file_is_intact_both_ways(vm: Instance, image: str, project: Path) -> None:
    content = copied_in_a_container(vm, image, project, LARGE)
    assert halves_with(vm, FILES, content) == {"host", "guest"}


def test_a_port_carries_much_both_ways(vm: Instance) -> None:
    port, content = free_port(), os.urandom(LARGE)
    with guest_server(vm, port, "it", "127.0.0.1"):
        assert eventually(lambda: greeting(port)) == "it"
        back = echoed(port, content)
    assert len(back) == LARGE + len(b"bye")
    assert back == content + b"bye"
    assert halves_with(vm, CONTROL, content) == {"host", "guest"}


def pid_of(vm: Instance, victim: str) -> int:
    """0 while there is none."""
    if victim == "host agent":
        return int(vm.status().get("agent_pid") or 0)
    if victim == "file server":
        return file_server_pid(vm)
    if victim == "files agent":
        return files_agent_pid(vm)
    return int(vm.guest("systemctl show -P MainPID agentctl-agent.service", check=False) or 0)


def kill(vm: Instance, victim: str) -> None:
    """SIGKILL, and wait for a successor."""
    pid = pid_of(vm, victim)
    assert pid
    if victim in ("host agent", "file server"):
        os.kill(pid, signal.SIGKILL)
    else:
        vm.guest(f"kill -9 {pid}", check=False)
    eventually(lambda: pid_of(vm, victim) not in (0, pid))


@pytest.mark.parametrize("victim", VICTIMS)
def test_who_is_killed_in_the_middle_of_it_spoils_nothing(
    vm: Instance, image: str, project: Path, victim: str
) -> None:
    content, port = os.urandom(COPIED), free_port()
    (project / "in").write_bytes(content)
    # Over and over, so that some of it is under way whenever somebody dies.
    script = "while [ ! -e /src/stop ]; do cp /src/in /src/out && cmp /src/in /src/out && touch /src/copied || exit; done"
    options = ("-d", *NO_NETWORK, "-v", f"{project}:/src")
    container = vm.docker("run", *options, image, "/bin/busybox", "sh", "-c", script)
    outcomes: list[str] = []
    stop = threading.Event()

    def carry() -> None:
        while not stop.is_set():
            with suppress(OSError):
                back = echoed(port, content)
                outcomes.append(
                    "whole" if back == content + b"bye" else "cut" if content.startswith(back) else "wrong"
                )

    try:
        with guest_server(vm, port, "it", "127.0.0.1"):
            # The server goes with the guest agent, which runs it.
            assert eventually(lambda: greeting(port)) == "it"
            carrier = threading.Thread(target=carry)
            carrier.start()
            try:
                eventually(
                    lambda: (project / "out").exists() and (project / "out").stat().st_size > COPIED // 4
                )
                kill(vm, victim)
                (project / "copied").unlink(missing_ok=True)
                eventually(lambda: (project / "copied").exists(), 240)
            finally:
                stop.set()
                (project / "stop").touch()
                carrier.join()
        assert eventually(lambda: vm.docker("wait", container, check=False), 240) == "0"
    finally:
        vm.docker("rm", "-f", container)
    assert "wrong" not in outcomes
    assert digest(project / "out") == hashlib.sha256(content).hexdigest()
    # The memory is in use again, of both planes.
    (project / "stop").unlink()
    assert halves_with(vm, FILES, copied_in_a_container(vm, image, project, 4 << 20)) == {"host", "guest"}
    port, again = free_port(), os.urandom(4 << 20)
    with guest_server(vm, port, "it", "127.0.0.1"):
        assert eventually(lambda: greeting(port)) == "it"
        assert echoed(port, again) == again + b"bye"
    assert halves_with(vm, CONTROL, again) == {"host", "guest"}
    assert vm.status()["bulk_memory"] == 64 << 20


# --- without it (a VM takes minutes to start, emulated: tests/e2e/test_lifecycle.py starts it without) ------------


def there_is_none(vm: Instance) -> None:
    """The VM was started with --no-bulk, and says so."""
    status = vm.status()
    assert (status["bulk_memory"], status["bulk_reason"]) == (0, "asked for with --no-bulk")
    assert b"inline (asked for with --no-bulk)" in vm.agentctl("status").stdout
    assert bulk_memory.find(InstancePaths(vm.directory), status["qemu_pid"]) is None
    assert vm.guest("ls /dev/pmem0 2>/dev/null || true") == ""
    assert "bulk" not in vm.guest("mount; systemctl --failed --plain --no-legend")
    # Joined, it says what only a restart changes.
    assert b"bulk stay as they are until you restart it" in vm.agentctl("up", "--bulk").stderr
    assert vm.agentctl("up").stderr.count(b"bulk") == 0
