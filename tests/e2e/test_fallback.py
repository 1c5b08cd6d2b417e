"""The control link of a real VM whose virtio-serial port is taken away from under it: over SSH, and back.

The port's device is unplugged, which is all that can be lost of it without the rest of the VM: the guest's is gone, and
to the host QEMU's socket falls silent.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from typing import Any

import pytest

from provision.machine import CONTROL_PORT
from tests.e2e.harness import BOOT_TIME, Instance, eventually, fetch
from tests.e2e.test_bulk_restore import Monitor
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

DEVICES = "/machine/peripheral-anon"


def unplug(vm: Instance) -> None:
    with closing(Monitor(vm.directory / "qmp.sock")) as monitor:
        children = [
            f"{DEVICES}/{child['name']}"
            for child in monitor.ask("qom-list", path=DEVICES)
            if child["type"] == "child<virtserialport>"
        ]
        # One that was plugged in again has a name of its own.
        if any(child["name"] == "replugged" for child in monitor.ask("qom-list", path="/machine/peripheral")):
            children.append("replugged")
        paths = {path if "/" in path else f"/machine/peripheral/{path}" for path in children}
        (port,) = [
            path for path in paths if monitor.ask("qom-get", path=path, property="name") == CONTROL_PORT
        ]
        monitor.ask("device_del", id=port)


def plug(vm: Instance) -> None:
    with closing(Monitor(vm.directory / "qmp.sock")) as monitor:
        device = {
            "driver": "virtserialport",
            "bus": "serial.0",
            "chardev": CONTROL_PORT,
            "name": CONTROL_PORT,
        }
        monitor.ask("device_add", id="replugged", **device)


def forwards_of_qemu(vm: Instance) -> list[str]:
    with closing(Monitor(vm.directory / "qmp.sock")) as monitor:
        said = monitor.ask("human-monitor-command", **{"command-line": "info usernet"})
    return [line for line in said.splitlines() if "HOST_FORWARD" in line]


def control(vm: Instance) -> dict[str, Any]:
    found: dict[str, Any] = vm.status()["control"] or {}
    return found


def goes_over(vm: Instance, transport: str) -> dict[str, Any]:
    eventually(lambda: control(vm).get("transport") == transport, BOOT_TIME, 0.5)
    return control(vm)


def test_the_control_link_goes_over_ssh_and_returns(vm: Instance) -> None:
    port = free_port()
    web = f"systemd-run --collect --unit=fallback-web busybox httpd -f -p {port} -h /etc"
    vm.guest(web)
    name = vm.guest("cat /etc/hostname").encode()
    eventually(lambda: fetch(port, path="/hostname") == name)
    assert goes_over(vm, "virtio-serial")["reason"] == ""
    assert "over virtio-serial" in vm.agentctl("status").stdout.decode()
    assert forwards_of_qemu(vm) == []

    unplug(vm)
    lost = goes_over(vm, "ssh")
    assert lost["reason"]
    assert vm.status()["guest_connected"]
    assert fetch(port, path="/hostname") == name
    assert vm.guest("id -u").strip() == "0"
    assert forwards_of_qemu(vm) == []
    shown = vm.agentctl("status").stdout.decode()
    assert f"the control link goes over SSH: {lost['reason']}" in shown
    findings = json.loads(vm.agentctl("doctor", "--json", check=False).stdout)
    assert "it goes over SSH" in json.dumps(findings)

    # A host agent that is killed takes the connection along, and its successor makes another.
    before = vm.status()["agent_pid"]
    os.kill(before, signal.SIGKILL)
    eventually(lambda: vm.status()["agent_pid"] not in (0, before))
    goes_over(vm, "ssh")
    assert eventually(lambda: fetch(port, path="/hostname")) == name
    assert forwards_of_qemu(vm) == []

    plug(vm)
    assert goes_over(vm, "virtio-serial")["reason"] == ""
    assert eventually(lambda: fetch(port, path="/hostname")) == name
    # The brackets keep the pattern from finding the shell that it is written in.
    eventually(lambda: vm.guest("pgrep -fc '[s]sh_door'", check=False).strip() == "0")
    vm.guest("systemctl stop fallback-web")


def test_a_vm_is_stopped_over_ssh_and_starts_as_ever(vm: Instance) -> None:
    unplug(vm)
    goes_over(vm, "ssh")
    vm.agentctl("stop")
    log = (vm.directory / "agent.log").read_text()
    assert "could not be asked to shut down" not in log
    assert vm.status()["stage"] == "stopped"
    assert vm.processes() == []
    vm.agentctl("up", timeout=1200)
    assert goes_over(vm, "virtio-serial")["reason"] == ""
