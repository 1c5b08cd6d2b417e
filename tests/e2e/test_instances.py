"""Files across, SSH, and another instance beside the first."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Instance, eventually, fetch
from tests.free_ports import free_port

pytestmark = pytest.mark.vm


def test_files_are_copied_both_ways(vm: Instance, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "many").mkdir(parents=True)
    for number in range(100):
        (source / "many" / str(number)).write_text(f"{number}\n")
    (source / "big").write_bytes(os.urandom(2_000_000))
    (source / "program").write_text("#!/bin/sh\necho runs\n")
    (source / "program").chmod(0o755)
    (source / "link").symlink_to("program")
    os.utime(source / "program", (1, 1_000_000_000))
    vm.agentctl("cp", str(source), "guest:copied")
    assert vm.guest('cd "$HOME"/copied; ./link; ls many | wc -l; stat -c %Y program', user="").split() == [
        "runs",
        "100",
        "1000000000",
    ]
    vm.agentctl("cp", "guest:copied/.", "guest:copied/many", str(tmp_path))
    assert (tmp_path / "big").read_bytes() == (source / "big").read_bytes()
    assert os.readlink(tmp_path / "link") == "program"
    assert (tmp_path / "program").stat().st_mtime == 1_000_000_000
    assert (tmp_path / "many" / "99").read_text() == "99\n"

    # What is root's needs root; what fails is said, and the rest is done.
    refused = vm.agentctl("cp", str(source / "big"), "guest:/etc/", check=False)
    assert refused.returncode == 1
    assert b"error: guest:/etc/big: Permission denied\n" in refused.stderr
    vm.agentctl("cp", "-u", "root", str(source / "program"), "guest:/etc/")
    assert vm.guest("stat -c %U:%a /etc/program; rm /etc/program") == "root:755\n"
    partly = vm.agentctl("cp", "guest:/etc/hostname", "guest:/nowhere", str(tmp_path), check=False)
    assert (partly.returncode, partly.stdout) == (1, b"")
    assert partly.stderr == b"error: guest:/nowhere: No such file or directory\n"
    assert (tmp_path / "hostname").exists()


def test_ssh_and_what_is_built_on_it(vm: Instance, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes(vm.agentctl("ssh-config").stdout)
    ssh: dict[str, Any] = {"capture_output": True, "timeout": 60, "check": False, "env": vm.environment}
    done = subprocess.run(
        ["ssh", "-F", str(config), "agentctl", "hostname; id -u; cat; exit 3"], input=b"said", **ssh
    )
    assert (done.returncode, done.stdout) == (3, f"agentctl\n{os.geteuid()}\nsaid".encode()), done.stderr
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(1_000_000))
    done = subprocess.run(["scp", "-q", "-F", str(config), str(noise), "agentctl:noise"], **ssh)
    assert done.returncode == 0, done.stderr
    vm.agentctl("cp", "guest:noise", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == noise.read_bytes()


def test_two_instances_at_once(vm: Instance, image: str) -> None:
    other = replace(vm, name="other")
    try:
        other.agentctl("up", "--cpus", "1", "--memory", "768MiB", "--disk", "4GiB", "--mount", "none")
        listed = {row["name"]: row for row in json.loads(vm.agentctl("list", "--json").stdout)}
        assert {name: row["stage"] for name, row in listed.items()} == {
            "default": "running",
            "other": "running",
        }
        assert listed["other"]["memory"] == 768 << 20
        assert [row["qemu_pid"] for row in listed.values()] == [
            vm.status()["qemu_pid"],
            other.status()["qemu_pid"],
        ]
        assert vm.docker("context", "show") == "agentctl-other"
        assert vm.docker("ps", "-aq") == "", "the other's Docker"
        assert other.guest("hostname") == "agentctl-other\n"
        assert json.loads(other.agentctl("mounts", "--json").stdout) == []

        # The same port in both: one has it, the other is told who, and takes it when it is free.
        port = free_port()
        first = ("--context", "agentctl", "run", "-d", "-p", f"{port}:80", image)
        container = vm.docker(*first)
        eventually(lambda: fetch(port))
        script = f"cd /etc; nohup busybox httpd -p {port} >/dev/null 2>&1 &"
        other.guest(script)
        eventually(lambda: other.port_states(port) == {"conflict"})
        reasons = {row["reason"] for row in other.ports() if row["guest_port"] == port}
        assert all("in use on the host by agentctl's instance default (pid " in reason for reason in reasons)
        vm.docker("--context", "agentctl", "rm", "-f", container)
        eventually(lambda: other.port_states(port) == {"listening"})
        assert fetch(port, path="/hostname") == b"agentctl-other\n"

        # It ends by itself, and the first goes on.
        other.agentctl("stop")
        assert other.status()["stage"] == "stopped"
        assert vm.status()["stage"] == "running"
        assert vm.docker("context", "show") == "agentctl"
    finally:
        other.agentctl("delete", "--data", "--yes")
    assert other.processes() == []
    assert not other.directory.exists()
    assert set(vm.docker("context", "ls", "--format", "{{.Name}}").split()) == {"agentctl", "default"}
    assert [row["name"] for row in json.loads(vm.agentctl("list", "--json").stdout)] == ["default"]
