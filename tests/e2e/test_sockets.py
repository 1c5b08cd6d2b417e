"""Sockets that appear on the other side, and container addresses through the SOCKS proxy."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.harness import Instance, eventually
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

# Says what it hears from the socket of its argument; "refused" and the like if there is nobody.
CLIENT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    try:
        client.connect(sys.argv[1])
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        while data := client.recv(4096):
            sys.stdout.write(data.decode())
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, for sockets."""
    with tempfile.TemporaryDirectory(prefix="ac-") as directory:
        yield Path(directory)


@contextmanager
def host_program(listener: socket.socket) -> Iterator[None]:
    """Answers each client with what it said, in capitals."""

    def answer() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.sendall(client.makefile("rb").read().upper())

    with listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def asked(vm: Instance, path: str, user: str = "") -> str:
    done = vm.agentctl("exec", "-u", user, "python3", "-c", CLIENT, path)
    return done.stdout.decode().strip()


def states(vm: Instance) -> dict[str, str]:
    """Of each forwarded socket, by the guest's path."""
    rows = json.loads(vm.agentctl("forward", "list", "--json").stdout)
    rows = rows["sockets"] if isinstance(rows, dict) else rows
    return {row["guest"]: row["state"] for row in rows}


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["curl", "-sS", "--max-time", "60", "--noproxy", "", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def test_a_container_is_reached_by_its_own_address(vm: Instance, image: str) -> None:
    port = free_port()
    container = vm.docker("run", "-d", "--hostname", "tunnelled", image)
    address = vm.docker(
        "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container
    )
    with vm.popen("tunnel", "--port", str(port), stderr=subprocess.PIPE) as tunnel:
        assert tunnel.stderr is not None
        assert b"SOCKS5" in tunnel.stderr.readline()
        proxy = ["--socks5-hostname", f"localhost:{port}"]
        assert curl(*proxy, f"http://{address}/").stdout == "hello\n"
        # A name that only the guest knows, and a port where nobody listens.
        vm.guest(f"echo {address} only.in.the.guest >> /etc/hosts")
        assert curl(*proxy, "http://only.in.the.guest/").stdout == "hello\n"
        refused = curl(*proxy, f"http://{address}:81/")
        assert refused.returncode == 97, refused  # CURLE_PROXY
        tunnel.send_signal(signal.SIGINT)
        assert tunnel.wait(20) == 0
    vm.docker("rm", "-f", container)


def test_a_socket_of_the_guest_is_on_the_host(vm: Instance, folder: Path) -> None:
    word = f"{folder}/docker.sock:/run/docker.sock"
    vm.agentctl("forward", "add", word)
    assert states(vm) == {"/run/docker.sock": "listening"}
    assert curl("--unix-socket", f"{folder}/docker.sock", "http://docker/_ping").stdout == "OK"
    vm.agentctl("forward", "rm", word)
    assert list(folder.iterdir()) == []
    assert states(vm) == {}


def test_a_socket_and_a_port_of_the_host_are_in_the_guest(vm: Instance, folder: Path) -> None:
    agent = socket.socket(socket.AF_UNIX)
    agent.bind(str(folder / "agent"))
    agent.listen()
    database = socket.create_server(("127.0.0.1", 0))
    words = [f"{folder}/agent:/run/forwarded/agent", f"{database.getsockname()[1]}:/run/forwarded/db"]
    with host_program(agent), host_program(database):
        vm.agentctl("forward", "add", "--reverse", *words)
        assert set(states(vm).values()) == {"listening"}
        assert asked(vm, "/run/forwarded/agent") == "QUESTION"
        assert asked(vm, "/run/forwarded/db") == "QUESTION"
        assert asked(vm, "/run/forwarded/agent", "nobody") == "PermissionError"
        # The guest's agent is killed: its successor finds a stale socket and the same list.
        vm.guest("systemctl kill -s KILL agentctl-agent.service", check=False)
        eventually(lambda: vm.status()["guest_connected"] and set(states(vm).values()) == {"listening"})
        assert eventually(lambda: asked(vm, "/run/forwarded/agent") == "QUESTION")
        vm.agentctl("forward", "rm", "--reverse", *words)
        assert states(vm) == {}
        assert vm.guest("ls /run/forwarded") == ""
