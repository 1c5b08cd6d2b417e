"""What a user can say about ports, and UDP: in a real VM, seen from the host."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.e2e.harness import PATIENCE, Instance, eventually, is_refused
from tests.e2e.test_ports import greeting, guest_server
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

# Answers each datagram with its length and its first bytes, on the addresses given.
UDP_SERVER = """
import socket, sys, threading
port, *addresses = sys.argv[1:]
def serve(server):
    while True:
        data, sender = server.recvfrom(65535)
        server.sendto(b"%d " % len(data) + data[:1000], sender)
for address in addresses:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, int(port)))
    threading.Thread(target=serve, args=(server,), daemon=True).start()
sys.stdin.read()
"""

# Listens on and closes one port, over and over, as a line on stdin says; answers when it has.
LISTENER = """
import socket, sys
for line in sys.stdin:
    word, port = line.split()
    if word == "listen":
        listener = socket.create_server(("127.0.0.1", int(port)))
    else:
        listener.close()
    print("done", flush=True)
"""


@contextmanager
def udp_server(vm: Instance, port: int, *addresses: str) -> Iterator[None]:
    arguments = ["exec", "-u", "root", "python3", "-c", UDP_SERVER, str(port), *addresses]
    with vm.popen(*arguments, stdin=subprocess.PIPE):
        yield


def asked(port: int, question: bytes, host: str = "127.0.0.1") -> bytes:
    """What comes back for one datagram; b"" for nothing within a second."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.connect((host, port))
        try:
            client.send(question)
            return client.recv(65535)
        except OSError:
            return b""


@contextmanager
def rule(vm: Instance, *words: str) -> Iterator[None]:
    """A forward that is there for the block."""
    vm.agentctl("forward", "add", *words)
    try:
        yield
    finally:
        vm.agentctl("forward", "rm", words[-1])


def test_datagrams_come_and_go_and_so_does_their_port(vm: Instance) -> None:
    port = free_port()
    with udp_server(vm, port, "0.0.0.0"):
        assert eventually(lambda: asked(port, b"hello")) == b"5 hello"
        assert asked(port, b"again", "::1") == b"5 again"
        large = os.urandom(60_000)
        assert asked(port, large) == b"60000 " + large[:1000]
        # The largest there is; what IPv6 alone can carry, and what nothing can, are lost, and nothing else is.
        assert asked(port, bytes(65_507)) == b"65507 " + bytes(1000)
        assert asked(port, bytes(65_520), "::1") == asked(port, bytes(65_508)) == b""
        assert asked(port, b"after", "::1") == asked(port, b"after") == b"5 after"
        (row,) = [row for row in vm.ports() if row["guest_port"] == port]
        assert (row["proto"], row["state"]) == ("udp", "listening")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:

        def is_free() -> bool:
            try:
                other.bind(("127.0.0.1", port))
            except OSError:
                return False
            return True

        eventually(is_free)


def test_a_container_publishes_udp(vm: Instance, image: str) -> None:
    port = free_port()
    name = vm.docker("run", "-d", "-p", f"{port}:5300/udp", image)
    try:
        # Debian's busybox has no UDP server: the guest's Python is put into the container's network.
        pid = vm.docker("inspect", "-f", "{{.State.Pid}}", name)
        inside = ["nsenter", "-t", pid, "-n", "python3", "-c", UDP_SERVER, "5300", "0.0.0.0"]
        with vm.popen("exec", "-u", "root", *inside, stdin=subprocess.PIPE):
            assert eventually(lambda: asked(port, b"question")) == b"8 question"
    finally:
        vm.docker("rm", "-f", name)


def test_a_rule_moves_a_port(vm: Instance) -> None:
    here, there = free_port(), free_port()
    with guest_server(vm, here, "moved", "127.0.0.1"):
        assert eventually(lambda: greeting(here)) == "moved"
        with rule(vm, f"{there}:{here}"):
            assert eventually(lambda: greeting(there)) == "moved"
            eventually(lambda: is_refused(here))
        assert eventually(lambda: greeting(here)) == "moved"
        eventually(lambda: is_refused(there))


def test_a_rule_keeps_a_port_inside(vm: Instance) -> None:
    port = free_port()
    with guest_server(vm, port, "hidden", "127.0.0.1"):
        assert eventually(lambda: greeting(port)) == "hidden"
        with rule(vm, "--ignore", str(port)):
            eventually(lambda: is_refused(port))
            assert vm.port_states(port) == {"ignored"}
        assert eventually(lambda: greeting(port)) == "hidden"


@pytest.mark.parametrize("words", ["1-10:1-5", "99999", "8080:nonsense", "192.168.0.256:80:80"])
def test_a_rule_that_cannot_be_is_refused_and_changes_nothing(vm: Instance, words: str) -> None:
    before = vm.agentctl("forward", "list", "--json").stdout
    done = vm.agentctl("forward", "add", words, check=False)
    assert done.returncode == 2
    assert words.split(":")[0] in done.stderr.decode() or words in done.stderr.decode()
    assert vm.agentctl("forward", "list", "--json").stdout == before


@contextmanager
def watching(vm: Instance) -> Iterator[queue.Queue[dict[str, Any]]]:
    """What ``ports --watch`` says, as it says it."""
    said: queue.Queue[dict[str, Any]] = queue.Queue()
    with vm.popen("ports", "--watch", "--json", stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        lines = watch.stdout

        def read() -> None:
            for line in lines:
                said.put(json.loads(line))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield said
        finally:
            watch.send_signal(signal.SIGINT)
            reader.join()


def test_watching_tells_of_a_port_once_it_can_be_reached(vm: Instance) -> None:
    port = free_port()
    with watching(vm) as said, ExitStack() as stack:

        def wait_for(state: str) -> None:
            row = said.get(timeout=PATIENCE)
            while (row.get("port"), row.get("state")) != (port, state):
                row = said.get(timeout=PATIENCE)

        stack.enter_context(guest_server(vm, port, "watched", "127.0.0.1"))
        wait_for("listening")
        assert greeting(port) == "watched"
        stack.close()
        wait_for("closed")
        assert is_refused(port)


def test_a_port_is_there_and_gone_again_each_time(vm: Instance, long: bool) -> None:
    """No cycle may be missed, however quickly one follows the other."""
    port, cycles = free_port(), 100 if long else 10
    arguments = ["exec", "-u", "root", "python3", "-c", LISTENER]
    with vm.popen(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        assert listener.stdin is not None
        assert listener.stdout is not None
        for _ in range(cycles):
            for word, reached in (
                ("listen", lambda: not is_refused(port)),
                ("close", lambda: is_refused(port)),
            ):
                listener.stdin.write(b"%s %d\n" % (word.encode(), port))
                listener.stdin.flush()
                assert listener.stdout.readline() == b"done\n"
                eventually(reached, interval=0.005)
        listener.stdin.close()


def test_a_hundred_forwards_survive_the_guest_agent(vm: Instance) -> None:
    first = 20000  # below the ports that connections are given, which may hold a port for a minute
    script = (
        "import signal,socket; "
        f"held=[socket.create_server(('127.0.0.1', {first}+n)) for n in range(100)]; signal.pause()"
    )
    # Of systemd, since what an agent started goes with it.
    vm.guest(f'systemd-run --quiet --collect --unit=hundred python3 -c "{script}"')
    try:

        def reachable() -> int:
            return sum(not is_refused(first + n) for n in range(100))

        eventually(lambda: reachable() == 100)
        sessions = vm.status()["agent_sessions"]
        vm.guest("systemctl kill -s KILL agentctl-agent.service || true", check=False)
        assert reachable() == 100, "listeners stay while the agent comes back"
        eventually(lambda: vm.status()["guest_connected"] and vm.status()["agent_sessions"] > sessions)
        assert reachable() == 100
    finally:
        vm.guest("systemctl stop hundred")
    eventually(lambda: reachable() == 0)
