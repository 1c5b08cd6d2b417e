"""Taking a view off, whoever has left it.

The laws: only what is a view of ours is ever unmounted, and lazily, so it never waits; and nothing here touches what is
mounted, since who does waits for a process that may be gone. What is where mountinfo says.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Final

from host_agent.view import library

SUBTYPE: Final = "agentctl-view"
KIND: Final = f"fuse.{SUBTYPE}"

TIME: Final = 10.0
"""Seconds for libfuse's program; a lazy unmount waits for nobody."""

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


def mounted(mountinfo: Path = _MOUNTINFO) -> list[str]:
    """Where views of ours are. Format: proc_pid_mountinfo(5); nothing on other systems."""
    try:
        lines = mountinfo.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(b" ")
        if fields[fields.index(b"-", 6) + 1] == KIND.encode():
            found.append(os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), fields[4])))
    return found


def is_mounted(path: str) -> bool:
    return path in mounted()


def unmount(path: str) -> bool:
    """Take off the view at ``path``, and those under it; True if there is none any more."""
    for _ in range(mounted().count(path)):
        if os.geteuid() == 0:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)
        elif program := library.unmounter():
            try:
                subprocess.run(
                    [program, "-u", "-q", "-z", "--", path],
                    stdin=subprocess.DEVNULL,
                    check=False,
                    timeout=TIME,
                )
            except (OSError, subprocess.TimeoutExpired):
                return False
    return not is_mounted(path)
