"""Every TCP listener of the guest is on the host's localhost, for as long as it listens."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.harness import Instance, eventually, is_refused
from tests.free_ports import free_port

pytestmark = pytest.mark.vm

# Listens on the addresses given, says its name to whoever connects, then echoes until the end of file and
# says "bye": so a test sees which listener answered, and that half-close arrives.
SERVER = """
import socket, sys, threading
port, name, *addresses = sys.argv[1:]
def answer(connection):
    with connection:
        connection.sendall(name.encode() + b"\\n")
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.sendall(b"bye")
def serve(listener):
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
for address in addresses:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((address, int(port)))
    listener.listen(64)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
sys.stdin.read()
"""


@contextmanager
def guest_server(vm: Instance, port: int, name: str, *addresses: str) -> Iterator[None]:
    """A server in the guest that lives as long as the block (it ends when its stdin does)."""
    arguments = ["exec", "-u", "root", "python3", "-c", SERVER, str(port), name, *addresses]
    # The block's end closes its stdin, which ends it, and waits for it.
    with vm.popen(*arguments, stdin=subprocess.PIPE):
        yield


def greeting(port: int, host: str = "127.0.0.1") -> str:
    """What the server that answers on this port calls itself; empty if nobody does."""
    try:
        with socket.create_connection((host, port), timeout=20) as connection:
            return connection.makefile().readline().strip()
    except OSError:
        return ""


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_listener_on_any_address_is_on_localhost_v4_and_v6(vm: Instance, address: str) -> None:
    port = free_port()
    with guest_server(vm, port, "it", address):
        assert eventually(lambda: greeting(port)) == "it"
        assert greeting(port, "::1") == "it"
    eventually(lambda: is_refused(port) and is_refused(port, "::1"))


def test_the_port_stays_until_the_last_listener_that_maps_to_it_goes(vm: Instance) -> None:
    port = free_port()
    with guest_server(vm, port, "six", "::1"):
        assert eventually(lambda: greeting(port)) == "six"
        with guest_server(vm, port, "four", "127.0.0.1"):
            # IPv4 is preferred where there are both; the port was open all the time.
            eventually(lambda: greeting(port) == "four")
        assert eventually(lambda: greeting(port)) == "six"
    eventually(lambda: is_refused(port))


def test_half_close_reaches_the_guest_and_what_it_says_last_comes_back(vm: Instance) -> None:
    port = free_port()
    with guest_server(vm, port, "it", "127.0.0.1"):
        eventually(lambda: greeting(port))
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            stream = connection.makefile("rb")
            assert stream.readline() == b"it\n"
            connection.sendall(b"x" * 300_000)
            connection.shutdown(socket.SHUT_WR)
            assert stream.read() == b"x" * 300_000 + b"bye"


def test_a_port_that_was_stolen_between_close_and_listen_is_taken_when_it_is_free(vm: Instance) -> None:
    port = free_port()
    with guest_server(vm, port, "first", "127.0.0.1"):
        assert eventually(lambda: greeting(port)) == "first"
    eventually(lambda: is_refused(port) and is_refused(port, "::1"))
    with socket.create_server(("127.0.0.1", port)) as thief:
        with guest_server(vm, port, "second", "127.0.0.1"):
            eventually(lambda: vm.port_states(port) == {"conflict"})
            (row,) = (row for row in vm.ports() if row["guest_port"] == port)
            assert "in use" in row["reason"]
            assert f"(pid {os.getpid()})" in row["reason"]
            assert is_refused(port, "::1"), "both addresses, or none"
            thief.close()
            assert eventually(lambda: greeting(port)) == "second"
            assert vm.port_states(port) == {"listening"}


def test_a_server_that_is_killed_resets_its_clients(vm: Instance) -> None:
    """Also those that it has not accepted: nobody hangs."""
    port = free_port()
    with guest_server(vm, port, "it", "127.0.0.1"):
        assert eventually(lambda: greeting(port)) == "it"
        pid = vm.guest(f"ss -Hltnp 'sport = :{port}' | grep -o 'pid=[0-9]*' | cut -d= -f2").strip()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as accepted:
            assert accepted.recv(3) == b"it\n"
            vm.guest(f"kill -STOP {pid}")
            accepted.sendall(b"nobody reads this")
            with socket.create_connection(("127.0.0.1", port), timeout=20) as waiting:
                waiting.sendall(b"nor this")
                vm.guest(f"sleep 1; kill -KILL {pid}")
                for client in (accepted, waiting):
                    with pytest.raises(ConnectionResetError):
                        client.recv(1)
        eventually(lambda: is_refused(port))


def test_the_vms_own_daemons_are_ignored_by_default(vm: Instance) -> None:
    own = [row for row in vm.ports() if row["guest_port"] == 22]
    assert own
    assert {row["state"] for row in own} == {"ignored"}
    assert all("SSH" in row["reason"] for row in own)


def test_many_ports_at_once(vm: Instance) -> None:
    ports = sorted({free_port() for _ in range(20)})
    script = (
        "import socket,sys\n"
        "held=[socket.create_server(('127.0.0.1', int(p))) for p in sys.argv[1:]]\n"
        "sys.stdin.read()"
    )
    with vm.popen("exec", "python3", "-c", script, *map(str, ports), stdin=subprocess.PIPE):
        eventually(lambda: not any(is_refused(port) for port in ports))
    eventually(lambda: all(is_refused(port) for port in ports))
