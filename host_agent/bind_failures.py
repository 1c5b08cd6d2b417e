"""What it means that an end on the host could not be bound, in the user's words, and when to try again. Pure."""

from __future__ import annotations

import errno
import os

from host_agent.rules import FIRST_UNPRIVILEGED, HostAddress, HostEnd, HostSocket
from protocol.api import ForwardState

# A taken port is usually a server the user is just stopping: look soon, then every few seconds.
CONFLICT_RETRY = (1.0, 2.0, 4.0, 5.0)
# A privilege appears when an administrator changes a sysctl: rare, but then it should just work.
DENIED_RETRY = 30.0
# Out of descriptors or memory: a condition of the host that passes.
EXHAUSTED_RETRY = 5.0


def verdict(
    host: HostEnd, error: int, failures: int, owner: str, by_itself: bool
) -> tuple[ForwardState, str, float]:
    """The state, the reason for the user and the delay (seconds) that a failed bind means.

    ``by_itself``: no rule of the user's says where it is.
    """
    if error == errno.EADDRINUSE:
        delay = CONFLICT_RETRY[min(failures, len(CONFLICT_RETRY) - 1)]
        reason = f"{_name(host)} is in use on the host" + (f" by {owner}" if owner else "")
        if isinstance(host, HostSocket) and owner:
            reason = owner
        return ForwardState.CONFLICT, f"{reason}; it is taken as soon as it is free", delay
    if error in (errno.EACCES, errno.EPERM):
        return ForwardState.DENIED, _denied(host, by_itself), DENIED_RETRY
    if error == errno.EADDRNOTAVAIL and isinstance(host, HostAddress):
        reason = f"{host.address} is no address of this machine now; it is taken as soon as it is"
        return ForwardState.PENDING, reason, EXHAUSTED_RETRY
    return ForwardState.PENDING, f"{os.strerror(error)}; trying again", EXHAUSTED_RETRY


def _name(host: HostEnd) -> str:
    return f"port {host.port}" if isinstance(host, HostAddress) else host.path


def _denied(host: HostEnd, by_itself: bool) -> str:
    if isinstance(host, HostSocket) or host.port >= FIRST_UNPRIVILEGED:
        return f"this host does not allow {_name(host)}"
    elsewhere = (
        "or to have such ports elsewhere: agentctl up --privileged-offset 10000"
        if by_itself
        else f"or name a port from {FIRST_UNPRIVILEGED} on in the rule"
    )
    return (
        f"port {host.port} needs a privilege on this host; to allow it: "
        f"sudo sysctl net.ipv4.ip_unprivileged_port_start={host.port}; {elsewhere}"
    )
