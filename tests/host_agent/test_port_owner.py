"""Whom a taken port is blamed on."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from host_agent import port_owner
from host_agent.port_owner import PortOwners
from host_agent.rules import EVERYWHERE, LOCALHOST, HostAddress
from protocol.api import Proto

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def at(port: int) -> HostAddress:
    return HostAddress(Proto.TCP, LOCALHOST, port)


class Proc:
    """A /proc of processes that hold sockets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "net").mkdir()
        self.now = 0.0
        self.owners = PortOwners(root, lambda: self.now)

    def table(self, name: str, *rows: tuple[int, str, int, int]) -> None:
        """Port, state, uid, inode."""
        lines = [
            f"   0: 0100007F:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid:5} 0 {inode} 1 0 100\n"
            for port, state, uid, inode in rows
        ]
        (self.root / "net" / name).write_text(HEADER + "".join(lines))

    def process(self, pid: int, command: str, *inodes: int) -> None:
        descriptors = self.root / str(pid) / "fd"
        descriptors.mkdir(parents=True)
        (self.root / str(pid) / "comm").write_text(command + "\n")
        (descriptors / "0").symlink_to("/dev/null")
        for number, inode in enumerate(inodes, 3):
            (descriptors / str(number)).symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_a_process_of_the_same_user_is_named(proc: Proc) -> None:
    proc.table("tcp", (8080, "01", os.geteuid(), 5), (8080, "0A", os.geteuid(), 77))
    proc.table("tcp6", (9090, "0A", os.geteuid(), 78))
    proc.process(10, "sh")
    proc.process(1234, "nginx", 5, 77)
    proc.process(1235, "node", 78)
    assert proc.owners.owner(at(8080)) == "nginx (pid 1234)"
    assert proc.owners.owner(at(9090)) == "node (pid 1235)"
    assert proc.owners.owner(at(1)) == ""


def test_another_instance_of_ours_is_named(proc: Proc) -> None:
    proc.table("tcp", (8080, "0A", os.geteuid(), 77), (8081, "0A", os.geteuid(), 78))
    proc.process(1234, "python3", 77)
    words = [
        "/usr/bin/python3",
        "-m",
        "host_agent.daemon",
        "/home/dev/.agentctl/instances/dev",
        "--lock-fd",
        "3",
    ]
    (proc.root / "1234" / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    proc.process(1235, "python3", 78)
    (proc.root / "1235" / "cmdline").write_bytes(b"python3\0-m\0host_agent.daemon")
    assert proc.owners.owner(at(8080)) == "agentctl's instance dev (pid 1234)"
    assert proc.owners.owner(at(8081)) == "python3 (pid 1235)"


def test_datagrams_have_ports_of_their_own(proc: Proc) -> None:
    proc.table("tcp", (53, "0A", os.geteuid(), 77))
    proc.table("udp", (53, "07", os.geteuid(), 78))
    proc.process(1234, "nginx", 77)
    proc.process(1235, "dnsmasq", 78)
    assert proc.owners.owner(at(53)) == "nginx (pid 1234)"
    assert proc.owners.owner(HostAddress(Proto.UDP, LOCALHOST, 53)) == "dnsmasq (pid 1235)"


def test_of_another_users_process_the_user_is_named(proc: Proc) -> None:
    proc.table(
        "tcp",
        (80, "0A", 0 if os.geteuid() else 1, 77),
        (81, "0A", 4_000_000, 78),
        (82, "0A", os.geteuid(), 79),
    )
    assert proc.owners.owner(at(80)) == f"a process of user {'daemon' if os.geteuid() == 0 else 'root'}"
    assert proc.owners.owner(at(81)) == "a process of user 4000000"
    assert proc.owners.owner(at(82)) == "", "it ended while we looked"


def test_one_look_serves_for_a_second(proc: Proc) -> None:
    proc.table("tcp")
    assert proc.owners.owner(at(80)) == ""
    proc.table("tcp", (80, "0A", 0, 77))
    proc.process(9, "late", 77)
    proc.now = 0.9
    assert proc.owners.owner(at(80)) == ""
    proc.now = 1.0
    assert proc.owners.owner(at(80)) == "late (pid 9)"


def test_a_look_is_bounded(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    proc.table("tcp", (80, "0A", os.geteuid(), 77))
    proc.process(9, "busy", *range(100, 120), 77)
    monkeypatch.setattr(port_owner, "MAX_DESCRIPTORS", 1)
    assert proc.owners.owner(at(80)) == ""
    monkeypatch.setattr(port_owner, "MAX_TABLE", len(HEADER))
    assert proc.owners.owner(at(80)) == "", "of the same look"
    proc.now = 5.0
    assert proc.owners.owner(at(80)) == ""


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert PortOwners(tmp_path / "nowhere").owner(at(80)) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_port_of_our_own_process_is_another_forward() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert PortOwners().owner(at(server.getsockname()[1])) == "another forward of this VM"


@pytest.mark.skipif(sys.byteorder != "little", reason="the table is written as such a machine does")
@pytest.mark.parametrize(
    ("wanted", "owner"),
    [
        (LOCALHOST, "apache (pid 20)"),
        ("127.0.0.1", "apache (pid 20)"),
        ("10.0.0.1", "nginx (pid 10)"),
        (EVERYWHERE, "nginx (pid 10)"),  # both are in the way
        ("10.0.0.2", ""),
        ("::1", ""),
    ],
)
def test_who_listens_at_another_address_is_not_blamed(proc: Proc, wanted: str, owner: str) -> None:
    lines = [
        f"   0: {address}:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {os.geteuid()} 0 {inode} 1\n"
        for address, inode in (("0100000A", 77), ("0100007F", 78))
    ]
    (proc.root / "net" / "tcp").write_text(HEADER + "".join(lines))
    proc.process(10, "nginx", 77)
    proc.process(20, "apache", 78)
    assert proc.owners.owner(HostAddress(Proto.TCP, wanted, 8080)) == owner


@pytest.mark.parametrize("bound", ["0" * 32, "0" * 8])
@pytest.mark.parametrize("wanted", [LOCALHOST, "10.0.0.1", EVERYWHERE])
def test_who_listens_at_all_addresses_is_in_the_way_of_each(proc: Proc, bound: str, wanted: str) -> None:
    line = f"   0: {bound}:1F90 0:0 0A 0:0 00:0 0 {os.geteuid()} 0 77 1\n"
    (proc.root / "net" / ("tcp6" if len(bound) == 32 else "tcp")).write_text(HEADER + line)
    proc.process(10, "nginx", 77)
    assert proc.owners.owner(HostAddress(Proto.TCP, wanted, 8080)) == "nginx (pid 10)"
