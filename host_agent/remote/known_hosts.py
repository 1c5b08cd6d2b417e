"""Which keys a machine may show: what ``known_hosts`` files say, read as ssh reads them.

The law: nothing is trusted silently. A name without a key is *unknown* and somebody is asked; a name with
another key is *changed* and nobody is asked. One line that cannot be read voids that line, not the file.

asyncssh reads the user's file only, believes a key that is known for the address alone, and takes
``UserKnownHostsFile none`` as leave to believe everyone; so the look-up is here, and it is given the answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncssh

# Bytes of one file that are read: 100,000 hosts.
MAX_FILE: Final = 16 * 1024 * 1024

#: What a machine of which nothing is known is asked for, as ssh orders them.
ALGORITHMS: Final = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one machine."""

    keys: tuple[asyncssh.SSHKey, ...]
    authorities: tuple[asyncssh.SSHKey, ...]  # whose certificates are believed
    revoked: tuple[asyncssh.SSHKey, ...]
    same_name: bool
    """Whether a key is known for this very name and port, so that another one is a change."""

    @property
    def algorithms(self) -> tuple[str, ...]:
        """What to ask the machine for: first the kinds of key that are known, or it would show one of another kind."""
        known = [algorithm.decode() for key in self.keys for algorithm in key.sig_algorithms]
        certified = [f"{name}-cert-v01@openssh.com" for name in ALGORITHMS] if self.authorities else []
        return tuple(dict.fromkeys([*certified, *known, *ALGORITHMS]))


def look_up(files: Iterable[Path], host: str, port: int, alias: str | None = None) -> Known:
    """What the files say of ``host``; ``alias`` (HostKeyAlias) is its name there, then, without a port."""
    known = asyncssh.SSHKnownHosts()
    for file in files:
        for line in _lines(file):
            try:
                known.load(line)
            except ValueError:
                continue
    own = known.match(listed_as(host, port, alias), "", None)
    # ssh, too, believes a key that is known for the machine's standard port on another one.
    also = own if alias is not None or port == 22 else known.match(host.lower(), "", None)
    return Known(
        tuple(dict.fromkeys([*own[0], *also[0]])),
        tuple(dict.fromkeys([*own[1], *also[1]])),
        tuple(dict.fromkeys([*own[2], *also[2]])),
        same_name=bool(own[0]),
    )


def listed_as(host: str, port: int, alias: str | None = None) -> str:
    """The name of a machine in these files."""
    if alias is not None:
        return alias
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def remember(file: Path, name: str, key: asyncssh.SSHKey) -> None:
    """Add a key that somebody has said yes to. Raises ``OSError``."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    line = f"{name} {key.export_public_key().decode().strip()}\n"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as stream:
        if (size := stream.seek(0, os.SEEK_END)) and os.pread(descriptor, 1, size - 1) != b"\n":
            line = "\n" + line
        stream.write(line.encode())


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE).decode(errors="replace")
    except OSError:
        return
    yield from (line for line in text.splitlines() if line.strip())
