"""What the guest uses: from a /proc and control groups that the test has made, and from the real ones."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from guest_agent import usage
from guest_agent.usage import Look, UsageService
from protocol.api import ContainerUsage, GetGuestUsage

TICKS = os.sysconf("SC_CLK_TCK")
WEB, OTHER, POD = "ab" * 32, "cd" * 32, "ef" * 32

STAT = f"""cpu  {3 * TICKS} {TICKS} {2 * TICKS} {900 * TICKS} {4 * TICKS} {TICKS} {TICKS} {5 * TICKS} 0 0
cpu0 1 1 1 1 1 1 1 1 0 0
intr 12345
"""
MEMINFO = "MemTotal: 2048 kB\nMemAvailable: 1024 kB\nBuffers: 1 kB\nCached: 2 kB\nSReclaimable: 4 kB\nHugePages: 0\n"
ROUTE = (
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n"
    "docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\n"
    "eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\n"
)
DEV = (
    "Inter-|   Receive                      |  Transmit\n face |bytes    packets\n"
    "    lo: 7 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n  eth0:1000 9 0 0 0 0 0 0 500 8 0 0 0 0 0 0\n"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    net = tmp_path / "proc" / "net"
    net.mkdir(parents=True)
    for name, text in (("stat", STAT), ("loadavg", "0.50 0.25 0.10 2/345 6789\n"), ("meminfo", MEMINFO)):
        (tmp_path / "proc" / name).write_text(text)
    (net / "route").write_text(ROUTE)
    (net / "dev").write_text(DEV)
    return tmp_path


def group(cgroups: Path, name: str, cpu: int, memory: int, processes: int | None) -> None:
    folder = cgroups / name
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text(f"usage_usec {cpu}\nuser_usec 1\n")
    (folder / "memory.current").write_text(f"{memory}\n")
    if processes is not None:
        (folder / "pids.current").write_text(f"{processes}\n")


class Docker:
    """Says which containers run, and how often it was asked."""

    def __init__(self, path: Path) -> None:
        self.names: dict[str, str] = {}
        self.asked = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                self.asked += 1
                listed = [{"Id": each, "Names": [f"/{name}"]} for each, name in self.names.items()]
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(listed).encode())

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@contextmanager
def docker(folder: Path) -> Iterator[Docker]:
    with closing(Docker(folder / "docker.sock")) as serving:
        yield serving


def test_what_proc_says(root: Path) -> None:
    seen = Look(root, root / "cgroup", root / "no.sock", lambda: 42.0).usage()
    assert seen.time == 42.0
    assert (seen.cpu_busy, seen.cpu_waiting, seen.cpu_stolen) == (8.0, 4.0, 5.0)
    assert (seen.load, seen.processes) == ([0.5, 0.25, 0.1], 345)
    assert (seen.memory_total, seen.memory_available, seen.memory_cache) == (2048 << 10, 1024 << 10, 7 << 10)
    assert (seen.network_received, seen.network_sent) == (1000, 500)
    assert (seen.data_total, seen.data_free, seen.data_read, seen.data_written) == (0, 0, 0, 0)
    assert seen.cpus == len(os.sched_getaffinity(0))
    assert seen.containers == []


def test_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    seen = Look(tmp_path, tmp_path, tmp_path / "no.sock", lambda: 0.0).usage()
    assert (seen.cpu_busy, seen.load, seen.memory_total, seen.network_sent) == (0.0, [0.0] * 3, 0, 0)


def test_the_disk_is_found_by_its_number() -> None:
    rows = (
        " 254       0 vda 1 2 3 4 5 6 7 8 9 10 11\n"
        " 254      16 vdb 10 0 100 0 20 0 200 0 0 0 0 0 0 0 0\n 254 17 vdb1 1 1 1 1 1 1 1 1\n"
    )
    assert usage.disk_bytes(rows, os.makedev(254, 16)) == (100 * 512, 200 * 512)
    assert usage.disk_bytes(rows, os.makedev(8, 0)) == (0, 0)
    assert usage.disk_bytes("", os.makedev(254, 16)) == (0, 0)


def test_a_guest_without_a_route_has_no_network() -> None:
    assert usage.default_interface(ROUTE.splitlines()[0]) == ""
    assert usage.interface_bytes(DEV, "") == (0, 0)
    assert usage.interface_bytes(DEV, "eth1") == (0, 0)


def test_containers_are_those_with_a_control_group(root: Path) -> None:
    cgroups = root / "cgroup"
    group(cgroups, f"system.slice/docker-{WEB}.scope", 1_500_000, 10 << 20, 3)
    group(cgroups, f"docker/{OTHER}", 500_000, 20 << 20, None)
    group(cgroups, f"machine.slice/libpod-{POD}.scope", 0, 1 << 20, 1)
    for name in (
        f"machine.slice/libpod-conmon-{POD}.scope",
        "system.slice/docker.service",
        f"system.slice/docker-{WEB[:-1]}.scope",
        "docker/buildx",
    ):
        group(cgroups, name, 1, 1, 1)
    with docker(root) as daemon:
        daemon.names = {WEB: "web"}
        look = Look(root, cgroups, root / "docker.sock")
        assert look.usage().containers == [
            ContainerUsage(OTHER[:12], OTHER[:12], 0.5, 20 << 20, 0),
            ContainerUsage(WEB[:12], "web", 1.5, 10 << 20, 3),
            ContainerUsage(POD[:12], POD[:12], 0.0, 1 << 20, 1),
        ]
    # One that ends while it is looked at.
    for file in (cgroups / "docker" / OTHER).iterdir():
        file.unlink()
    assert look.usage().containers[-1] == ContainerUsage(OTHER[:12], OTHER[:12], 0.0, 0, 0)


def test_docker_is_asked_for_names_that_are_new_and_no_more(root: Path) -> None:
    cgroups, clock = root / "cgroup", MockClock()
    with docker(root) as daemon:
        look = Look(root, cgroups, root / "docker.sock", clock.current_time)

        def names() -> list[str]:
            clock.jump(1.0)
            return [row.name for row in look.usage().containers]

        assert names() == []
        assert daemon.asked == 0, "without containers Docker may be stopped, and stays so"
        group(cgroups, f"docker/{WEB}", 1, 1, 1)
        daemon.names = {WEB: "web"}
        for _ in range(3):
            assert names() == ["web"]
        assert daemon.asked == 1
        clock.jump(100.0)
        group(cgroups, f"docker/{OTHER}", 1, 0, 1)
        for _ in range(3):  # not listed yet
            assert names() == ["web", OTHER[:12]]
        assert daemon.asked == 2
        daemon.names[OTHER] = "other"
        clock.jump(usage.NAMES_AGAIN)
        assert names() == ["web", "other"]
        assert daemon.asked == 3


def test_too_many_containers_are_cut_to_those_with_the_most_memory(root: Path) -> None:
    cgroups = root / "cgroup"
    for number in range(usage.MAX_CONTAINERS + 10):
        group(cgroups, f"docker/{number:064x}", 1, number, 1)
    rows = Look(root, cgroups, root / "no.sock").usage().containers
    assert [row.memory for row in rows] == list(range(usage.MAX_CONTAINERS + 9, 9, -1))


def test_this_machine() -> None:
    before = Look().usage()
    started = time.process_time()
    while time.process_time() < started + 0.2:
        pass
    after = Look().usage()
    assert after.time > before.time
    assert after.cpu_busy - before.cpu_busy >= 0.1
    assert 0 < after.memory_available <= after.memory_total
    assert after.processes > 0


async def test_it_is_a_request_of_its_own(root: Path) -> None:
    seen = await UsageService(Look(root, root / "cgroup", root / "no.sock")).usage(GetGuestUsage())
    assert seen.processes == 345
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            service = UsageService()
            for _ in range(3):
                nursery.start_soon(service.usage, GetGuestUsage())
