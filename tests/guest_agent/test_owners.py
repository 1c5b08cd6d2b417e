"""Who listens: from a /proc and a dockerd that the test has made, and from the real ones."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest_agent import owners
from protocol.api import Owner, Proto

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ANY, LOOPBACK, ANY6, MAPPED = "00000000", "0100007F", "0" * 32, "0" * 16 + "FFFF0000" + "0100007F"
WEB, PROXIED = "ab" * 32, "cd" * 32

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the tables are written as such a machine does"
)


class Guest:
    """Processes with sockets, and a Docker that publishes."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups, self.docker = root / "proc", root / "cgroup", root / "docker.sock"
        self.process(1, "systemd", "/init.scope")
        self.proc.joinpath("self").symlink_to("1")

    def table(self, name: str, *rows: tuple[str, int, str, int], pid: int = 1) -> None:
        """Address, port, state, inode."""
        net = self.proc / str(pid) / "net"
        net.mkdir(exist_ok=True)
        lines = [
            f"   0: {address}:{port:04X} 00000000:0000 {state} 0:0 00:0 0 0 0 {inode} 1 0 100\n"
            for address, port, state, inode in rows
        ]
        (net / name).write_text(HEADER + "".join(lines))

    def process(self, pid: int, command: str, cgroup: str, *inodes: int) -> None:
        descriptors = self.proc / str(pid) / "fd"
        descriptors.mkdir(parents=True)
        (self.proc / str(pid) / "comm").write_text(command + "\n")
        (self.proc / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")
        (descriptors / "0").symlink_to("/dev/null")
        for number, inode in enumerate(inodes, 3):
            (descriptors / str(number)).symlink_to(f"socket:[{inode}]")
        processes = self.cgroups / cgroup.strip("/") / "cgroup.procs"
        processes.parent.mkdir(parents=True, exist_ok=True)
        with processes.open("a") as file:
            file.write(f"{pid}\n")

    def find(self, *, root: bool = True) -> list[Owner]:
        return owners.find(self.proc, self.docker, self.cgroups, root=root)

    def hide(self, pid: int) -> None:
        """Its descriptors, as the kernel does from who is neither its user nor root."""
        shutil.rmtree(self.proc / str(pid) / "fd")

    @contextmanager
    def dockerd(self, answer: bytes) -> Iterator[list[bytes]]:
        """One that answers the first question with ``answer``."""
        asked: list[bytes] = []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(self.docker))
            listener.listen()

            def serve() -> None:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    asked.append(client.recv(4096))
                    client.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            yield asked
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
        self.docker.unlink()


def listed(*containers: dict[str, Any]) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + json.dumps(containers).encode()


def published(address: str, public: int, private: int, kind: str = "tcp") -> dict[str, Any]:
    return {"IP": address, "PublicPort": public, "PrivatePort": private, "Type": kind}


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_a_process_is_named_by_who_serves_and_not_by_who_handed_it_the_socket(guest: Guest) -> None:
    guest.process(1001, "nginx", "/system.slice/nginx.service", 70)
    guest.process(1002, "worker", "/system.slice/nginx.service", 70)
    guest.process(400, "python3", "/user.slice/session-1.scope", 71, 72, 73)
    (guest.proc / "1" / "fd" / "9").symlink_to("socket:[70]")
    guest.table("tcp", (ANY, 80, "0A", 70), (LOOPBACK, 9, "01", 71), (LOOPBACK, 99, "0A", 404))
    guest.table("tcp6", (MAPPED, 8000, "0A", 72))
    guest.table("udp", (LOOPBACK, 53, "07", 73))
    assert guest.find() == [
        Owner(Proto.UDP, "127.0.0.1", 53, "python3"),
        Owner(Proto.TCP, "0.0.0.0", 80, "nginx"),
        Owner(Proto.TCP, "127.0.0.1", 8000, "python3"),
    ]


def test_dockerd_is_not_woken_where_nothing_is_dockers(guest: Guest) -> None:
    guest.process(400, "python3", "/user.slice/session-1.scope", 71)
    guest.table("tcp", (ANY, 80, "0A", 71))
    with guest.dockerd(listed()) as asked:
        assert guest.find() == [Owner(Proto.TCP, "0.0.0.0", 80, "python3")]
    assert asked == []


def test_a_published_port_is_the_process_in_the_container(guest: Guest) -> None:
    guest.process(500, "docker-proxy", "/system.slice/docker.service", 80)
    guest.process(501, "docker-proxy", "/system.slice/docker.service", 81)
    guest.process(502, "docker-proxy", "/system.slice/docker.service", 82)
    guest.process(600, "nginx", f"/system.slice/docker-{PROXIED}.scope", 5, 6)
    guest.table("tcp", (ANY, 8080, "0A", 80))
    guest.table("tcp6", (ANY6, 8080, "0A", 81))
    guest.table("udp", (ANY, 5353, "07", 82))
    guest.table("tcp", (ANY, 80, "0A", 5), pid=600)
    guest.table("udp", (ANY, 53, "07", 6), pid=600)
    ports = [published("0.0.0.0", 8080, 80), published("::", 8080, 80), published("0.0.0.0", 5353, 53, "udp")]
    with guest.dockerd(
        listed({"Id": PROXIED, "Names": ["/web"], "Ports": [*ports, {"PrivatePort": 9, "Type": "tcp"}]})
    ):
        assert guest.find() == [
            Owner(Proto.UDP, "0.0.0.0", 5353, "nginx", "web"),
            Owner(Proto.TCP, "0.0.0.0", 8080, "nginx", "web"),
            Owner(Proto.TCP, "::", 8080, "nginx", "web"),
        ]


def test_an_ordinary_user_sees_their_own_and_what_docker_publishes(guest: Guest) -> None:
    guest.process(300, "dockerd", "/system.slice/docker.service")
    guest.process(500, "docker-proxy", "/system.slice/docker.service", 80)
    guest.process(600, "nginx", f"/system.slice/docker-{PROXIED}.scope", 5)
    guest.process(700, "sshd", "/system.slice/ssh.service", 81)
    guest.process(800, "python3", "/user.slice/session-1.scope", 82)
    for pid in (1, 300, 500, 600, 700):
        guest.hide(pid)
    guest.table("tcp", (ANY, 8080, "0A", 80), (ANY, 22, "0A", 81), (LOOPBACK, 8000, "0A", 82))
    own = Owner(Proto.TCP, "127.0.0.1", 8000, "python3")
    container = {"Id": PROXIED, "Names": ["/web"], "Ports": [published("0.0.0.0", 8080, 80)]}
    with guest.dockerd(listed(container)):
        assert guest.find(root=False) == [own, Owner(Proto.TCP, "0.0.0.0", 8080, "", "web")]
    assert guest.find(root=False) == [own]  # nobody answers, or not this user


def test_dockerd_is_not_woken_by_an_ordinary_user(guest: Guest) -> None:
    guest.table("tcp", (ANY, 80, "0A", 71))
    with guest.dockerd(listed()) as asked:
        assert guest.find(root=False) == []
    assert asked == []


def test_a_container_with_the_guests_network_is_named_by_its_cgroup(guest: Guest) -> None:
    guest.process(600, "httpd", f"/system.slice/docker-{WEB}.scope", 7)
    guest.table("tcp", (ANY, 80, "0A", 7))
    with guest.dockerd(listed({"Id": WEB, "Names": ["/web"], "Ports": []})):
        assert guest.find() == [Owner(Proto.TCP, "0.0.0.0", 80, "httpd", "web")]
    # It has just ended, or dockerd does not answer: its number is known at least.
    assert guest.find() == [Owner(Proto.TCP, "0.0.0.0", 80, "httpd", WEB[:12])]


def test_what_nobody_listens_at_in_the_container_is_the_containers_all_the_same(guest: Guest) -> None:
    guest.process(500, "docker-proxy", "/system.slice/docker.service", 80)
    guest.table("tcp", (ANY, 8080, "0A", 80))
    with guest.dockerd(listed({"Id": WEB, "Names": None, "Ports": [published("0.0.0.0", 8080, 80)]})):
        assert guest.find() == [Owner(Proto.TCP, "0.0.0.0", 8080, "", WEB[:12])]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.0 500 Internal Server Error\r\n\r\n[]",
        b"HTTP/1.0 200 OK\r\n\r\nnot json",
        b"HTTP/1.0 200 OK\r\n\r\n[null, 5]",
        b'HTTP/1.0 200 OK\r\n\r\n[{"Names": []}]',
        b'HTTP/1.0 200 OK\r\n\r\n{"message": "no"}',
    ],
)
def test_a_dockerd_that_makes_no_sense_costs_the_names_only(guest: Guest, answer: bytes) -> None:
    guest.process(500, "docker-proxy", "/system.slice/docker.service", 80)
    guest.table("tcp", (ANY, 8080, "0A", 80))
    with guest.dockerd(answer):
        assert guest.find() == [Owner(Proto.TCP, "0.0.0.0", 8080, "docker-proxy")]


def test_a_look_is_bounded(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.process(400, "python3", "/user.slice/session-1.scope", *range(100, 120))
    guest.table("tcp", *((ANY, 1000 + n, "0A", 119 - n) for n in range(20)))
    monkeypatch.setattr(owners, "MAX_OWNERS", 3)
    assert [owner.port for owner in guest.find()] == [1000, 1001, 1002]
    monkeypatch.setattr(owners, "MAX_DESCRIPTORS", 0)
    assert guest.find() == []


def test_of_this_machine() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        (owner,) = [each for each in owners.find() if each.port == port]
    assert owner.process == Path("/proc/self/comm").read_text().strip()
    assert (owner.proto, owner.address) == (Proto.TCP, "127.0.0.1")
