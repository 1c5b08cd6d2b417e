"""Starts, ends and sudden deaths: whatever happens, nothing is lost, nothing is left, the next `up` works."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from host_agent.paths import InstancePaths
from host_agent.view import unmounting
from tests.e2e import test_bulk
from tests.e2e.harness import NO_NETWORK, Instance, eventually, fetch, is_refused
from tests.free_ports import free_port

pytestmark = pytest.mark.vm


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def running_again(vm: Instance, sessions_of: str, before: int) -> bool:
    status = vm.status()
    return status["stage"] == "running" and status["guest_connected"] and status[sessions_of] > before


def qemu_pids(vm: Instance) -> list[int]:
    found = []
    for pid in vm.processes():
        with suppress(OSError):
            if b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def interrupt_up_when(vm: Instance, progress: bytes) -> None:
    """^C in an ``up`` that has just said ``progress``: it ends as ^C does, and so does all that it started."""
    with vm.popen("up", stderr=subprocess.PIPE) as starting:
        assert starting.stderr is not None
        for line in starting.stderr:
            if progress in line:
                break
        starting.send_signal(signal.SIGINT)
        said = starting.stderr.read()
    assert starting.returncode == 130
    assert b"Traceback" not in said
    assert b"interrupted" in said
    eventually(lambda: vm.processes() == [])


def guest_agent_pid(vm: Instance) -> int:
    return int(vm.guest("systemctl show -P MainPID agentctl-agent.service"))


@contextmanager
def watched(vm: Instance, folder: Path) -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """`agentctl watch` beside the block; what it has told so far, as topics and states."""
    told = folder / "told"

    def lines() -> list[tuple[str, str]]:
        objects = [
            json.loads(line) for line in told.read_text().splitlines(keepends=True) if line[-1:] == "\n"
        ]
        return [(each["topic"], each["state"]) for each in objects]

    with told.open("wb") as output, vm.popen("watch", stdout=output) as watching:
        eventually(lambda: ("port", "listening") in lines())
        yield lines
        watching.terminate()
    assert watching.returncode in (0, 130, -signal.SIGTERM)  # the last of one that is just ending by itself


def test_a_second_up_joins_the_first(vm: Instance) -> None:
    before = vm.status()["qemu_pid"]
    started = time.monotonic()
    vm.agentctl("up")
    assert time.monotonic() - started < 30
    assert vm.status()["qemu_pid"] == before


def test_flags_on_a_running_instance_say_that_they_need_a_restart(vm: Instance) -> None:
    done = vm.agentctl("up", "--memory", "1GiB")
    assert b"restart" in done.stderr
    assert vm.status()["memory"] == 2 << 30


def test_guest_agent_killed_with_a_port_in_use(vm: Instance, image: str) -> None:
    port = free_port()
    container = vm.docker("run", "-d", "-p", f"{port}:80", image)
    try:
        eventually(lambda: fetch(port))
        before = vm.status()
        victim = guest_agent_pid(vm)
        vm.guest(f"kill -9 {victim}", check=False)
        # A connection made in between waits for the agent's return instead of failing.
        assert eventually(lambda: fetch(port)) == b"hello\n"
        eventually(lambda: running_again(vm, "agent_sessions", before["agent_sessions"]))
        assert guest_agent_pid(vm) != victim
        after = vm.status()
        assert after["qemu_pid"] == before["qemu_pid"]
        assert after["agent_pid"] == before["agent_pid"]
        assert vm.docker("inspect", "-f", "{{.State.Running}}", container) == "true"
    finally:
        vm.docker("rm", "-f", container)
    eventually(lambda: is_refused(port))


def test_host_agent_killed_with_a_port_in_use(vm: Instance, image: str, tmp_path: Path) -> None:
    port = free_port()
    container = vm.docker("run", "-d", "-p", f"{port}:80", image)
    try:
        eventually(lambda: fetch(port))
        guest_before = guest_agent_pid(vm)
        before = vm.status()
        with vm.popen("top", "--once", "--json", "--interval", "1", stdout=subprocess.PIPE) as looking:
            while looking.poll() is None:
                assert fetch(port) == b"hello\n"
            assert looking.stdout is not None
            load = json.load(looking.stdout)
        (row,) = (row for row in load["containers"] if container.startswith(row["id"]))
        assert row["name"] == vm.docker("inspect", "-f", "{{.Name}}", container).removeprefix("/")
        assert row["memory"] > 0
        assert row["processes"] >= 1
        assert load["guest"]["cpu_busy"] > 0
        assert load["guest"]["data_total"] > load["guest"]["data_free"] > 0
        assert {each["name"] for each in load["processes"]} == {"qemu", "host-agent", "file-server"}
        assert load["received"] > 0
        assert port in {row["host_port"] for row in load["ports"]}
        with watched(vm, tmp_path) as told:
            kill(before["agent_pid"])
            assert eventually(lambda: fetch(port)) == b"hello\n"
            eventually(lambda: running_again(vm, "agent_restarts", before["agent_restarts"]))
            eventually(lambda: ("host-agent", "away") in told())
            eventually(lambda: ("port", "listening") in told()[told().index(("host-agent", "away")) :])
        lost = told().index(("host-agent", "away"))
        assert ("guest", "away") not in told()[:lost]
        assert told()[lost + 1] == ("host-agent", "connected")
        after = vm.status()
        assert after["qemu_pid"] == before["qemu_pid"]
        assert after["agent_pid"] != before["agent_pid"]
        assert guest_agent_pid(vm) == guest_before
        assert vm.docker("context", "show") == "agentctl"
    finally:
        vm.docker("rm", "-f", container)
    eventually(lambda: is_refused(port))


def test_keeper_killed_and_then_the_host_agent(vm: Instance) -> None:
    before = vm.status()
    keeper = vm.keeper_pid()
    kill(keeper)

    def another_keeper() -> bool:
        with suppress(StopIteration):
            return vm.keeper_pid() != keeper
        return False

    eventually(another_keeper)
    assert vm.status()["agent_pid"] == before["agent_pid"]
    kill(before["agent_pid"])
    eventually(lambda: running_again(vm, "agent_restarts", before["agent_restarts"]))
    assert vm.status()["qemu_pid"] == before["qemu_pid"]


def test_keeper_and_host_agent_killed_at_once_and_up_takes_the_vm_over(vm: Instance) -> None:
    before = vm.status()
    # The keeper first, and stopped, so that neither can start the other again.
    keeper = vm.keeper_pid()
    os.kill(before["agent_pid"], signal.SIGSTOP)
    kill(keeper)
    kill(before["agent_pid"])
    eventually(lambda: vm.status()["stage"] == "failed")
    assert vm.agentctl("ports", check=False).returncode == 6
    vm.agentctl("up")
    after = vm.status()
    assert after["stage"] == "running"
    assert after["qemu_pid"] == before["qemu_pid"]


def leave_behind_what_a_power_cut_does(vm: Instance) -> None:
    """Sockets, an identity of a process that is gone, a state that says running: no obstacle for the next start."""
    for name in ("agent.sock", "docker.sock", "control.sock", "qmp.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(vm.directory / name))
    (vm.directory / "qemu.json").write_text('{"pid": 1, "birth": "long ago"}')
    (vm.directory / "state.json").write_text('{"wanted": true, "started_at": 1.0}')
    assert vm.status()["stage"] == "failed"


def test_qemu_killed_leaves_nothing_and_up_brings_the_data_back(
    vm: Instance, image: str, tmp_path: Path
) -> None:
    port = free_port()
    vm.docker("run", "-d", "--name", "durable", "-p", f"{port}:80", "--restart", "always", image)
    eventually(lambda: fetch(port))
    vm.guest("echo kept >/home/kept; sync")
    qemu, memory = vm.status()["qemu_pid"], test_bulk.memory_of(vm).stat()
    assert qemu in test_bulk.holders(memory)
    with watched(vm, tmp_path) as told:
        before = len(told())
        kill(qemu)
        eventually(lambda: vm.status()["stage"] == "failed")
        eventually(lambda: told()[-1] == ("instance", "failed"))
    assert {("host-agent", "away"), ("port", "closed"), ("mount", "gone")} <= set(told()[before:])
    status = vm.status()
    # How it ended is known to whoever started it; this host agent has only taken it over.
    assert "QEMU" in status["detail"]
    assert "agentctl up" in status["hint"]
    eventually(lambda: vm.processes() == [])
    assert is_refused(port)
    left = {path.name for path in vm.directory.iterdir() if path.is_socket()}
    assert left == set()
    assert test_bulk.holders(memory) == []
    assert not InstancePaths(vm.directory).bulk_memory.exists()
    assert vm.docker("context", "show") == "default"

    leave_behind_what_a_power_cut_does(vm)
    # Without the memory that host and VM share, now that it starts anyway; with it again after the next stop.
    vm.agentctl("up", "--no-bulk")
    assert vm.status()["stage"] == "running"
    # A container that restarts is back by itself, and its port with it.
    assert eventually(lambda: fetch(port)) == b"hello\n"
    assert vm.guest("cat /home/kept") == "kept\n"
    vm.docker("rm", "-f", "durable")
    test_bulk.there_is_none(vm)


def test_stop_ends_everything_and_keeps_containers_images_and_flags(
    vm: Instance, image: str, project: Path
) -> None:
    vm.docker("create", "--name", "kept", image)
    # One that starts with the VM, and needs its bind mount then.
    (project / "page").write_text("still here\n")
    command = "cat /src/page >>/src/started; exec sleep 600"
    early = ("run", "-d", "--restart", "always", "--name", "early", *NO_NETWORK, "-v", f"{project}:/src")
    vm.docker(*early, image, "/bin/sh", "-c", command)
    # One that needs longer than systemd's usual patience to end well, and says so to Docker.
    trap = "trap '/bin/busybox sleep 12; echo bye >/volume/said; exit' TERM; while :; do /bin/busybox sleep 0.2; done"
    slow = ("run", "-d", "--name", "slow", "--stop-timeout", "40", *NO_NETWORK, "-v", "kept:/volume")
    vm.docker(*slow, image, "/bin/sh", "-c", trap)
    machine_id = vm.guest("cat /etc/machine-id")
    host_key = vm.guest("cat /var/lib/agentctl/ssh/ssh_host_ed25519_key.pub")
    vm.guest("touch /on-the-throw-away-root")
    view = vm.directory / "view"
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        vm.agentctl("view")
        assert str(view) in unmounting.mounted()
    with vm.popen("stop") as stopping:
        eventually(lambda: vm.status()["stage"] == "stopping")
        meanwhile = vm.agentctl("up", check=False)
        assert meanwhile.returncode == 5
        assert b"just stopping" in meanwhile.stderr
        # A host agent that is killed while it stops the instance has a successor that goes on with that.
        kill(vm.status()["agent_pid"])
    assert stopping.returncode == 0
    assert vm.status()["stage"] == "stopped"
    assert vm.processes() == []
    assert str(view) not in unmounting.mounted()
    assert not view.exists()
    assert vm.docker("context", "show") == "default"
    assert vm.agentctl("stop").returncode == 0, "stopping what is stopped is no error"

    # ^C while it boots, and while Docker is waited for: stopped again, nothing left.
    interrupt_up_when(vm, b"guest: kernel")
    interrupt_up_when(vm, b"waiting for Docker")

    # Two at once: one starts it, both end well.
    (project / "started").write_text("")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with vm.popen("up", "--bulk", **quiet) as first, vm.popen("up", "--bulk", **quiet) as second:
        pass
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(qemu_pids(vm)) == 1
    status = vm.status()
    assert (status["cpus"], status["memory"], status["disk"]) == (2, 2 << 30, 20 << 30)
    assert status["bulk_memory"] == 64 << 20
    assert vm.guest(f"findmnt -n -o SOURCE {test_bulk.FOLDER}") == "/dev/pmem0\n"
    eventually(lambda: (project / "started").read_text() == "still here\n")
    assert vm.docker("inspect", "-f", "{{.Name}}", "kept") == "/kept"
    assert vm.guest("cat /etc/machine-id") == machine_id
    assert vm.guest("cat /var/lib/agentctl/ssh/ssh_host_ed25519_key.pub") == host_key
    assert vm.guest("ls /on-the-throw-away-root 2>/dev/null || true") == ""
    assert (
        vm.docker("run", "--rm", "-v", "kept:/volume", image, "/bin/busybox", "cat", "/volume/said") == "bye"
    )
    vm.docker("rm", "-f", "kept", "slow", "early")


def test_a_guest_that_reboots_comes_back_with_all_that_was_kept(vm: Instance, image: str) -> None:
    port, before, keeper = free_port(), vm.status(), vm.keeper_pid()
    boot = vm.guest("cat /proc/sys/kernel/random/boot_id")
    with tempfile.TemporaryDirectory(prefix="agentctl-e2e-", dir=Path.home()) as folder:
        (Path(folder) / "index.html").write_text("from the host")
        restarting = ("--name", "durable", "-p", f"{port}:80", "--restart", "always")
        vm.docker("run", "-d", *restarting, "-v", f"{folder}:/www", image)
        eventually(lambda: fetch(port))
        vm.guest("touch /on-the-throw-away-root; echo kept >/home/kept")
        vm.agentctl("exec", "sudo", "reboot", check=False)
        eventually(lambda: vm.status()["stage"] == "booting")
        # Who asks for it meanwhile sees it come, and waits until it is there.
        joined = vm.agentctl("up").stderr
        assert b"the guest reboots" in joined
        assert b"guest: kernel" in joined
        after = vm.status()
        assert (after["stage"], after["bulk_memory"]) == ("running", before["bulk_memory"])
        assert (after["agent_pid"], vm.keeper_pid()) == (before["agent_pid"], keeper)
        assert (after["restarts"], after["agent_restarts"]) == (before["restarts"], before["agent_restarts"])
        assert after["qemu_pid"] != before["qemu_pid"]
        assert vm.guest("cat /proc/sys/kernel/random/boot_id") != boot
        # The container, its port, and the mount below it.
        assert eventually(lambda: fetch(port)) == b"from the host"
        assert vm.guest("cat /home/kept; ls /on-the-throw-away-root 2>/dev/null || true") == "kept\n"
        assert vm.docker("context", "show") == "agentctl"
        vm.docker("rm", "-f", "durable")
    eventually(lambda: is_refused(port))


def test_an_interrupted_image_build_leaves_nothing(vm: Instance, other_home: Path) -> None:
    home = other_home
    other = Instance(home, vm.docker_config)
    interrupt_up_when(other, b"downloading packages")
    assert {path.name for path in (home / "images").iterdir()} <= {".lock", "failed-build.log"}
    mine = [pid for pid in Path("/proc").glob("[0-9]*") if _mentions(pid, home)]
    assert mine == []


def _mentions(process: Path, home: Path) -> bool:
    with suppress(OSError):
        return os.fsencode(home) in (process / "cmdline").read_bytes()
    return False


def test_what_is_deleted_in_the_vm_is_given_back_to_the_host(vm: Instance) -> None:
    disk = vm.directory / "data.img"
    vm.guest("head -c 200000000 /dev/urandom >/home/large; sync")
    full = disk.stat().st_blocks
    vm.guest("rm /home/large; sync")
    eventually(lambda: (full - disk.stat().st_blocks) * 512 > 150_000_000)


def test_a_docker_host_that_overrides_the_context_is_warned_about(vm: Instance) -> None:
    done = vm.agentctl("up", DOCKER_HOST="tcp://127.0.0.1:2375")
    assert b"warning: DOCKER_HOST=tcp://127.0.0.1:2375 is set" in done.stderr
    assert b"DOCKER_HOST" not in vm.agentctl("up").stderr


def test_what_is_private_is_private(vm: Instance) -> None:
    assert vm.directory.stat().st_mode & 0o777 == 0o700
    sockets = [path for path in vm.directory.iterdir() if path.is_socket()]
    assert {path.name for path in sockets} >= {"agent.sock", "docker.sock", "qmp.sock", "control.sock"}
    for path in sockets:
        assert path.stat().st_mode & 0o077 == 0, path


def test_deleting_asks_and_logs_tell(vm: Instance) -> None:
    done = vm.agentctl("delete", check=False)
    assert done.returncode == 2
    assert b"--yes" in done.stderr
    assert vm.status()["stage"] == "running"
    assert b"stage=running" in vm.agentctl("logs", "--component", "host").stdout
    lines = vm.agentctl("logs", "-n", "5000").stdout.decode().splitlines()
    assert {line.split()[2] for line in lines} >= {"host", "files", "console", "guest", "docker"}
    assert [line[:23] for line in lines] == sorted(line[:23] for line in lines)
    assert b"Linux version" in vm.agentctl("logs", "--component", "console", "-n", "1000").stdout
    assert b"dockerd" in vm.agentctl("logs", "--component", "docker").stdout
    assert b"session" in vm.agentctl("logs", "--component", "guest").stdout
