"""The folders that the VM sees: whether they can be used, and whether changes in them can be promised.

The law: what is asked of a filesystem may never be answered (a dead server's), so it is asked in a thread that nobody
waits for; which filesystem it is stands in mountinfo, where nothing has to be asked.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from host_agent.doctor.finding import Finding, advice, ok, problem
from host_agent.mounts import is_below
from protocol.api import Mount, MountSpec, MountState

TOPIC: Final = "folders"
ANSWER_TIME: Final = 3.0
"""Seconds that a disk may take; one that sleeps is awake before."""

MOUNTINFO: Final = Path("/proc/self/mountinfo")
TELLING: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "tmpfs"})
"""Filesystems on which nothing changes without fanotify(7) telling of it, by name (``fileserver.devices`` has them by
number, and why others do not)."""

KERNELS: Final = frozenset(
    {"autofs", "binfmt_misc", "cgroup2", "devpts", "devtmpfs", "fusectl", "mqueue", "nsfs", "proc", "sysfs"}
)
"""Mounts that nobody works in."""

_ESCAPE: Final = re.compile(r"\\([0-7]{3})")
"""Blanks, tabs, newlines and backslashes in a path."""

_NAMED: Final = 3
"""Mounts that are named one by one."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of mountinfo (proc_pid_mountinfo(5)): where it is, and the filesystem's name."""

    point: str
    kind: str


def mounted(mountinfo: str) -> list[Mounted]:
    """Those of this process; lines that are not as they should be are left out."""
    found = []
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if separator and len(fields) > 4 and after:
            found.append(Mounted(_ESCAPE.sub(_character, fields[4]), after.split(" ")[0]))
    return found


def _character(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 8))


def silent(path: str, mounts: Sequence[Mounted]) -> list[Mounted]:
    """The mounts that ``path`` is in or that are in ``path``, whose filesystems do not tell of changes."""
    around = [mount for mount in mounts if is_below(path, mount.point)]
    # The last of those with the longest path is the one that is seen.
    own = max(enumerate(around), key=lambda pair: (len(pair[1].point), pair[0]), default=None)
    inside = [mount for mount in mounts if mount.point != path and is_below(mount.point, path)]
    seen = ([own[1]] if own else []) + inside
    return [mount for mount in seen if mount.kind not in TELLING | KERNELS]


async def at_rest(specs: Sequence[MountSpec]) -> list[Finding]:
    """Of an instance that does not run."""
    found = await _each(_usable, specs)
    return found + _unpromised(specs) or [none_wrong(specs)]


async def running(rows: Sequence[Mount]) -> list[Finding]:
    """Of one that does, by what its host agent says."""
    found = [finding for row in rows if (finding := _row(row)) is not None]
    specs = [row.spec for row in rows]
    return found + _unpromised(specs) or [none_wrong(specs)]


def none_wrong(specs: Sequence[MountSpec]) -> Finding:
    """Where nothing was found."""
    if not specs:
        return ok(TOPIC, "the VM sees none")
    return ok(TOPIC, ", ".join(spec.host_path for spec in specs))


def _row(row: Mount) -> Finding | None:
    where = f"{row.spec.host_path}: "
    if row.state is MountState.MOUNTED and row.revalidating:
        return None
    if row.state is MountState.WAITING:
        return advice(TOPIC, where + (row.reason or row.state.value), row.hint)
    if row.state is not MountState.MOUNTED:
        return problem(TOPIC, where + (row.reason or row.state.value), row.hint)
    if row.reason:
        return advice(TOPIC, where + row.reason.removesuffix("."), row.hint.removesuffix("."))
    if row.lost:
        return advice(TOPIC, f"{where}{row.lost} open files or locks of the VM were lost (ESTALE)")
    return None


def _usable(spec: MountSpec) -> Finding | None:
    """None if it is. May wait for ever."""
    path = spec.real_path or spec.host_path
    see = f"see: ls -ld {shlex.quote(path)}"
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return problem(TOPIC, f"{spec.host_path} does not exist", f"mkdir -p {shlex.quote(path)}")
    except OSError as error:
        return problem(TOPIC, f"{spec.host_path} cannot be used: {error.strerror}", see)
    if not stat.S_ISDIR(status.st_mode):
        return problem(TOPIC, f"{spec.host_path} is not a folder", see)
    if not os.access(path, os.R_OK | os.X_OK):
        return problem(TOPIC, f"{spec.host_path} cannot be used: you may not read it", see)
    return _foreign(spec, status.st_uid)


def _foreign(spec: MountSpec, owner: int) -> Finding | None:
    """The kernel says only to a file's owner, and to root, whether somebody writes it (fcntl(2), F_SETLEASE)."""
    if os.geteuid() in (0, owner):
        return None
    return advice(
        TOPIC,
        f"{spec.host_path} belongs to {_user(owner)}: the VM keeps no contents of files that are not yours",
        f"if they are meant to be: sudo chown -R $(id -u) {shlex.quote(spec.real_path or spec.host_path)}",
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


def _unpromised(specs: Sequence[MountSpec]) -> list[Finding]:
    """Folders in which changes go unheard."""
    if sys.platform != "linux":
        return []
    mounts = mounted(MOUNTINFO.read_text(errors="surrogateescape"))
    return [
        _unheard(spec, unheard)
        for spec in specs
        if (unheard := silent(spec.real_path or spec.host_path, mounts))
    ]


def _unheard(spec: MountSpec, mounts: Sequence[Mounted]) -> Finding:
    named = ", ".join(f"{mount.point} ({mount.kind})" for mount in mounts[:_NAMED])
    if len(mounts) > _NAMED:
        named += f" and {len(mounts) - _NAMED} more"
    return advice(
        TOPIC,
        f"{spec.host_path}: the kernel does not tell of changes in {named}; the VM asks for each look at a file there",
        f"keep what is worked on in a folder on {', '.join(sorted(TELLING - {'ext2', 'ext3'}))}",
    )


async def _each(function: Callable[[MountSpec], Finding | None], specs: Sequence[MountSpec]) -> list[Finding]:
    """What it returns of each, all at once; that a disk does not answer, of one that takes too long."""
    found: dict[int, Finding | None] = {}

    async def ask(number: int, spec: MountSpec) -> None:
        found[number] = problem(
            TOPIC,
            f"{spec.host_path}: its disk does not answer",
            f"see: findmnt -T {shlex.quote(spec.host_path)}; programs in the VM that use it would wait",
        )
        with trio.move_on_after(ANSWER_TIME):
            found[number] = await trio.to_thread.run_sync(function, spec, abandon_on_cancel=True)

    async with trio.open_nursery() as nursery:
        for number, spec in enumerate(specs):
            nursery.start_soon(ask, number, spec)
    return [finding for _, finding in sorted(found.items()) if finding is not None]
