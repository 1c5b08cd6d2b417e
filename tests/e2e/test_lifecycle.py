"""Starts, ends and sudden deaths: whatever happens, nothing is lost, nothing is left, the next `up` works."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.harness import Instance, eventually, fetch, free_port, is_refused

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


def test_host_agent_killed_with_a_port_in_use(vm: Instance, image: str) -> None:
    port = free_port()
    container = vm.docker("run", "-d", "-p", f"{port}:80", image)
    try:
        eventually(lambda: fetch(port))
        guest_before = guest_agent_pid(vm)
        before = vm.status()
        kill(before["agent_pid"])
        assert eventually(lambda: fetch(port)) == b"hello\n"
        eventually(lambda: running_again(vm, "agent_restarts", before["agent_restarts"]))
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


def test_qemu_killed_leaves_nothing_and_up_brings_the_data_back(vm: Instance, image: str) -> None:
    port = free_port()
    vm.docker("run", "-d", "--name", "durable", "-p", f"{port}:80", "--restart", "always", image)
    eventually(lambda: fetch(port))
    vm.guest("echo kept >/home/kept; sync")
    kill(vm.status()["qemu_pid"])
    eventually(lambda: vm.status()["stage"] == "failed")
    status = vm.status()
    # How it ended is known to whoever started it; this host agent has only taken it over.
    assert "QEMU" in status["detail"]
    assert "agentctl up" in status["hint"]
    eventually(lambda: vm.processes() == [])
    assert is_refused(port)
    left = {path.name for path in vm.directory.iterdir() if path.is_socket()}
    assert left == set()
    assert vm.docker("context", "show") == "default"

    vm.agentctl("up")
    # A container that restarts is back by itself, and its port with it.
    assert eventually(lambda: fetch(port)) == b"hello\n"
    assert vm.guest("cat /home/kept") == "kept\n"
    vm.docker("rm", "-f", "durable")


def test_stop_ends_everything_and_keeps_containers_images_and_flags(vm: Instance, image: str) -> None:
    vm.docker("create", "--name", "kept", image)
    # One that needs longer than systemd's usual patience to end well, and says so to Docker.
    trap = "trap '/bin/busybox sleep 12; echo bye >/volume/said; exit' TERM; while :; do /bin/busybox sleep 0.2; done"
    slow = [
        "run",
        "-d",
        "--name",
        "slow",
        "--stop-timeout",
        "40",
        "-v",
        "kept:/volume",
        image,
        "/bin/sh",
        "-c",
        trap,
    ]
    vm.docker(*slow)
    machine_id = vm.guest("cat /etc/machine-id")
    host_key = vm.guest("cat /var/lib/agentctl/ssh/ssh_host_ed25519_key.pub")
    vm.guest("touch /on-the-throw-away-root")
    with vm.popen("stop") as stopping:
        eventually(lambda: vm.status()["stage"] == "stopping")
        meanwhile = vm.agentctl("up", check=False)
        assert meanwhile.returncode == 5
        assert b"just stopping" in meanwhile.stderr
    assert stopping.returncode == 0
    assert vm.status()["stage"] == "stopped"
    assert vm.processes() == []
    assert vm.docker("context", "show") == "default"
    assert vm.agentctl("stop").returncode == 0, "stopping what is stopped is no error"

    # ^C while it boots, and while Docker is waited for: stopped again, nothing left.
    interrupt_up_when(vm, b"guest: kernel")
    interrupt_up_when(vm, b"waiting for Docker")

    # Two at once: one starts it, both end well.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with vm.popen("up", **quiet) as first, vm.popen("up", **quiet) as second:
        pass
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(qemu_pids(vm)) == 1
    status = vm.status()
    assert (status["cpus"], status["memory"], status["disk"]) == (2, 2 << 30, 20 << 30)
    assert vm.docker("inspect", "-f", "{{.Name}}", "kept") == "/kept"
    assert vm.guest("cat /etc/machine-id") == machine_id
    assert vm.guest("cat /var/lib/agentctl/ssh/ssh_host_ed25519_key.pub") == host_key
    assert vm.guest("ls /on-the-throw-away-root 2>/dev/null || true") == ""
    assert (
        vm.docker("run", "--rm", "-v", "kept:/volume", image, "/bin/busybox", "cat", "/volume/said") == "bye"
    )
    vm.docker("rm", "-f", "kept", "slow")


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
    assert b"stage=running" in vm.agentctl("logs").stdout
    assert b"Linux version" in vm.agentctl("logs", "--component", "console", "-n", "1000").stdout
    assert b"dockerd" in vm.agentctl("logs", "--component", "docker").stdout
    assert b"session" in vm.agentctl("logs", "--component", "guest").stdout


def test_a_stale_socket_of_a_power_cut_is_no_obstacle(vm: Instance) -> None:
    """What a cut leaves: sockets, an identity of a process that is gone, a state that says running."""
    # On the way there: an agent that is killed while it stops the instance. Its successor goes on with that.
    with vm.popen("stop", stderr=subprocess.DEVNULL) as stopping:
        eventually(lambda: vm.status()["stage"] == "stopping")
        kill(vm.status()["agent_pid"])
    assert stopping.returncode == 0
    assert vm.status()["stage"] == "stopped"
    assert vm.processes() == []
    for name in ("agent.sock", "docker.sock", "control.sock", "qmp.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(vm.directory / name))
    (vm.directory / "qemu.json").write_text('{"pid": 1, "birth": "long ago"}')
    (vm.directory / "state.json").write_text('{"wanted": true, "started_at": 1.0}')
    assert vm.status()["stage"] == "failed"
    vm.agentctl("up")
    assert vm.status()["stage"] == "running"
