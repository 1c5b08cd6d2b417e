"""What the guest uses of its processors, memory, disk and network, and which containers do.

The law: looked up when somebody asks, and nothing is kept but names; where nobody asks it costs nothing. A look reads a
dozen files of /proc and three of each container's control group. What cannot be read counts as 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import trio

from guest_agent import dockerd
from guest_agent.cgroups import find_hierarchy
from guest_agent.owners import running_containers
from guest_agent.system import IN_VM, DataPlace, read_meminfo
from protocol.api import ContainerUsage, GetGuestUsage, GuestUsage
from protocol.link import Service

MAX_CONTAINERS = 64
"""Containers that are told of, those with the most memory; with their names they take 10 KB on the wire."""

MAX_LOOKED_AT = 512
"""Control groups that are looked at; one takes 0.3 ms in an emulated guest."""

NAMES_AGAIN = 5.0
"""Seconds until dockerd is asked once more for a name that it did not know."""

SHORT_ID = 12
"""Characters of an id, as ``docker ps`` shows it."""

SECTOR = 512
"""Bytes; what /proc/diskstats counts in, whatever the disk's own are (Documentation/admin-guide/iostats.rst)."""

_ID = frozenset("0123456789abcdef")

_PLACES = (
    ("system.slice", "docker-", ".scope"),
    ("docker", "", ""),
    ("machine.slice", "libpod-", ".scope"),
)
"""Where control groups of containers are, and what stands before and after their ids."""


class Look:
    """Looks at a guest whose files are below ``root``; ``clock`` is one that is never set."""

    def __init__(
        self,
        root: Path = Path("/"),
        cgroups: Path | None = None,
        docker: Path = dockerd.SOCKET,
        clock: Callable[[], float] = time.monotonic,
        data: DataPlace = IN_VM,
    ) -> None:
        self._root = root
        self._proc = root / "proc"
        self._cgroups = find_hierarchy() if cgroups is None else cgroups
        self._docker = docker
        self._data = data
        self._clock = clock
        self._names: dict[str, str] = {}
        self._asked_at = float("-inf")

    def usage(self) -> GuestUsage:
        """What is used now. Blocks for some milliseconds, and for dockerd when there is a new container."""
        busy, waiting, stolen = processor_seconds(_read(self._proc / "stat"))
        load, processes = load_average(_read(self._proc / "loadavg"))
        memory = read_meminfo(_read(self._proc / "meminfo"))
        total, free, (read, written) = self._data_disk()
        received, sent = interface_bytes(
            _read(self._proc / "net" / "dev"), default_interface(_read(self._proc / "net" / "route"))
        )
        return GuestUsage(
            time=self._clock(),
            cpus=len(os.sched_getaffinity(0)),
            cpu_busy=busy,
            cpu_waiting=waiting,
            cpu_stolen=stolen,
            load=load,
            processes=processes,
            memory_total=memory.get("MemTotal", 0),
            memory_available=memory.get("MemAvailable", 0),
            memory_cache=sum(memory.get(name, 0) for name in ("Buffers", "Cached", "SReclaimable")),
            data_total=total,
            data_free=free,
            data_read=read,
            data_written=written,
            network_received=received,
            network_sent=sent,
            containers=self._containers(),
        )

    def _data_disk(self) -> tuple[int, int, tuple[int, int]]:
        path = self._data.find(self._root)
        if path is None:
            return 0, 0, (0, 0)
        disk = os.statvfs(path)
        traffic = disk_bytes(_read(self._proc / "diskstats"), path.stat().st_dev)
        return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize, traffic

    def _containers(self) -> list[ContainerUsage]:
        groups = dict(self._groups())
        self._learn_names(groups.keys())
        rows = [
            ContainerUsage(
                id=container[:SHORT_ID],
                name=self._names.get(container, "") or container[:SHORT_ID],
                cpu=_value(_read(group / "cpu.stat"), "usage_usec") / 1e6,
                memory=_number(_read(group / "memory.current")),
                processes=_number(_read(group / "pids.current")),
            )
            for container, group in groups.items()
        ]
        return sorted(rows, key=lambda row: (-row.memory, row.name))[:MAX_CONTAINERS]

    def _groups(self) -> Iterator[tuple[str, Path]]:
        """The control groups of containers by their ids, as Docker and podman name them with systemd, and without."""
        if self._cgroups is None:
            return
        found = 0
        for parent, before, after in _PLACES:
            try:
                names = os.listdir(self._cgroups / parent)
            except OSError:
                continue
            for name in names:
                container = name.removeprefix(before).removesuffix(after)
                if len(name) == len(before) + 64 + len(after) and _ID.issuperset(container):
                    found += 1
                    if found > MAX_LOOKED_AT:
                        return
                    yield container, self._cgroups / parent / name

    def _learn_names(self, ids: Iterable[str]) -> None:
        known = set(ids)
        self._names = {container: name for container, name in self._names.items() if container in known}
        if known <= self._names.keys() or self._clock() < self._asked_at + NAMES_AGAIN:
            return
        self._asked_at = self._clock()
        self._names |= {
            container: found.name
            for container, found in running_containers(self._docker).items()
            if container in known
        }


def processor_seconds(stat: str) -> tuple[float, float, float]:
    """Seconds in which processors worked, waited for a disk, and were stolen (proc_stat(5)), all together."""
    words = stat.split("\n", 1)[0].split()
    if len(words) < 9 or words[0] != "cpu":
        return 0.0, 0.0, 0.0
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, waiting, interrupts, soft, stolen = (int(word) / tick for word in words[1:9])
    return user + nice + system + interrupts + soft, waiting, stolen


def load_average(loadavg: str) -> tuple[list[float], int]:
    """Of 1, 5 and 15 minutes, and how many processes and threads there are (proc_loadavg(5))."""
    words = loadavg.split()
    if len(words) < 4:
        return [0.0, 0.0, 0.0], 0
    return [float(word) for word in words[:3]], int(words[3].partition("/")[2] or 0)


def disk_bytes(diskstats: str, device: int) -> tuple[int, int]:
    """Read and written of the disk with the number ``device`` (st_dev)."""
    number = [str(os.major(device)), str(os.minor(device))]
    for words in map(str.split, diskstats.splitlines()):
        if words[:2] == number and len(words) > 9:
            return int(words[5]) * SECTOR, int(words[9]) * SECTOR
    return 0, 0


def default_interface(route: str) -> str:
    """The interface of the default route (proc_pid_net(5)), or ""."""
    for words in map(str.split, route.splitlines()[1:]):
        if len(words) > 7 and words[1] == words[7] == "00000000":
            return words[0]
    return ""


def interface_bytes(dev: str, name: str) -> tuple[int, int]:
    """Received and sent by the interface ``name``."""
    for line in dev.splitlines():
        interface, colon, rest = line.partition(":")
        words = rest.split()
        if colon and interface.strip() == name and len(words) > 8:
            return int(words[0]), int(words[8])
    return 0, 0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _value(text: str, name: str) -> int:
    """Of a file of lines with a name and a number."""
    for words in map(str.split, text.splitlines()):
        if len(words) == 2 and words[0] == name:
            return _number(words[1])
    return 0


class UsageService:
    """Answers ``GetGuestUsage``, one look at a time."""

    def __init__(self, look: Look | None = None) -> None:
        self._look = look or Look()
        self._looking = trio.Lock()

    def register(self, service: Service) -> None:
        service.on_request(GetGuestUsage, self.usage)

    async def usage(self, request: GetGuestUsage) -> GuestUsage:
        async with self._looking:
            return await trio.to_thread.run_sync(self._look.usage)
