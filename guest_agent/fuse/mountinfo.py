"""What of ours is mounted where, from /proc/self/mountinfo.

Format: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

FILE_SYSTEM = "fuse.agentctl"
SOURCE_PREFIX = "agentctl-"
MOUNTINFO = "/proc/self/mountinfo"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. ``device`` is the superblock's minor number (all of FUSE's have major 0)."""

    device: int
    root: str
    path: str
    read_only: bool
    kind: str
    source: str

    @property
    def share(self) -> int | None:
        """The share's id if this is a whole share; a bind mount of a part of one (a container's) is not.

        A bind mount of all of it cannot be told from what we made, but comes later in the list.
        """
        number = self.source.removeprefix(SOURCE_PREFIX)
        if self.kind != FILE_SYSTEM or self.root != "/" or not (number.isascii() and number.isdigit()):
            return None
        return int(number)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """All mounts, in the order of the kernel's list: of several at one path the last is the one that is seen."""
    return [_parse_line(line.split(b" ")) for line in text.splitlines()]


def _parse_line(fields: list[bytes]) -> Mount:
    separator = fields.index(b"-", 6)  # optional fields (propagation) stand before it
    return Mount(
        device=int(fields[2].partition(b":")[2]),
        root=_unescape(fields[3]),
        path=_unescape(fields[4]),
        read_only=b"ro" in fields[5].split(b","),
        kind=_unescape(fields[separator + 1]),
        source=_unescape(fields[separator + 2]),
    )


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(field: bytes) -> str:
    r"""Blank, tab, newline and backslash are written as ``\040`` and so on."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def read_mounts() -> list[Mount]:
    """What is mounted in our mount namespace."""
    with open(MOUNTINFO, "rb") as file:
        return parse_mountinfo(file.read())


def mounted_shares(mounts: Iterable[Mount]) -> list[Mount]:
    """Those that are ours."""
    return [mount for mount in mounts if mount.share is not None]


def is_of(mount: Mount, device: int) -> bool:
    """Whether ``mount`` shows the superblock ``device`` of ours, or a part of it."""
    return mount.kind == FILE_SYSTEM and mount.device == device


def is_below(path: str, directory: str) -> bool:
    """Whether ``path`` is inside of ``directory``, by its name."""
    return path.startswith(directory.rstrip("/") + "/") and path.rstrip("/") != directory.rstrip("/")


def leads_through_a_share(path: str, mounts: Iterable[Mount]) -> bool:
    """Whether walking to ``path`` asks a server of ours."""
    return any(is_below(path, mount.path) for mount in mounts if mount.kind == FILE_SYSTEM)
