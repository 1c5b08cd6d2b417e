from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from guest_agent.listeners import Protos, Snapshot
from guest_agent.sockdiag import Row, open_dumper, parse_message, parse_row, still_serving
from protocol.api import Listener, Proto
from tests.descriptors import open_descriptors

# A listener on 127.0.0.1:52357 as Linux 6.18 tells it (without the netlink header): inet_diag_msg, then
# the attributes SHUTDOWN, MARK, CGROUP_ID (0x1_0000_0002) and SOCKOPT.
IPV4 = bytes.fromhex(
    "020a0000 cc850000 7f000001 000000000000000000000000 00000000000000000000000000000000"
    "00000000 f601000000000000 00000000 00000000 80000000 00000000 b63c0000"
    "0500080000000000 08000f0000000000 0c0015000200000001000000 0600160052000000".replace(" ", "")
)
Scenario = Callable[[str], dict[str, Any]]

HEADER = struct.Struct("=IHHII")


def with_source(family: int, source: bytes) -> bytes:
    return bytes([family]) + IPV4[1:8] + source + IPV4[24:]


def test_a_row_has_address_port_state_and_cgroup() -> None:
    assert parse_row(IPV4) == Row(state=10, address="127.0.0.1", port=52357, cgroup=0x1_0000_0002)


@pytest.mark.parametrize(
    ("address", "told"),
    [("::", "::"), ("::1", "::1"), ("fe80::1", "fe80::1"), ("::ffff:10.1.2.3", "10.1.2.3")],
)
def test_ipv6_and_what_is_really_ipv4(address: str, told: str) -> None:
    row = parse_row(with_source(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address)))
    assert row.address == told


@pytest.mark.parametrize(
    "attributes", ["", "0000", "00000000" * 4, "ffff1500", "0c001500", "08001500aaaaaaaa"]
)
def test_attributes_that_lie_give_no_cgroup_and_no_hang(attributes: str) -> None:
    assert parse_row(IPV4[:72] + bytes.fromhex(attributes)).cgroup == 0


def test_a_refusal_is_an_error_and_not_a_row() -> None:
    refusal = HEADER.pack(36, 2, 0, 7, 0) + struct.pack("=i", -1) + bytes(16)
    parsed = parse_message(refusal, 0, len(refusal))
    assert isinstance(parsed["header"]["error"], PermissionError)
    assert parsed["row"] is None


def test_the_end_of_a_dump_is_neither() -> None:
    done = HEADER.pack(20, 3, 2, 7, 0) + bytes(4)
    parsed = parse_message(b"xx" + done, 2, len(done))
    assert (parsed["header"]["type"], parsed["header"]["error"], parsed["row"]) == (3, None, None)


def test_real_sockets_v4_and_v6_and_only_listening_ones(
    in_namespace: Scenario,
) -> None:
    result = in_namespace("dump")
    assert (result["nothing"], result["after"]) == (0, 0)
    assert result["both"] == result["expected"]


def test_of_udp_only_what_a_program_bound_to_a_port_it_chose(in_namespace: Scenario) -> None:
    result = in_namespace("udp_dump")
    assert result["found"] == [["127.0.0.1", 51820], ["::1", 5353]]
    assert result["of_tcp"] == []
    assert result["after"] == []


def test_a_dump_of_many_parts(in_namespace: Scenario) -> None:
    assert in_namespace("many")["same"]


def test_a_mapped_address_is_told_as_what_it_reaches(in_namespace: Scenario) -> None:
    assert in_namespace("mapped")["addresses"] == ["127.0.0.1"]


def test_pyroute2_is_imported_late_lean_and_whole_afterwards() -> None:
    program = (
        "import sys, guest_agent.sockdiag as s\n"
        "assert 'pyroute2' not in sys.modules and 'asyncio' not in sys.modules\n"
        "s._import_diag()\n"
        "assert 'sqlite3' not in sys.modules and 'pyroute2.ndb' not in sys.modules\n"
        "from pyroute2 import IPRoute\n"
        "IPRoute().close()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_udp_server_stays_while_a_connected_socket_has_its_port() -> None:
    def server(address: str, port: int) -> Listener:
        return Listener(Proto.UDP, address, port, "a.service")

    rows = [Row(1, "127.0.0.1", 1, 0), Row(1, "::1", 2, 0), Row(7, "127.0.0.1", 3, 0)]
    stay = {server("0.0.0.0", 1), server("127.0.0.1", 1), server("::", 1), server("::1", 2)}
    go = {server("10.0.0.1", 1), server("127.0.0.1", 2), server("0.0.0.0", 3), server("127.0.0.1", 4)}
    assert still_serving(frozenset(stay | go), rows) == stay
    assert still_serving(frozenset(), rows) == frozenset()


class ScriptedTable:
    """Answers from a list; an exception in it is raised."""

    def __init__(self, answers: list[Snapshot | Exception]) -> None:
        self.answers = answers
        self.threads: set[int] = set()
        self.closed = 0

    def listeners(self, protos: Protos) -> Snapshot:
        self.threads.add(threading.get_ident())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed += 1


async def test_all_dumps_are_made_in_one_thread_and_a_failed_socket_is_replaced() -> None:
    picture = frozenset([Listener(Proto.TCP, "::", 80)])
    table = ScriptedTable([picture, OSError("netlink is full"), picture])
    made: list[ScriptedTable] = []

    def make() -> Any:
        made.append(table)
        return table

    async with open_dumper(make) as dumper:
        assert await dumper.listeners() == picture
        with pytest.raises(OSError, match="netlink is full"):
            await dumper.listeners()
        assert (len(made), table.closed) == (1, 1)
        assert await dumper.listeners() == picture
        assert (len(made), dumper.dumps) == (2, 2)
    assert table.closed == 2
    assert len(table.threads) == 1


async def test_a_cancelled_dump_neither_blocks_nor_leaks_into_the_next() -> None:
    release = threading.Event()
    first, second = frozenset([Listener(Proto.TCP, "::", 1)]), frozenset([Listener(Proto.TCP, "::", 2)])

    class SlowTable(ScriptedTable):
        def listeners(self, protos: Protos) -> Snapshot:
            release.wait(10)
            return super().listeners(protos)

    table: Any = SlowTable([first, second])
    async with open_dumper(lambda: table) as dumper:
        with trio.move_on_after(0.01) as scope:
            await dumper.listeners()
        assert scope.cancelled_caught
        release.set()
        assert await dumper.listeners() == second


async def test_the_socket_and_the_thread_are_gone_afterwards() -> None:
    for _ in range(3):
        async with open_dumper() as dumper:
            await dumper.listeners()
    before = len(open_descriptors())
    for _ in range(5):
        async with open_dumper() as dumper:
            await dumper.listeners()
    assert len(open_descriptors()) <= before
