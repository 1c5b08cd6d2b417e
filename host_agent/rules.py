"""Which listeners of the guest appear on the host, and where.

The law: rules are an ordered list and the first that has an opinion wins; the last one of a complete
list has one about everything. A rule is a pure function of the listener: no clock, no memory, so that the
same listener is always decided alike and a decision may be asked for again at any time.

What the guest reports is input from outside: an address or a port that makes no sense is ignored with
a reason like anything else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from protocol.api import Listener, Proto


@dataclass(frozen=True, slots=True)
class Forwarding:
    """The listener answers on ``host_port`` of the host's localhost (127.0.0.1 and ::1)."""

    host_port: int


@dataclass(frozen=True, slots=True)
class Ignored:
    """The listener stays inside the guest; ``reason`` completes "ignored: ..."."""

    reason: str


Decision = Forwarding | Ignored


class Rule(Protocol):
    """One line of the list."""

    def decide(self, listener: Listener) -> Decision | None:
        """What becomes of ``listener``; None leaves it to the next rule."""


@dataclass(frozen=True, slots=True)
class IgnoreInvalid:
    """Refuse what cannot be dialled: a port outside 1-65535, an address that is not numeric."""

    def decide(self, listener: Listener) -> Decision | None:
        if not 1 <= listener.port <= 65535:
            return Ignored("not a valid port")
        try:
            ipaddress.ip_address(listener.address)
        except ValueError:
            return Ignored("not a numeric address")
        return None


@dataclass(frozen=True, slots=True)
class IgnoreProto:
    """Leave one transport protocol alone."""

    proto: Proto
    reason: str

    def decide(self, listener: Listener) -> Decision | None:
        return Ignored(self.reason) if listener.proto is self.proto else None


@dataclass(frozen=True, slots=True)
class IgnoreUnits:
    """Leave alone what belongs to certain systemd units, given as shell patterns."""

    patterns: tuple[str, ...]
    reason: str

    def decide(self, listener: Listener) -> Decision | None:
        if any(fnmatchcase(listener.unit, pattern) for pattern in self.patterns):
            return Ignored(self.reason)
        return None


@dataclass(frozen=True, slots=True)
class ForwardSamePort:
    """Whatever address it is bound to, to the same port of the host's localhost; of some units or of all."""

    patterns: tuple[str, ...] = ("*",)

    def decide(self, listener: Listener) -> Decision | None:
        if any(fnmatchcase(listener.unit, pattern) for pattern in self.patterns):
            return Forwarding(listener.port)
        return None


# The VM's own daemons, by the unit that systemd runs them in. Containers are not among them: a published
# port belongs to docker.service (its proxy), a container on the host network to a docker-*.scope.
DEFAULT_RULES: tuple[Rule, ...] = (
    IgnoreInvalid(),
    IgnoreProto(Proto.UDP, "UDP is not forwarded"),
    IgnoreUnits(("ssh.service", "ssh.socket", "ssh@*.service", "sshd.service"), "the VM's own SSH server"),
    IgnoreUnits(("containerd.service",), "the VM's own container runtime"),
    IgnoreUnits(("systemd-resolved.service",), "the VM's own DNS resolver"),
    IgnoreUnits(("systemd-*.service", "systemd-*.socket"), "a daemon of the VM itself"),
    # The agent listens on nothing itself; what `agentctl exec` and `agentctl shell` start runs in its unit.
    ForwardSamePort(("agentctl-agent.service",)),
    IgnoreUnits(("agentctl-*.service", "agentctl-*.socket"), "agentctl's own daemon"),
    ForwardSamePort(),
)


def decide(listener: Listener, rules: Sequence[Rule] = DEFAULT_RULES) -> Decision:
    """What the first rule with an opinion says; a listener that no rule mentions is ignored."""
    for rule in rules:
        decision = rule.decide(listener)
        if decision is not None:
            return decision
    return Ignored("no rule matches")
