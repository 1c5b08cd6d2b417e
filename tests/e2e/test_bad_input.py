"""What cannot be is refused in one sentence with a hint and a stable exit code, and nothing is touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.e2e.harness import Instance, eventually

pytestmark = pytest.mark.vm


@pytest.mark.parametrize(
    ("arguments", "code", "said", "hint"),
    [
        (["up", "--cpus", "0"], 4, "at least 1 cpu", "--cpus 1 to"),
        (["up", "--cpus", "4096"], 4, "cpus; asked for 4096", "--cpus 1 to"),
        (["up", "--memory", "900TiB"], 4, "asked for 900 TiB", "--memory"),
        (["up", "--memory", "16MiB"], 4, "at least 512 MiB", "--memory"),
        (["up", "--memory", "lots"], 2, "is not a size", "--help"),
        (["up", "--disk", "1MiB"], 4, "the disk needs at least", "--disk"),
        (["up", "--accel", "magic"], 2, "magic", "--help"),
        (["frobnicate"], 2, "frobnicate", "--help"),
        (["exec"], 2, "ARGV", "--help"),
    ],
)
def test_refused(vm: Instance, arguments: list[str], code: int, said: str, hint: str) -> None:
    before = vm.status()
    done = vm.agentctl(*arguments, check=False)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    assert vm.status()["qemu_pid"] == before["qemu_pid"]


def test_without_qemu_the_package_is_named_and_nothing_is_left(
    vm: Instance, tmp_path: Path, other_home: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "docker"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    done = vm.agentctl("up", check=False, AGENTCTL_HOME=str(other_home), PATH=str(programs))
    assert done.returncode == 3
    assert b"is missing" in done.stderr
    assert b"apt-get install qemu-system" in done.stderr
    again = vm.agentctl("status", check=False, AGENTCTL_HOME=str(other_home))
    assert again.returncode == 6
    assert b"stopped" in again.stdout


def test_a_home_that_cannot_be_used_is_said(vm: Instance, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = vm.agentctl("up", check=False, AGENTCTL_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 1
    assert b"AGENTCTL_HOME" in done.stderr
    long = vm.agentctl("up", check=False, AGENTCTL_HOME=str(tmp_path / ("x" * 120)))
    assert long.returncode == 2
    assert b"too long" in long.stderr


def test_a_guest_that_panics_is_started_once_more_and_then_given_up(vm: Instance, other_home: Path) -> None:
    """The real kernel with an initrd that is none: it finds no root, and panics."""
    image = vm.home / "images" / vm.status()["image"]
    home = other_home
    broken = home / "images" / image.name
    broken.mkdir(parents=True)
    for name in ("kernel", "root.img", "manifest.json"):
        (broken / name).symlink_to(image / name)
    (broken / "initrd").write_bytes(b"not an initrd")
    done = vm.agentctl("up", "--memory", "512MiB", check=False, AGENTCTL_HOME=str(home))
    assert done.returncode == 7
    said = done.stderr.decode()
    assert "starting it again, try 2 of 2" in said
    assert "error: The VM does not boot: " in said
    assert "panic" in said
    status = vm.agentctl("status", "--json", check=False, AGENTCTL_HOME=str(home))
    assert json.loads(status.stdout)["stage"] == "failed"
    assert json.loads(status.stdout)["restarts"] == 1
    assert Instance(home, vm.docker_config).processes() == []
    assert vm.docker("context", "show") == "agentctl", "the other instance's context is not touched"


def test_a_configuration_that_is_edited_into_nonsense_harms_nothing_that_runs(vm: Instance) -> None:
    """And what is changed well is applied at once, or said to wait; comments and all else stay as they are."""
    path = vm.directory / "config.yaml"
    before, status = path.read_text(), vm.status()
    assert "# Processors of the VM." in before
    try:
        rule, cpus = (
            "ports.rules=[{guest_port: 47100, host_port: 47101, static: true}]",
            status["cpus"] % 2 + 1,
        )
        said = vm.agentctl("config", "set", rule, f"cpus={cpus}").stderr.decode()
        assert "cpus stay as they are until you restart it" in said
        assert listens(47101)
        shown = json.loads(vm.agentctl("config", "show", "--json").stdout)
        assert (shown["config"]["cpus"], shown["waiting_for_restart"]) == (cpus, ["cpus"])
        path.write_text("cpus: two\nmemroy: 4GiB\n")
        for command in (["up"], ["config", "set", "ports.lan=true"], ["config", "validate"]):
            done = vm.agentctl(*command, check=False)
            assert (done.returncode, b'cpus is "two"; it is a whole number' in done.stderr) == (2, True)
        assert b"line 2: memroy is no key; did you mean memory?" in done.stderr
        os.kill(status["agent_pid"], signal.SIGKILL)
        assert vm.guest("echo well") == "well\n"
        assert vm.status()["qemu_pid"] == status["qemu_pid"]
        eventually(lambda: listens(47101))
    finally:
        path.write_text(before)
    vm.agentctl("up")
    eventually(lambda: not listens(47101))
    before = path.read_text()  # `up` may have added the folder that it was called in
    vm.agentctl("config", "set", "ports.lan=true")
    vm.agentctl("config", "set", "ports.lan=")
    assert path.read_text() == before


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
