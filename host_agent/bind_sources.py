"""Which folders a container may be given: what is shared with the VM, and what is the VM's own.

Docker makes an empty folder where a bind's source is missing. In a VM that is a trap: the path is right on
the host, the container starts, and finds nothing. The law: a source is under a share, or is something the VM
has of itself and nobody means the host's by, or is refused by name with what to do.

A source is followed as the guest's kernel will: by the names of the guest, reading on the host the links that
a share shows. One that leads out of every share means a place of the host, so the VM's place of that name is
not taken for it.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from host_agent import hints, kind, mounts
from host_agent.errors import UserError
from host_agent.mounts import is_below
from protocol.api import MountSpec

MAX_LINKS = 40
"""Symbolic links in one path before Linux says ELOOP (path_resolution(7))."""

# Of the VM with all below: its kernel's, its services' and Docker's own. /var/run/docker.sock is among them.
# /cgroup is where old releases of cAdvisor look, in vain on any Linux of today.
OWN_TREES = (
    "/proc",
    "/sys",
    "/cgroup",
    "/dev",
    "/run",
    "/boot",
    "/lib/modules",
    "/usr/lib/modules",
    "/usr/libexec/docker",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
    "/etc/docker",
    "/etc/ssl/certs",
    "/var/lib/containerd",
    "/var/lib/docker",
)

# Of the VM, but not what else may be below on the host, where people keep configuration and programs of theirs
# (/etc/nginx, /usr/local, /var/log/app). Monitors take such folders whole. All of them are in the guest's image:
# a name that is not would be made there, as an empty folder.
OWN_PLACES = frozenset(
    {
        "/",
        "/bin",
        "/etc",
        "/etc/group",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/localtime",
        "/etc/machine-id",
        "/etc/nsswitch.conf",
        "/etc/os-release",
        "/etc/passwd",
        "/etc/resolv.conf",
        "/etc/shadow",
        "/etc/ssl",
        "/lib",
        "/sbin",
        "/usr",
        "/usr/bin",
        "/usr/bin/docker",
        "/usr/lib",
        "/usr/sbin",
        "/usr/share",
        "/usr/src",
        "/var",
        "/var/lib",
        "/var/log",
    }
)

# Sockets of a desktop session (ssh-agent, D-Bus, Wayland), which are the host's; the guest has no such sessions.
HOST_TREES = ("/run/user",)

# Not /tmp and not /var/tmp: both are everybody's, and what a user puts there is on the host.

# The guest's homes stand beside the host's, which have the same name on both sides.
_GUEST_HOME = re.compile(r"/home/[^/]+\.guest(?:/.*)?", re.DOTALL)


class Share(Protocol):
    """A folder of the host, and where it is in the guest; both absolute."""

    @property
    def host_path(self) -> str | os.PathLike[str]: ...

    @property
    def real_path(self) -> str:
        """Where that really is; "" if it is there."""

    @property
    def guest_path(self) -> str | os.PathLike[str]: ...


def refusal(source: str, shares: Iterable[Share]) -> str | None:
    """Why a container may not have ``source`` (absolute, as the client named it), or None if it may.

    Reads links and types on the host, so it may take as long as the slowest filesystem that is shared.
    """
    table = _Table.of(shares)
    path = _clean(source)
    if table.find(path) is None:
        return None if is_own(path) else _not_shared(path, table)
    outside = _leads_outside(path, table)
    if outside is None:
        return None
    return _denied(f"{path} leads to {outside}, which is not shared with the VM", _advice(outside))


def is_own(path: str) -> bool:
    """Whether the VM has ``path`` (clean and absolute) of itself and it is not a name for something of the host."""
    if is_below(path, "/var/run"):
        path = path.removeprefix("/var")
    if any(is_below(path, tree) for tree in HOST_TREES):
        return False
    below_own = any(is_below(path, tree) for tree in OWN_TREES)
    return below_own or path in OWN_PLACES or _GUEST_HOME.fullmatch(path) is not None


@dataclass(frozen=True, slots=True)
class _Place:
    """A share, as clean strings."""

    host: str
    guest: str
    real: str

    @classmethod
    def of(cls, share: Share) -> _Place:
        host = os.fspath(share.host_path)
        return cls(_clean(host), _clean(os.fspath(share.guest_path)), _clean(share.real_path or host))


@dataclass(frozen=True, slots=True)
class _Table:
    places: Sequence[_Place]

    @classmethod
    def of(cls, shares: Iterable[Share]) -> _Table:
        places = (_Place.of(share) for share in shares)
        # The innermost first: it is mounted over the others.
        return cls(sorted(places, key=lambda place: -len(place.guest)))

    def find(self, path: str) -> _Place | None:
        """The share that ``path`` of the guest belongs to."""
        return next((place for place in self.places if is_below(path, place.guest)), None)

    def on_host(self, path: str) -> str | None:
        """The path on the host of what is strictly below a share; its root itself is a folder of the guest's."""
        place = self.find(path)
        if place is None or path == place.guest:
            return None
        return posixpath.join(place.real, path.removeprefix(place.guest).lstrip("/"))

    def elsewhere(self, path: str) -> str | None:
        """The guest's name of a path of the host that is shared under another one."""
        for place in self.places:
            if is_below(path, place.host):
                return _clean(posixpath.join(place.guest, path.removeprefix(place.host).lstrip("/")))
        return None


def _leads_outside(path: str, table: _Table) -> str | None:
    """Where the links in ``path`` lead, if that is under no share. A path that cannot be followed to its end is
    taken to lie where it stopped: what is missing will be made there, and what is broken dockerd explains."""
    done = "/"
    todo = path.split("/")[::-1]
    links = 0
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            done = posixpath.dirname(done)
            continue
        here = posixpath.join(done, name)
        target = _link_target(table.on_host(here))
        if target is None:
            done = here
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        todo += target.split("/")[::-1]
        if target.startswith("/"):
            done = "/"
    return done if table.find(done) is None else None


def _link_target(host_path: str | None) -> str | None:
    if host_path is None:
        return None
    try:
        return os.readlink(host_path)
    except (OSError, ValueError):  # not a link, missing, not permitted; a NUL in the name
        return None


def _not_shared(path: str, table: _Table) -> str:
    if (name := table.elsewhere(path)) is not None:
        return _denied(f"{path} is {shlex.quote(name)} in the VM", "name it so")
    return _denied(f"{path} is not shared with the VM", _advice(path))


def _advice(path: str) -> str:
    """What to do to have ``path`` of the host in the VM. ``up`` adds the folder that it is called in."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return _how_to_share(path, "make and share it: mkdir -p {0} && cd {0} && agentctl up")
    if stat.S_ISSOCK(mode):
        return "it is a socket, which programs in the VM cannot reach on the host"
    folder = path if stat.S_ISDIR(mode) else posixpath.dirname(path)
    return _how_to_share(folder, "share it: cd {0} && agentctl up")


def _how_to_share(folder: str, advice: str) -> str:
    try:
        mounts.check([MountSpec(folder, folder)])
    except UserError:
        return "the VM has something of its own there; copy it to a folder that is shared"
    return advice.format(shlex.quote(folder))


def _denied(what: str, advice: str) -> str:
    return kind.called(hints.addressed(f"mounts denied: {what}; {advice}"))


def _clean(path: str) -> str:
    """Without ``.``, ``..`` and repeated slashes, by name alone, as dockerd does (Go's path.Clean)."""
    return "/" + posixpath.normpath(path).lstrip("/")
