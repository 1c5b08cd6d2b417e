"""The main job: the host's own docker CLI runs containers in the VM, and their ports are on localhost."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.harness import Instance, eventually, fetch, is_refused
from tests.free_ports import free_port

pytestmark = pytest.mark.vm


def test_a_published_port_answers_on_localhost_and_goes_with_its_container(vm: Instance, image: str) -> None:
    port = free_port()
    container = vm.docker("run", "-d", "-p", f"{port}:80", image)
    try:
        assert eventually(lambda: fetch(port)) == b"hello\n"
        assert fetch(port, "::1") == b"hello\n"
        assert "listening" in vm.port_states(port)
    finally:
        vm.docker("rm", "-f", container)
    eventually(lambda: is_refused(port) and is_refused(port, "::1"))
    assert vm.port_states(port) == set()


def test_the_context_is_ours_and_active(vm: Instance) -> None:
    assert vm.docker("context", "show") == "agentctl"
    assert vm.docker("info", "--format", "{{.Name}}") == "agentctl"
    assert vm.docker("context", "inspect", "agentctl", "--format", "{{.Endpoints.docker.Host}}") == (
        f"unix://{vm.directory}/docker.sock"
    )


def test_env_leads_to_the_same_docker_without_the_context(vm: Instance) -> None:
    exports = vm.agentctl("env").stdout.decode()
    done = subprocess.run(
        ["sh", "-c", f"{exports}\ndocker info --format '{{{{.Name}}}}'"],
        env={**vm.environment, "DOCKER_CONFIG": str(vm.docker_config / "empty")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "agentctl"


def test_build_from_a_context_on_the_host(vm: Instance, image: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("built\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {image}\nCOPY page.html /www/index.html\nRUN /bin/busybox true\n"
    )
    vm.docker("build", "-q", "-t", "built", str(tmp_path))
    assert vm.docker("run", "--rm", "built", "/bin/busybox", "cat", "/www/index.html") == "built"


def test_compose_up_and_down(vm: Instance, image: str, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "compose.yaml").write_text(
        f"services:\n  web:\n    image: {image}\n    ports: ['{port}:80']\n    init: true\n"
    )
    compose = ["compose", "-p", "e2e", "-f", str(tmp_path / "compose.yaml")]
    vm.docker(*compose, "up", "-d")
    try:
        assert eventually(lambda: fetch(port)) == b"hello\n"
    finally:
        vm.docker(*compose, "down")
    eventually(lambda: is_refused(port))


def test_bytes_survive_the_way_through_the_socket_and_the_port(vm: Instance, image: str) -> None:
    """8 MB of noise into a container over the Docker socket, and back out over its forwarded port."""
    noise = os.urandom(8 << 20)
    port = free_port()
    container = vm.docker("run", "-d", "-p", f"{port}:80", image)
    try:
        vm.docker("exec", "-i", container, "/bin/sh", "-c", "/bin/busybox cat >/www/noise", input=noise)
        eventually(lambda: fetch(port))
        assert fetch(port, path="/noise") == noise
    finally:
        vm.docker("rm", "-f", container)


def test_only_localhost_is_bound(vm: Instance, image: str) -> None:
    """Nothing is exposed to the network unless a rule says so."""
    port = free_port()
    container = vm.docker("run", "-d", "-p", f"0.0.0.0:{port}:80", image)
    try:
        eventually(lambda: fetch(port))
        listening = subprocess.run(["ss", "-lntH"], capture_output=True, text=True, check=True).stdout
        bound = {fields[3] for line in listening.splitlines() if (fields := line.split())}
        assert {address for address in bound if address.endswith(f":{port}")} == {
            f"127.0.0.1:{port}",
            f"[::1]:{port}",
        }
    finally:
        vm.docker("rm", "-f", container)


def test_the_vm_is_as_large_as_was_asked_for(vm: Instance) -> None:
    info = json.loads(vm.docker("info", "--format", "{{json .}}"))
    assert info["NCPU"] == 2
    assert 1.8 * 2**30 < info["MemTotal"] <= 2 * 2**30
    size = int(vm.guest("df -B1 --output=size /var/lib/docker | tail -1"))
    assert 18 * 2**30 < size <= 20 * 2**30


def test_status_tells_people_and_programs(vm: Instance) -> None:
    status = vm.status()
    assert status["stage"] == "running"
    assert status["guest_connected"] is True
    assert status["guest_digest"] == status["host_digest"]
    assert status["guest"]["port_detection"] == "tracefs"
    text = vm.agentctl("status").stdout.decode()
    assert re.search(r"default\s+running", text)
    assert "docker.sock" in text
