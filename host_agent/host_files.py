"""The host's hosts(5) and resolv.conf(5), read again when they have changed.

The law: a file that is missing or cannot be read says nothing, and lines that are not understood are passed over, as
the C library does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import trio

from host_agent.network_settings import MAX_NAMESERVERS, Nameserver, numeric

T = TypeVar("T")

#: The addresses of each name (in lower case), in the file's order.
Hosts = dict[str, tuple[str, ...]]

HOSTS = Path("/etc/hosts")
RESOLV_CONF = Path("/etc/resolv.conf")

#: Inode, size in bytes, and time of the last change in ns.
_Stamp = tuple[int, int, int]

#: A hosts file that keeps advertisements out has some 5 MB; a larger one is not a hosts file.
MAX_FILE = 16 << 20


class WatchedFile(Generic[T]):
    """What ``parse`` makes of a file's text; one stat(2) says whether it is still that."""

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        self._path = path
        self._parse = parse
        self._stamp: _Stamp | None = None
        self._value = parse("")

    async def current(self) -> T:
        # Parsed in a thread: a hosts file that keeps advertisements out takes a second.
        if (stamp := self._look()) != self._stamp:
            self._value, self._stamp = await trio.to_thread.run_sync(self._read), stamp
        return self._value

    def _look(self) -> _Stamp | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> T:
        try:
            with self._path.open("rb") as file:
                return self._parse(file.read(MAX_FILE).decode(errors="replace"))
        except OSError:
            return self._parse("")


def hosts(text: str) -> Hosts:
    found: Hosts = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if (plain := numeric(address)) is None:
            continue
        for name in names:
            key = name.lower().removesuffix(".")
            if plain not in (before := found.get(key, ())):
                found[key] = (*before, plain)
    return found


def nameservers(text: str) -> tuple[Nameserver, ...]:
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver" and (address := numeric(words[1])) is not None:
            found.append(Nameserver(address))
    return tuple(dict.fromkeys(found))[:MAX_NAMESERVERS]
