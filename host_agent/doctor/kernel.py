"""What the host's kernel lets a user have who wants to hear of changes to files, and to keep them open (Linux).

The law: the promises of the mount rest on fanotify(7). Where that is refused or runs out, the VM asks the host for each
look: right, and slower. So nothing here is ever a problem.
"""

from __future__ import annotations

import errno
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fileserver import watches
from fileserver.fanotify import FanotifyGroup
from host_agent.doctor.finding import Finding, advice, ok

TOPIC: Final = "watching"
DESCRIPTORS: Final = "descriptors"

ENOUGH_MARKS: Final = 1 << 17
"""Half of them are for files: a large checkout with what it depends on. The kernel gives as many as 1 % of memory would
take, 1 KiB each, and 8,192 at the least; ``WANTED_MARKS`` take 512 MiB, if all are used."""
WANTED_MARKS: Final = 1 << 19

ENOUGH_EVENTS: Final = 16384
"""The kernel's own. What comes beyond that before we have looked makes us compare everything."""

ENOUGH_GROUPS: Final = 16
"""Each filesystem with shared folders takes one."""

ENOUGH_DESCRIPTORS: Final = 4096
"""A file server keeps a quarter of its limit open by each share's files; the usual limit is 524,288, or 1,048,576."""

_KERNEL: Final = (5, 13)
_SYSCTL: Final = Path("/proc/sys")
_FILE: Final = "/etc/sysctl.d/60-agentctl.conf"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of this user. None: this kernel has no such limit. ``refused``: the errno of an attempt to watch, or 0."""

    refused: int
    release: str
    marks: int
    events: int | None
    groups: int | None
    leases: int | None
    descriptors: int


def measure() -> Limits:
    return Limits(
        _refused(),
        platform.release(),
        watches.limit(),
        _number("fs.fanotify.max_queued_events"),
        _number("fs.fanotify.max_user_groups"),
        _number("fs.leases-enable"),
        resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    )


def check() -> Iterator[Finding]:
    if sys.platform == "linux":
        yield from findings(measure())


def findings(limits: Limits) -> Iterator[Finding]:
    watching = list(_watching(limits))
    yield from watching or [ok(TOPIC, f"changes on up to {limits.marks} files and folders are heard of")]
    if limits.descriptors != resource.RLIM_INFINITY and limits.descriptors < ENOUGH_DESCRIPTORS:
        yield advice(
            DESCRIPTORS,
            f"a process may have {limits.descriptors} files open, and the VM soon uses more: it is slower then",
            "sudo sh -c 'echo \"* hard nofile 524288\" >/etc/security/limits.d/60-agentctl.conf', then log in again",
        )


def _watching(limits: Limits) -> Iterator[Finding]:
    if limits.refused:
        yield _refusal(limits)
        return
    if limits.marks < ENOUGH_MARKS:
        yield _too_few(watches.LIMIT, limits.marks, WANTED_MARKS, "files and folders are watched at the most")
    if limits.events is not None and limits.events < ENOUGH_EVENTS:
        yield _too_few(
            "fs.fanotify.max_queued_events", limits.events, ENOUGH_EVENTS, "changes may wait to be heard of"
        )
    if limits.groups is not None and limits.groups < ENOUGH_GROUPS:
        yield _too_few(
            "fs.fanotify.max_user_groups", limits.groups, 128, "filesystems are watched at the most"
        )
    if limits.leases == 0:
        yield advice(
            TOPIC,
            "fs.leases-enable is 0: nobody tells who has a file open for writing, so the VM keeps no contents",
            _raise("fs.leases-enable", 1),
        )


def _refusal(limits: Limits) -> Finding:
    consequence = "so the VM asks this machine for each look at a file"
    if limits.refused == errno.EMFILE:
        return advice(
            TOPIC,
            f"all watchers that you may have are in use, {consequence}",
            _raise("fs.fanotify.max_user_groups", 2 * (limits.groups or 128)),
        )
    if limits.refused == errno.ENOSYS or _version(limits.release) >= _KERNEL:
        return advice(
            TOPIC,
            f"this kernel ({limits.release}) does not let you watch files, {consequence}",
            "use a kernel with CONFIG_FANOTIFY, as all distributions' are, outside of a container that forbids it",
        )
    wanted = ".".join(map(str, _KERNEL))
    return advice(
        TOPIC,
        f"Linux {limits.release} lets only root watch files, {consequence}",
        f"use Linux {wanted} or newer",
    )


def _too_few(name: str, value: int, wanted: int, what: str) -> Finding:
    return advice(TOPIC, f"{value} {what}; with more of them the VM is slower", _raise(name, wanted))


def _raise(name: str, value: int) -> str:
    """Now, and at each start of the machine."""
    return f"echo {name}={value} | sudo tee -a {_FILE} && sudo sysctl -p {_FILE}"


def _version(release: str) -> tuple[int, ...]:
    numbers = []
    for part in release.split(".")[:2]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _refused() -> int:
    try:
        FanotifyGroup().close()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _number(name: str) -> int | None:
    try:
        return int(_SYSCTL.joinpath(*name.split(".")).read_text())
    except (OSError, ValueError):
        return None
