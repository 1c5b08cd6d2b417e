"""A VM that is saved, and goes on in another QEMU with memory of its own.

QEMU saves no part of a virtio-pmem device. Nothing needs what was in the slots: the sessions are other ones, and the
filesystem that the guest has mounted is there again, since it is always the same. And the guest has no queue of the
device to wait for, which shows when it syncs and when it shuts down.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from host_agent import bulk_memory
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from host_agent.vm import kill_recorded
from protocol.region import CONTROL, FILES
from tests.e2e.harness import BOOT_TIME, Instance, eventually
from tests.e2e.test_bulk import FOLDER, copied_in_a_container, echoed, halves_with, memory_of
from tests.e2e.test_ports import greeting, guest_server
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

# A stop that had to end QEMU by force would take the 120 s that the guest has for it.
GOOD_TIME = 100.0


class Monitor:
    """QEMU's, a command at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(BOOT_TIME)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        assert "QMP" in json.loads(self._file.readline())
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            said = json.loads(self._file.readline())
            if "event" not in said:
                assert "return" in said, f"{command}: {said['error']['desc']}"
                return said["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def leave_alone(vm: Instance) -> None:
    """Kill who looks after QEMU. The host agent is stopped first, so that it starts no other keeper."""
    status = vm.status()
    os.kill(status["agent_pid"], signal.SIGSTOP)
    os.kill(vm.keeper_pid(), signal.SIGKILL)
    os.kill(status["agent_pid"], signal.SIGKILL)
    eventually(lambda: vm.processes() == [status["qemu_pid"]])


def save(vm: Instance, file: Path, pid: int) -> None:
    """Write the whole state of the VM to ``file``, and end its QEMU, which may start no program for that."""
    with tempfile.TemporaryDirectory(prefix="ac-") as directory, ExitStack() as stack:
        path = Path(directory) / "state"
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(1)
        monitor = stack.enter_context(closing(Monitor(vm.directory / "qmp.sock")))
        monitor.ask("stop")
        monitor.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        monitor.ask("migrate", uri=f"unix:{path}")
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        state = eventually(lambda: finished(monitor))
        assert state["status"] == "completed", state
        monitor.ask("quit")
    eventually(lambda: ProcessIdentity.of(pid) is None)


def finished(monitor: Monitor) -> dict[str, Any] | None:
    state: dict[str, Any] = monitor.ask("query-migrate")
    return state if state.get("status") in ("completed", "failed", "cancelled") else None


def restore(vm: Instance, file: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """Start a QEMU by the ``command`` of the one that was saved, with memory of its own, and give it the state."""
    paths = InstancePaths(vm.directory)
    incoming = vm.directory / "incoming"
    with bulk_memory.created(paths) as memory, (vm.directory / "qemu.log").open("ab") as log:
        before = next(one for one in command if "mem-path=" in one).split("mem-path=")[1].split(",")[0]
        argv = [one.replace(before, str(memory.path)) for one in command]
        qemu = subprocess.Popen(
            [*argv, "-incoming", f"unix:{incoming}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            umask=0o177,
        )
        ProcessIdentity.of_child(qemu.pid).write(paths.qemu_identity)
        eventually(lambda: incoming.exists() or qemu.poll() is not None)
        assert qemu.poll() is None, (vm.directory / "qemu.log").read_text()[-2000:]
    with socket.socket(socket.AF_UNIX) as connection, file.open("rb") as source:
        connection.connect(str(incoming))
        connection.sendfile(source)
    with closing(Monitor(vm.directory / "qmp.sock")) as monitor:
        eventually(lambda: monitor.ask("query-status")["status"] != "inmigrate")
        monitor.ask("cont")
        assert monitor.ask("query-status")["status"] == "running"
    incoming.unlink(missing_ok=True)
    return qemu


@contextmanager
def saved_and_restored(vm: Instance) -> Iterator[subprocess.Popen[bytes]]:
    """The VM in a QEMU that the test has started, and must reap. Afterwards it runs in one of agentctl's again."""
    pid = vm.status()["qemu_pid"]
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    try:
        with tempfile.TemporaryDirectory(prefix="agentctl-state-", dir="/var/tmp") as directory:
            file = Path(directory) / "state"
            leave_alone(vm)
            save(vm, file, pid)
            qemu = restore(vm, file, command)
        yield qemu
    finally:
        kill_recorded(InstancePaths(vm.directory).qemu_identity)
        vm.agentctl("up")


def test_a_vm_is_saved_and_goes_on_with_memory_of_its_own(vm: Instance, image: str, project: Path) -> None:
    boot = vm.guest("cat /proc/sys/kernel/random/boot_id")
    content = os.urandom(8 << 20)
    (project / "before").write_bytes(content)
    memory = memory_of(vm).stat().st_ino
    with saved_and_restored(vm) as qemu:
        vm.agentctl("up")
        status = vm.status()
        assert (status["stage"], status["qemu_pid"]) == ("running", qemu.pid)
        assert status["bulk_memory"] == 64 << 20
        assert memory_of(vm).stat().st_ino != memory
        assert vm.guest("cat /proc/sys/kernel/random/boot_id") == boot
        # Nobody waits for a device of which nothing was saved.
        vm.guest(f"timeout 20 sync && timeout 20 sync -f {FOLDER}/slots")
        it_goes_through_the_new_memory(vm, image, project, content)
        begun = time.monotonic()
        vm.agentctl("stop")
        qemu.wait(BOOT_TIME)
        assert time.monotonic() - begun < GOOD_TIME, "it was ended by force"


def it_goes_through_the_new_memory(vm: Instance, image: str, project: Path, content: bytes) -> None:
    wanted = hashlib.sha256(content).hexdigest()
    assert vm.guest(f"sha256sum <{project}/before").split()[0] == wanted
    copied = copied_in_a_container(vm, image, project, 4 << 20)
    assert halves_with(vm, FILES, copied) == {"host", "guest"}
    port, sent = free_port(), os.urandom(4 << 20)
    with guest_server(vm, port, "it", "127.0.0.1"):
        assert eventually(lambda: greeting(port)) == "it"
        assert echoed(port, sent) == sent + b"bye"
    assert halves_with(vm, CONTROL, sent) == {"host", "guest"}
