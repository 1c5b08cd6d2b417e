"""Who listens on a port of this host, as far as its user may know.

Linux says it in /proc: /proc/net/tcp has each listening socket with its inode and its user (proc_pid_net(5)), and a
process's own ``fd`` folder names the inodes that it holds open, for whoever may look: its user. The law: a look is
bounded, and none is taken twice within ``KEPT`` seconds, however many ports are asked for. Where nothing can be found
out (another user's process, another system), the answer is what is known, or "".
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from host_agent.rules import EVERYWHERE, LOCALHOST, HostAddress
from protocol.api import Proto

#: Seconds for which what was seen is believed.
KEPT = 1.0
#: Bytes of one of /proc/net's tables, lines of 150 bytes. Listening sockets come first in them.
MAX_TABLE = 1 << 20
#: Processes and descriptors that are looked at; a readlink takes about 1.5 µs, so 30 ms at the most.
MAX_PROCESSES = 2048
MAX_DESCRIPTORS = 20_000

#: The tables, and the state of those that listen: TCP_LISTEN, and what stands for an unconnected UDP socket.
_TABLES = {Proto.TCP: (("tcp", "tcp6"), "0A"), Proto.UDP: (("udp", "udp6"), "07")}


_ALL = ("0.0.0.0", "::")
#: The addresses behind the names that ``HostAddress`` has.
_MEANT = {LOCALHOST: ("127.0.0.1", "::1"), EVERYWHERE: _ALL}


@dataclass(frozen=True, slots=True)
class _Socket:
    address: str
    inode: str
    uid: int


class PortOwners:
    """Looks into ``proc``; ``clock`` is in seconds."""

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic) -> None:
        self._proc = proc
        self._clock = clock
        self._seen_at = -KEPT
        self._sockets: dict[tuple[Proto, int], list[_Socket]] = {}
        self._holders: dict[str, str] = {}

    def owner(self, host: HostAddress) -> str:
        """Who has the port; "" if that is not known.

        Like "nginx (pid 1234)", "a process of user www-data", "agentctl's instance dev (pid 1234)".
        """
        if self._clock() - self._seen_at >= KEPT:
            self._look()
            self._seen_at = self._clock()
        listening = self._sockets.get((host.proto, host.port), [])
        wanted = _MEANT.get(host.address, (host.address,))
        found = next((each for each in listening if _overlaps(each.address, wanted)), None)
        if found is None:
            return ""
        if (pid := self._holders.get(found.inode)) is None:
            return "" if found.uid == os.geteuid() else f"a process of user {_user(found.uid)}"
        if int(pid) == os.getpid():
            return "another forward of this VM"
        if instance := self._instance(pid):
            return f"agentctl's instance {instance} (pid {pid})"
        return f"{self._command(pid)} (pid {pid})"

    def _look(self) -> None:
        self._sockets = {}
        for proto, (tables, state) in _TABLES.items():
            for table in tables:
                for port, found in self._listening(self._proc / "net" / table, state):
                    self._sockets.setdefault((proto, port), []).append(found)
        inodes = {found.inode for listening in self._sockets.values() for found in listening}
        self._holders = dict(self._held(inodes)) if inodes else {}

    def _listening(self, table: Path, state: str) -> Iterator[tuple[int, _Socket]]:
        try:
            with table.open("rb") as file:
                lines = file.read(MAX_TABLE).decode("ascii", "replace").splitlines()
        except OSError:
            return
        for line in lines[1:]:
            words = line.split()
            if len(words) > 9 and words[3] == state:
                address, _, port = words[1].partition(":")
                yield int(port, 16), _Socket(_address(address), words[9], int(words[7]))

    def _held(self, inodes: set[str]) -> Iterator[tuple[str, str]]:
        """Each of the inodes that a process of ours holds, with its id."""
        for descriptor in islice(self._descriptors(), MAX_DESCRIPTORS):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            inode = target.removeprefix("socket:[").removesuffix("]")
            if inode in inodes:
                yield inode, descriptor.split("/")[-3]

    def _descriptors(self) -> Iterator[str]:
        try:
            processes = [name for name in os.listdir(self._proc) if name.isdigit()]
        except OSError:
            return
        for pid in processes[-MAX_PROCESSES:]:
            try:
                with os.scandir(self._proc / pid / "fd") as entries:
                    for entry in entries:
                        yield entry.path
            except OSError:  # another user's, or it has just ended
                continue

    def _instance(self, pid: str) -> str:
        """The instance whose host agent ``pid`` is, as its keeper starts it; "" if it is another program."""
        try:
            words = (self._proc / pid / "cmdline").read_bytes().split(b"\0")
            at = words.index(b"host_agent.daemon")
            return os.fsdecode(os.path.basename(words[at + 1]))
        except (OSError, LookupError, ValueError):
            return ""

    def _command(self, pid: str) -> str:
        try:
            return (self._proc / pid / "comm").read_text(errors="replace").strip() or "a process"
        except OSError:
            return "a process"


def _address(text: str) -> str:
    """Hexadecimal words in the machine's byte order."""
    packed = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _overlaps(bound: str, wanted: Sequence[str]) -> bool:
    """Whether a socket at ``bound`` is in the way of one of ``wanted``. ``::`` may take IPv4, too, unless it is told
    not to, which /proc does not say."""
    for address in wanted:
        same_family = (":" in bound) == (":" in address)
        if bound == address or bound == "::" or (same_family and (bound in _ALL or address in _ALL)):
            return True
    return False


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
