"""A guest that walks everything: what that costs both sides in memory, and that it is given back.

100,000 files, with ``--long`` 1,000,000, of which only as many are watched as the kernel's limit lets them; each of the
others is a message.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fileserver import watches
from tests.files.harness import Plane, eventually

IN_ONE = 1000
"""Files of one directory."""

MAKE = """
import os, sys
for directory in range(int(sys.argv[1])):
    os.mkdir(str(directory))
    for file in range(int(sys.argv[2])):
        os.mknod(f"{directory}/file number {file}")
"""

PURGE = "import ctypes, sys; assert ctypes.CDLL(None).mount(b'', sys.argv[1].encode(), b'', 32, None) == 0"
"""mount(2) with MS_REMOUNT: the kernel drops every dentry of the filesystem that nobody uses."""

HOST_BYTES = 2000
"""For each file: its node, its name, its mark, and a number while the journal is rewritten. 1,360 were measured with
100,000 files."""

GUEST_ROOM = 96 << 20
"""The guest keeps nothing of files but what it may keep of listings and contents, however many there are: 46 MiB were
measured with 250,000."""


def peak(pid: int) -> int:
    """Bytes that a process has had in memory."""
    [line] = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")
    ]
    return int(line.split()[1]) << 10


def marks(plane: Plane) -> int:
    """How many the file server has: its groups say so in fdinfo (proc_pid_fdinfo(5))."""
    found = 0
    for entry in Path(f"/proc/{plane.server.pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found += entry.read_text().count("fanotify ino:")
    return found


@pytest.fixture
def in_memory() -> Iterator[Plane]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        host = Path(directory)
        host.chmod(0o755)
        with Plane(host=host) as plane:
            yield plane


def walk(plane: Plane, limit: float) -> int:
    """How many there are, with the attributes of each."""
    return int(plane.sh("find . -type f -size -1 -printf '%n\\n' | wc -l", timeout=limit))


def test_a_walk_has_a_ceiling_and_is_forgotten(in_memory: Plane, long: bool) -> None:
    plane, directories = in_memory, 1000 if long else 100
    files = directories * IN_ONE
    subprocess.run([sys.executable, "-c", MAKE, str(directories), str(IN_ONE)], cwd=plane.host, check=True)
    assert plane.sh("true") == ""
    before = peak(plane.server.pid), peak(plane.agent.pid)
    assert walk(plane, 60 + files / 250) == files
    state = plane.state()
    host, guest = peak(plane.server.pid) - before[0], peak(plane.agent.pid) - before[1]
    print(
        f"{state.nodes} nodes, {marks(plane)} marks, {state.unwatched} unwatched: {host >> 20}, {guest >> 20} MiB"
    )
    assert state.nodes >= files
    assert host < HOST_BYTES * state.nodes
    assert guest < GUEST_ROOM

    watched = marks(plane)
    assert directories < watched <= directories + 1 + int(watches.limit() * watches.FILES)
    assert watched + state.unwatched >= files
    assert bool(state.unwatched) == (files > watches.limit() * watches.FILES)

    plane.run([sys.executable, "-c", PURGE, str(plane.guest)], cwd=Path("/"))
    eventually("all is forgotten", lambda: plane.state().nodes <= 2, 60 + files / 250)
    eventually("nothing is watched but the root", lambda: marks(plane) <= 1, 60)
    assert plane.state().unwatched == 0
