"""Descriptors that outlive this process: systemd's file descriptor store.

The law: what is stored carries in its name all that a successor must know to go on with it; the store
itself remembers nothing else. systemd drops a descriptor by itself when it polls as broken, which
/dev/fuse does once it is unmounted or aborted.

Sources: sd_notify(3) (FDSTORE, FDSTOREREMOVE, FDNAME), sd_listen_fds(3), systemd.service(5) FileDescriptorStoreMax.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

MAX_NAME = 255
"""systemd's limit of a descriptor's name (FDNAME_MAX), which is printable ASCII without a colon."""

_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def notify(state: str, fds: Sequence[int] = ()) -> bool:
    """Tell the service manager ``state``, with copies of ``fds``; False if there is none or it does not hear.

    Never waits for long: a manager that does not read fills a queue of datagrams first.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        try:
            manager.connect("\0" + address[1:] if address[0] == "@" else address)
            socket.send_fds(manager, [state.encode()], list(fds))
        except OSError as error:
            log.warning("systemd.notify state=%r error=%s", state, error)
            return False
    return True


def store(fd: int, name: str) -> bool:
    """Have the manager keep a copy of ``fd``. False if nobody took it."""
    return notify(f"FDSTORE=1\nFDNAME={_checked(name)}", [fd])


def remove(name: str) -> bool:
    """Have the manager close what it keeps under ``name``."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}")


def _checked(name: str) -> str:
    if not name or len(name) > MAX_NAME or not re.fullmatch(r"[ -9;-~]+", name):
        raise ValueError(f"{name!r} cannot be the name of a stored descriptor")
    return name


@dataclass(frozen=True, slots=True)
class StoredDescriptor:
    """A descriptor that the manager gave back. Whoever takes it owns it."""

    name: str
    fd: int


def take() -> list[StoredDescriptor]:
    """What the manager passed to this process; the second time nothing. Children inherit none of it."""
    pid, count, names, _ = [os.environ.pop(variable, "") for variable in _LISTEN_VARIABLES]
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    named = names.split(":") if names else []
    named += ["unknown"] * (len(fds) - len(named))
    return [StoredDescriptor(name, fd) for name, fd in zip(named, fds, strict=False)]


_CONNECTION = "agentctl-files"


@dataclass(frozen=True, slots=True)
class StoredConnection:
    """What the name of a stored /dev/fuse says.

    ``device`` is the minor number of the mount's superblock: it tells which mount of mountinfo this is, and
    that it is one that was unmounted lazily and is still in use if there is none. ``minor`` and ``flags`` are
    what was negotiated with the kernel in INIT; both 0 before that.
    """

    share: int
    device: int
    minor: int = 0
    flags: int = 0
    host_locks: bool = False

    def name(self) -> str:
        locks = ",locks" if self.host_locks else ""
        numbers = f"share={self.share},device={self.device},minor={self.minor},flags={self.flags:#x}"
        return f"{_CONNECTION},{numbers}{locks}"

    @classmethod
    def parse(cls, name: str) -> StoredConnection | None:
        """From a name; None for what is none of ours. Parts that a later version may add are skipped."""
        kind, *parts = name.split(",")
        fields = dict(part.split("=", 1) for part in parts if "=" in part)
        if kind != _CONNECTION:
            return None
        try:
            share, device, minor = (int(fields[key]) for key in ("share", "device", "minor"))
            return cls(share, device, minor, int(fields["flags"], 16), "locks" in parts)
        except (KeyError, ValueError):
            return None
