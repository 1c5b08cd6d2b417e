"""The user's SSH agent in the VM: where it is on this side, and where it appears on the other.

The law: no key leaves this machine, only requests to sign come to it. The VM is led to a link in the instance's folder
and the link to the agent of the newest login, since each login may have one of its own; who follows it is the host
agent, at each connection.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from protocol.api import SocketForward

VARIABLE = "SSH_AUTH_SOCK"

#: Where Docker Desktop has it, so that what was written for that (compose files, mostly) finds it.
GUEST_SOCKET = "/run/host-services/ssh-auth.sock"

#: What the link leads to while there is none.
NOWHERE = "no-ssh-agent"


def forward(link: Path) -> SocketForward:
    """The socket of the guest that leads there."""
    return SocketForward(GUEST_SOCKET, str(link), reverse=True)


def follow(link: Path, environment: Mapping[str, str]) -> str:
    """Lead ``link`` to the agent of ``environment``, if that has one. Returns a warning, or "".

    Raises ``OSError`` if it cannot be made.
    """
    found = environment.get(VARIABLE, "")
    if os.path.isabs(found) and _unfollowed(found) != _unfollowed(link):
        _point(link, found)
        return ""
    if os.path.exists(link):
        return ""  # that of an earlier login
    _point(link, NOWHERE)
    return f"your SSH agent is to be in the VM, and there is none: {VARIABLE} is not set"


def follow_if_wanted(link: Path, environment: Mapping[str, str]) -> None:
    """``follow``, where ``up`` has found that it is wanted; whatever goes wrong is no matter of who calls."""
    if os.path.islink(link):
        with contextlib.suppress(OSError):
            follow(link, environment)


def forget(link: Path) -> None:
    """It is not wanted, or no longer."""
    link.unlink(missing_ok=True)


def _unfollowed(path: str | Path) -> str:
    """Where ``path`` itself is, whatever it leads to."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _point(link: Path, target: str) -> None:
    """Replace ``link``; who follows it at any moment finds the old end or the new."""
    if os.path.islink(link) and os.readlink(link) == target:
        return
    staged = link.with_name(f".{link.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    staged.replace(link)
