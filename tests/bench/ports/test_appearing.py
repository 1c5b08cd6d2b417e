from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.bench import processes
from tests.bench.ports.appearing import (
    SERVER,
    Clock,
    Cycle,
    Guest,
    all_at_once,
    clock,
    cycle,
    is_open,
    report,
)
from tests.free_ports import free_port


def test_the_shortest_exchange_compares_the_clocks() -> None:
    # The guest's clock shows 90 less; the second answer was held up on the way back.
    exchanges = [(100.0, 10.25, 100.5), (101.0, 11.25, 103.0)]
    assert clock(exchanges) == Clock(90.0, 0.25)


def test_a_port_is_open_while_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert is_open(port)
    assert not is_open(port)


@pytest.fixture
def guest() -> object:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield Guest(process)
    processes.end(process)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def test_what_is_here_appears_at_once(guest: Guest) -> None:
    taken = cycle(guest, free_port())
    assert 0 <= taken.appeared < 5
    assert 0 <= taken.vanished < 5
    ports = [free_port() for _ in range(5)]
    assert all_at_once(guest, ports) < 5
    assert not any(map(is_open, ports))


def test_the_report_names_the_percentiles() -> None:
    cycles = [Cycle(0.010 * n, 0.020, 0.001) for n in range(1, 101)]
    lines = report(cycles, 200, 1.5).splitlines()
    assert lines[0].split() == ["listen", "to", "reachable", "p50", "500.0", "ms", "p99", "990.0", "ms"]
    assert lines[1].split() == ["close", "to", "refused", "p50", "20.0", "ms", "p99", "20.0", "ms"]
    assert "1.50 s" in lines[2]
