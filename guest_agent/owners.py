"""Who listens: the processes behind the listeners and the containers they are in, looked up when somebody asks.

The law: nobody waits for this and nothing of it is kept, so it costs nothing where nobody asks, and a name is the one
of that moment. A look is bounded, and what could not be found out is "".

Which process holds a socket /proc tells: its tables name the inodes of what listens (proc_pid_net(5)), the
descriptors of each process those that it has open. A port that Docker publishes is held by its proxy; to which port of
which container that leads dockerd says, and the process there is found in the same way, in the container's network.
Where no process in question belongs to Docker it is not asked, since that would start one that was stopped.

An ordinary user is told the descriptors of their own processes only. Of the other ports there remain those that Docker
publishes, if it lets that user ask: by their containers, without the process.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import trio

from guest_agent import dockerd
from guest_agent.cgroups import find_hierarchy
from protocol.api import GetOwners, Owner, Owners, Proto
from protocol.link import Service

DOCKERD = "dockerd"
"""Its process's name, which everybody may read: it runs, and asking it starts nothing."""

MAX_OWNERS = 1024
"""Listeners that are looked at, lowest ports first. One takes 200 bytes on the wire at the most, a header 256 KiB."""

MAX_TABLE = 4 << 20
"""Bytes of one of /proc's tables, lines of 150 bytes: more than anybody listens on. Listening sockets come first."""

MAX_DESCRIPTORS = 50_000
"""Descriptors that are looked at in one look; a readlink takes about 20 us in an emulated guest, so a second."""

MAX_PROCESS, MAX_CONTAINER = 15, 128
"""Characters of a process's name (TASK_COMM_LEN - 1), and of a container's."""

MAX_ANSWER = 4 << 20
"""Bytes of dockerd's list; a container takes 1 to 2 KB."""

DOCKER_PATIENCE = 1.5
"""Seconds for each word of dockerd's. It answers in some 10 ms, or it is busy with something else."""

_TABLES = {
    "tcp": (Proto.TCP, "0A"),
    "tcp6": (Proto.TCP, "0A"),
    "udp": (Proto.UDP, "07"),
    "udp6": (Proto.UDP, "07"),
}
"""With the state of those that listen: TCP_LISTEN, and what stands for an unconnected UDP socket."""

_CONTAINER_SCOPE = re.compile(r"docker[-/]([0-9a-f]{64})")
_MAPPED = b"\x00" * 10 + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Bound:
    """A socket that listens."""

    proto: Proto
    address: str
    port: int
    inode: str


@dataclass(frozen=True, slots=True)
class Published:
    """A port of a container that Docker publishes at an address of the guest."""

    proto: Proto
    address: str
    port: int
    private_port: int


@dataclass(frozen=True, slots=True)
class Container:
    id: str
    name: str
    published: tuple[Published, ...] = ()


def find(
    proc: Path = Path("/proc"),
    docker: Path = dockerd.SOCKET,
    cgroups: Path | None = None,
    *,
    root: bool | None = None,
) -> list[Owner]:
    """Who listens in this network namespace, at the most ``MAX_OWNERS``. Blocks for some tens of milliseconds.

    ``root``: whether all processes may be looked into; by default, whether we are.
    """
    sees_all = os.geteuid() == 0 if root is None else root
    bound = sorted(listening(proc / "self" / "net"), key=lambda each: each.port)[:MAX_OWNERS]
    processes = _processes(proc)
    pids = holders(proc, processes, {each.inode for each in bound})
    inside = {pid: _cgroup(proc, pid) for pid in set(pids.values())}
    of_docker = any("docker" in cgroup for cgroup in inside.values()) or (
        not sees_all and any(_name(proc, pid) == DOCKERD for pid in processes)
    )
    containers = running_containers(docker) if of_docker else {}
    published = {
        (port.proto, port.address, port.port): (container, port.private_port)
        for container in containers.values()
        for port in container.published
    }
    look = _Containers(proc, find_hierarchy() if cgroups is None else cgroups)
    owners = []
    for each in bound:
        pid = pids.get(each.inode)
        cgroup = inside.get(pid, "") if pid is not None else ""
        scope = _CONTAINER_SCOPE.search(cgroup)
        hidden = pid is None and not sees_all
        place = published.get((each.proto, each.address, each.port)) if hidden or "docker" in cgroup else None
        if scope is not None:  # with the host's network
            process, name = _name(proc, pid), containers.get(scope[1], Container("", scope[1][:12])).name
        elif place is not None:
            container, private_port = place
            process, name = look.process(container, each.proto, private_port), container.name
        else:
            process, name = _name(proc, pid), ""
        if process or name:
            owners.append(Owner(each.proto, each.address, each.port, process, name))
    return owners


def listening(net: Path) -> Iterator[Bound]:
    """What listens, of a network namespace's tables below ``net``."""
    for name, (proto, state) in _TABLES.items():
        for words in _lines(net / name):
            if len(words) > 9 and words[3] == state and words[1].count(":") == 1:
                address, _, port = words[1].partition(":")
                yield Bound(proto, _address(address), int(port, 16), words[9])


def _lines(table: Path) -> Iterator[list[str]]:
    try:
        with table.open("rb") as file:
            text = file.read(MAX_TABLE).decode("ascii", "replace")
    except OSError:
        return
    yield from (line.split() for line in text.splitlines()[1:])


def _address(text: str) -> str:
    """Hexadecimal words in the machine's byte order; a mapped IPv4 address is told as IPv4, as ``sockdiag`` does."""
    packed = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def holders(proc: Path, pids: Iterable[int], inodes: set[str]) -> dict[str, int]:
    """Of each of ``inodes``, as far as it is found, the first of ``pids`` that has it open."""
    found: dict[str, int] = {}
    for pid, descriptor in islice(_descriptors(proc, pids), MAX_DESCRIPTORS):
        if len(found) == len(inodes):
            break
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        inode = target.removeprefix("socket:[").removesuffix("]")
        if inode in inodes:
            found.setdefault(inode, pid)
    return found


def _processes(proc: Path) -> list[int]:
    """The oldest first, a server's master before its workers; systemd, which hands sockets on, last."""
    pids = (int(name) for name in os.listdir(proc) if name.isdigit())
    return sorted(pids, key=lambda pid: (pid == 1, pid))


def _descriptors(proc: Path, pids: Iterable[int]) -> Iterator[tuple[int, str]]:
    for pid in pids:
        try:
            with os.scandir(proc / str(pid) / "fd") as entries:
                for entry in entries:
                    yield pid, entry.path
        except OSError:  # it has just ended, or is another user's
            continue


def _name(proc: Path, pid: int | None) -> str:
    return "" if pid is None else _word(proc / str(pid) / "comm")[:MAX_PROCESS]


def _cgroup(proc: Path, pid: int) -> str:
    return _word(proc / str(pid) / "cgroup")


def _word(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


class _Containers:
    """Looks into containers; the tables of each are read once."""

    def __init__(self, proc: Path, cgroups: Path | None) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._bound: dict[str, Mapping[tuple[Proto, int], int]] = {}

    def process(self, container: Container, proto: Proto, port: int) -> str:
        """The name of the process that listens at ``port`` in ``container``."""
        if container.id not in self._bound:
            self._bound[container.id] = self._look(container.id)
        return _name(self._proc, self._bound[container.id].get((proto, port)))

    def _look(self, container: str) -> Mapping[tuple[Proto, int], int]:
        pids = self._pids(container)
        if not pids:
            return {}
        bound = list(listening(self._proc / str(pids[0]) / "net"))
        held = holders(self._proc, pids, {each.inode for each in bound})
        return {(each.proto, each.port): held[each.inode] for each in bound if each.inode in held}

    def _pids(self, container: str) -> list[int]:
        if self._cgroups is None:
            return []
        # As runc names them with systemd, and without it.
        for path in (f"system.slice/docker-{container}.scope", f"docker/{container}"):
            if words := _word(self._cgroups / path / "cgroup.procs").split():
                return sorted(int(word) for word in words if word.isdigit() and word != "0")
        return []


def running_containers(docker: Path) -> dict[str, Container]:
    """Those that run, by their ids; none where dockerd does not answer."""
    try:
        listed = json.loads(dockerd.ask(docker, "/containers/json", DOCKER_PATIENCE, MAX_ANSWER))
        return {each["Id"]: _container(each) for each in listed}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}


def _container(listed: Mapping[str, Any]) -> Container:
    names = listed.get("Names") or [listed["Id"][:12]]
    return Container(
        listed["Id"],
        names[0].removeprefix("/")[:MAX_CONTAINER],
        tuple(_published(port) for port in listed.get("Ports") or () if port.get("PublicPort")),
    )


def _published(port: Mapping[str, Any]) -> Published:
    proto = Proto.UDP if port["Type"] == "udp" else Proto.TCP
    return Published(proto, port.get("IP", "0.0.0.0"), port["PublicPort"], port["PrivatePort"])


class OwnerService:
    """Answers ``GetOwners``, one look at a time."""

    def __init__(self) -> None:
        self._looking = trio.Lock()

    def register(self, service: Service) -> None:
        service.on_request(GetOwners, self.owners)

    async def owners(self, request: GetOwners) -> Owners:
        async with self._looking:
            return Owners(await trio.to_thread.run_sync(find))
