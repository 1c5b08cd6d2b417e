"""Taking a view off, whoever has left it.

The laws: only what is a view of ours is ever unmounted, and lazily, so it never waits; who knows which one is theirs
says so, since another may be at the same place by now; and nothing here touches what is mounted, since who does waits
for a process that may be gone. What is where mountinfo says.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from host_agent.view import library

SUBTYPE: Final = "agentctl-view"
KIND: Final = f"fuse.{SUBTYPE}"

TIME: Final = 10.0
"""Seconds for libfuse's program; a lazy unmount waits for nobody."""

MOST_AT_ONE_PLACE: Final = 64

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


class Mounted(NamedTuple):
    """A mount: where, of what, and whether it is a view of ours."""

    path: str
    source: str
    is_view: bool = True


def source_of(instance: str, pid: int | None = None) -> str:
    """What df(1) shows for an instance's view; with the process it is of that one alone. (Device numbers and mount ids
    are used again at once.)"""
    return f"agentctl:{instance}" + ("" if pid is None else f":{pid}")


def views(mountinfo: Path = _MOUNTINFO) -> list[Mounted]:
    """Those that are mounted. Format: proc_pid_mountinfo(5); nothing on other systems."""
    return [mount for mount in _all(mountinfo) if mount.is_view]


def _all(mountinfo: Path = _MOUNTINFO) -> list[Mounted]:
    """All mounts, those above after those below."""
    try:
        lines = mountinfo.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(b" ")
        end = fields.index(b"-", 6)
        found.append(Mounted(_plain(fields[4]), _plain(fields[end + 2]), fields[end + 1] == KIND.encode()))
    return found


def _plain(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def mounted(mountinfo: Path = _MOUNTINFO) -> list[str]:
    """Where views of ours are."""
    return [view.path for view in views(mountinfo)]


def unmount(path: str, source: str = "") -> bool:
    """Take off the views at ``path``, only those of ``source`` if that is said; True if there is none of them any more.
    One that has something else on top of it stays: only what is seen can be taken off."""

    def is_meant(mount: Mounted) -> bool:
        return mount.is_view and (not source or f"{mount.source}:".startswith(f"{source}:"))

    for _ in range(MOST_AT_ONE_PLACE):
        there = [mount for mount in _all() if mount.path == path]
        if not any(map(is_meant, there)):
            return True
        if not is_meant(there[-1]) or not _take_off(path):
            return False
    return False


def _take_off(path: str) -> bool:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        done: int = libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)
        return done == 0
    program = library.unmounter()
    if program is None:
        return False
    argv = [program, "-u", "-q", "-z", "--", path]
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, check=False, timeout=TIME).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
