"""What runs containers besides Docker: an instance of its own for each, beside the first."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.harness import NO_NETWORK, Instance, eventually, fetch
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

#: The first start builds the image of the VM, seconds.
BUILD_TIME = 1200


@pytest.fixture
def other(vm: Instance) -> Iterator[Instance]:
    instance = replace(vm, name="other")
    instance.directory.mkdir(mode=0o700)
    try:
        yield instance
    finally:
        instance.agentctl("delete", "--data", "--yes")
        vm.agentctl("up")  # has the docker context again


def start(instance: Instance, runtime: str, folder: Path) -> None:
    instance.agentctl("config", "set", f"runtime={runtime}", "cpus=1", "memory=768MiB", "disk=4GiB")
    instance.agentctl("up", "--mount", str(folder), timeout=BUILD_TIME)
    assert instance.status()["stage"] == "running"


def test_podman_answers_the_docker_command_line(other: Instance, project: Path) -> None:
    start(other, "podman", project)
    other.import_busybox("hello", b"podman's\n")
    assert "Podman" in other.docker("version")
    (project / "note").write_text("of the host")
    said = other.docker(
        "run", "--rm", *NO_NETWORK, "-v", f"{project}:/src", "hello", "/bin/busybox", "cat", "/src/note"
    )
    assert said == "of the host"
    port = free_port()
    other.docker("run", "-d", "--name", "web", "-p", f"{port}:80", "hello")
    eventually(lambda: fetch(port, path="/index.html") == b"podman's\n")
    other.docker("stop", "-t", "0", "web")
    eventually(lambda: fetch(port) is None)
    assert other.guest("systemctl --failed --no-legend") == ""


def test_containerd_has_its_socket_here(other: Instance, project: Path) -> None:
    start(other, "containerd", project)
    socket = other.directory / "containerd.sock"
    assert str(socket) in other.agentctl("env").stdout.decode()
    # gRPC is HTTP/2, and curl asks with that from the first byte.
    asked = ["curl", "-sS", "--http2-prior-knowledge", "--unix-socket", str(socket), "http://localhost/"]
    written = ["-o", "/dev/null", "-w", "%{http_version}"]
    done = subprocess.run([*asked, *written], capture_output=True, timeout=60, check=False)
    assert done.stdout == b"2", done.stderr
    port = free_port()
    other.guest(
        f"""
        mkdir -p /var/tmp/web/bin /var/tmp/web/www; cp /usr/bin/busybox /var/tmp/web/bin
        echo of containerd >/var/tmp/web/www/index.html
        ctr run -d --net-host --rootfs /var/tmp/web web /bin/busybox httpd -f -p {port} -h /www
        """
    )
    eventually(lambda: fetch(port) == b"of containerd\n")
    assert other.guest("systemctl is-active docker || true").strip() != "active"
    assert other.guest("systemctl --failed --no-legend") == ""
    other.agentctl("stop")
    assert not socket.exists()
