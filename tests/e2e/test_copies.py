"""A copy that is cut off in the middle goes on where it was, into the VM and out of it."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from tests import copies
from tests.e2e.harness import Instance, eventually

pytestmark = pytest.mark.vm

THERE = "/var/tmp/copies"


def test_into_the_vm_and_called_again(vm: Instance, tmp_path: Path) -> None:
    vm.agentctl("exec", "sh", "-c", f"rm -rf {THERE} && mkdir {THERE}")
    try:
        copies.goes_on_when_it_is_called_again(
            vm, tmp_path, THERE, lambda: int(vm.guest(copies.PART_SIZE % THERE))
        )
        assert vm.guest(f"ls -A {THERE}") == "noise\n"
        digest = hashlib.sha256((tmp_path / "noise").read_bytes()).hexdigest()
        assert vm.guest(f"sha256sum {THERE}/noise").split()[0] == digest
    finally:
        vm.guest(f"rm -rf {THERE}")


def test_out_of_the_vm_by_itself_after_a_killed_host_agent(vm: Instance, tmp_path: Path) -> None:
    vm.agentctl("exec", "sh", "-c", f"rm -rf {THERE} && mkdir {THERE}")

    def kill_the_host_agent() -> None:
        killed = vm.status()["agent_pid"]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: vm.status()["agent_pid"] not in (0, killed) and vm.status()["guest_connected"])

    try:
        vm.agentctl("exec", "sh", "-c", f"head -c {copies.SIZE} /dev/urandom >{THERE}/large")
        copies.goes_on_by_itself(vm, tmp_path, f"{THERE}/large", kill_the_host_agent)
        digest = hashlib.sha256((tmp_path / "large").read_bytes()).hexdigest()
        assert vm.guest(f"sha256sum {THERE}/large").split()[0] == digest
    finally:
        vm.guest(f"rm -rf {THERE}")
