"""Which listeners of the guest appear on the host, and where.

The law: rules are an ordered list and the first that has an opinion wins; the last one of a complete
list has one about everything. A rule is a pure function of the listener: no clock, no memory, so that the
same listener is always decided alike and a decision may be asked for again at any time.

The user's rules (``PortRule``) mean what Lima's ``portForwards`` mean. The guest's SSH server is no matter for them.

What the guest reports is input from outside: an address or a port that makes no sense is ignored with
a reason like anything else.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Protocol

from protocol.api import Listener, PortRule, PortSettings, Proto

#: What a row shows as the host's address: one name for 127.0.0.1 and ::1, both of which are bound.
LOCALHOST = "localhost"
#: Every address of the host, IPv4 and IPv6.
EVERYWHERE = "0.0.0.0"

LAST_PORT = 65535
#: Below it a port needs a privilege, unless the host's administrator has changed that.
FIRST_UNPRIVILEGED = 1024
#: Where the guest's SSH server listens.
SSH_PORT = 22

#: The list is looked through for each listener, and goes over the instance's socket in one frame.
MAX_RULES = 256
#: Ports that one rule opens whether or not somebody listens: each takes two of the host's descriptors.
MAX_STATIC = 256
#: sockaddr_un.sun_path has 108 bytes including the final NUL (unix(7)); macOS has 104.
MAX_UNIX_PATH = 107

_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_LOOPBACKS = (ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1"))


@dataclass(frozen=True, slots=True, order=True)
class HostAddress:
    """A port of the host. ``address`` is ``LOCALHOST``, ``EVERYWHERE`` or a numeric one that is neither."""

    proto: Proto
    address: str
    port: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}" + ("" if self.proto is Proto.TCP else f"/{self.proto}")


@dataclass(frozen=True, slots=True, order=True)
class HostSocket:
    """A unix socket of the host, by its absolute path."""

    path: str

    def __str__(self) -> str:
        return self.path


HostEnd = HostAddress | HostSocket


@dataclass(frozen=True, slots=True)
class Forwarding:
    """The listener answers at ``host``; of several, who has the least ``rank``, the place of the rule that says so."""

    host: HostEnd
    rank: int = field(default=MAX_RULES + 1, compare=False)


@dataclass(frozen=True, slots=True)
class Ignored:
    """The listener stays inside the guest; ``reason`` completes "ignored: ..."."""

    reason: str


Decision = Forwarding | Ignored


@dataclass(frozen=True, slots=True, order=True)
class Static:
    """The host listens at ``host`` for what listens on the guest's port now or later; ``rank`` is ``Forwarding``'s."""

    host: HostEnd
    proto: Proto
    guest_address: str
    guest_port: int
    rank: int = field(default=1, compare=False)


class InvalidRule(ValueError):
    """A rule that cannot be; says which ``key`` of it is wrong, and why in a clause."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} {reason}")
        self.key = key


# --- the list, as it is applied --------------------------------------------------------------------


class Rule(Protocol):
    """One line of the list."""

    def decide(self, listener: Listener) -> Decision | None:
        """What becomes of ``listener``; None leaves it to the next rule."""


@dataclass(frozen=True, slots=True)
class IgnoreInvalid:
    """Refuse what cannot be dialled: a port outside 1-65535, an address that is not numeric."""

    def decide(self, listener: Listener) -> Decision | None:
        if not 1 <= listener.port <= LAST_PORT:
            return Ignored("not a valid port")
        try:
            ipaddress.ip_address(listener.address)
        except ValueError:
            return Ignored("not a numeric address")
        return None


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
class IgnorePort:
    """Leave alone what listens on one port, whoever it is."""

    port: int
    reason: str

    def decide(self, listener: Listener) -> Decision | None:
        is_it = listener.port == self.port and listener.proto is Proto.TCP
        return Ignored(self.reason) if is_it else None


@dataclass(frozen=True, slots=True)
class ForwardSamePort:
    """Whatever address it is bound to, to the same port of the host's localhost; of some units or of all.

    With ``lan``, who listens on all addresses does so on the host. ``offset`` is added to a privileged port.
    """

    patterns: tuple[str, ...] = ("*",)
    lan: bool = False
    offset: int = 0

    def decide(self, listener: Listener) -> Decision | None:
        if not any(fnmatchcase(listener.unit, pattern) for pattern in self.patterns):
            return None
        everywhere = self.lan and _numeric(listener.address).is_unspecified
        port = listener.port + (self.offset if listener.port < FIRST_UNPRIVILEGED else 0)
        return Forwarding(HostAddress(listener.proto, EVERYWHERE if everywhere else LOCALHOST, port))


@dataclass(frozen=True, slots=True)
class Configured:
    """A rule of the user's; ``number`` is its place in the list, from 1."""

    rule: PortRule
    number: int

    def decide(self, listener: Listener) -> Decision | None:
        rule = self.rule
        if rule.proto not in (None, listener.proto) or not 0 <= listener.port - rule.guest_port < rule.ports:
            return None
        if rule.host_socket and listener.proto is Proto.UDP:
            return None
        if not _matches(rule, _numeric(listener.address)):
            return None
        if rule.ignore:
            return Ignored(f"rule {self.number} says so")
        return Forwarding(host_end(rule, listener.proto, listener.port), self.number)


def _matches(rule: PortRule, bound: _IpAddress) -> bool:
    """Whether a rule is about a listener that is bound to this address."""
    wanted = _numeric(rule.guest_ip)
    if bound.is_unspecified:
        # It is reached through the rule's address, too; but is not ignored for the sake of that alone.
        return wanted.is_unspecified or not rule.ignore
    if wanted.is_unspecified:
        return not rule.guest_ip_must_be_zero
    return bound == wanted or (bound, wanted) == (_LOOPBACKS[1], _LOOPBACKS[0])


def host_end(rule: PortRule, proto: Proto, guest_port: int) -> HostEnd:
    """Where ``guest_port`` appears by ``rule``."""
    if rule.host_socket:
        return HostSocket(rule.host_socket)
    return HostAddress(proto, host_address(rule.host_ip), rule.host_port + guest_port - rule.guest_port)


# The VM's own daemons, by the unit that systemd runs them in. Containers are not among them: a published
# port belongs to docker.service (its proxy), a container on the host network to a docker-*.scope.
_BEFORE: tuple[Rule, ...] = (
    IgnoreInvalid(),
    IgnoreUnits(("ssh.service", "ssh.socket", "ssh@*.service", "sshd.service"), "the VM's own SSH server"),
)
_DAEMONS: tuple[Rule, ...] = (
    IgnoreUnits(("containerd.service",), "the VM's own container runtime"),
    IgnoreUnits(("systemd-resolved.service",), "the VM's own DNS resolver"),
    IgnoreUnits(("systemd-*.service", "systemd-*.socket"), "a daemon of the VM itself"),
)
_AGENTS: Rule = IgnoreUnits(("agentctl-*.service", "agentctl-*.socket"), "agentctl's own daemon")


def complete(settings: PortSettings, more: Sequence[Rule] = ()) -> tuple[Rule, ...]:
    """The whole list for these settings, which ``check_settings`` has nothing against; ``more`` come after the
    user's."""
    configured = [Configured(rule, number) for number, rule in enumerate(settings.rules, 1)]
    # The agent listens on nothing itself; what `agentctl exec` and `agentctl shell` start runs in its unit.
    own = ForwardSamePort(("agentctl-agent.service",), settings.lan, settings.privileged_offset)
    everybody = ForwardSamePort(lan=settings.lan, offset=settings.privileged_offset)
    return (*_BEFORE, *configured, *more, *_DAEMONS, own, _AGENTS, everybody)


DEFAULT_RULES = complete(PortSettings())


def decide(listener: Listener, rules: Sequence[Rule] = DEFAULT_RULES) -> Decision:
    """What the first rule with an opinion says; a listener that no rule mentions is ignored."""
    for rule in rules:
        decision = rule.decide(listener)
        if decision is not None:
            return decision
    return Ignored("no rule matches")


def statics(settings: PortSettings) -> Iterator[Static]:
    """What is to be open whether or not somebody listens in the guest: where no rule before has another opinion."""
    listed = complete(settings)
    for number, rule in enumerate(settings.rules, 1):
        if rule.static:
            protos = (Proto.TCP,) if rule.host_socket else (rule.proto,) if rule.proto else tuple(Proto)
            for port in range(rule.guest_port, rule.guest_port + rule.ports):
                for proto in protos:
                    end = host_end(rule, proto, port)
                    if decide(Listener(proto, rule.guest_ip, port), listed) == Forwarding(end):
                        yield Static(end, proto, rule.guest_ip, port, number)


# --- what a rule may be ----------------------------------------------------------------------------


def host_address(text: str) -> str:
    """``text`` as a ``HostAddress`` has it: each name of localhost is one, and so is each of all addresses.

    Raises ``ValueError`` unless it is localhost or numeric.
    """
    if text == LOCALHOST:
        return text
    ip = _numeric(text)
    if ip in _LOOPBACKS:
        return LOCALHOST
    return EVERYWHERE if ip.is_unspecified else str(ip)


def check_settings(settings: PortSettings) -> None:
    """Raise ``ValueError`` with a clause that names the rule, or the setting, which cannot be."""
    if len(settings.rules) > MAX_RULES:
        raise ValueError(f"there are {len(settings.rules)} rules; {MAX_RULES} are possible")
    for number, rule in enumerate(settings.rules, 1):
        try:
            check(rule)
        except InvalidRule as error:
            raise ValueError(f"rule {number}: {error}") from None
    least, most = FIRST_UNPRIVILEGED - 1, LAST_PORT - FIRST_UNPRIVILEGED + 1
    if settings.privileged_offset and not least <= settings.privileged_offset <= most:
        raise ValueError(
            f"the privileged offset is {settings.privileged_offset}; it can be 0 (none) or {least} to {most}"
        )


def check(rule: PortRule) -> None:
    """Raise ``InvalidRule`` for a rule that cannot be."""
    _check_guest(rule)
    if rule.ignore:
        _check_ignored(rule)
    elif rule.host_socket:
        _check_socket(rule)
    else:
        _check_host(rule)
    if rule.static:
        _check_static(rule)


def _check_guest(rule: PortRule) -> None:
    try:
        wanted = _numeric(rule.guest_ip)
    except ValueError:
        raise InvalidRule("guest_ip", f"is {rule.guest_ip!r}, which is not a numeric address") from None
    if rule.guest_ip_must_be_zero and not wanted.is_unspecified:
        raise InvalidRule("guest_ip_must_be_zero", f"is true, and guest_ip is {rule.guest_ip}")
    _check_range("guest_port", rule.guest_port, rule.ports)


def _check_ignored(rule: PortRule) -> None:
    if rule.static:
        raise InvalidRule("static", "and ignore are both true: nothing would listen")
    if rule.host_socket:
        raise InvalidRule("host_socket", "is given for ports that are ignored")


def _check_socket(rule: PortRule) -> None:
    path = rule.host_socket
    if not os.path.isabs(path) or not path.isprintable() or path == "/":
        raise InvalidRule("host_socket", f"is {path!r}, which is not an absolute path")
    if (plain := os.path.normpath(path)) != path:  # two ways to write it would be two sockets at one place
        raise InvalidRule("host_socket", f"is {path!r}; write it as {plain}")
    if (length := len(os.fsencode(path))) > MAX_UNIX_PATH:
        raise InvalidRule("host_socket", f"has {length} bytes, of which the system allows {MAX_UNIX_PATH}")
    if rule.ports != 1:
        raise InvalidRule("host_socket", f"is one for {rule.ports} ports of the guest; name one guest_port")
    if rule.proto is Proto.UDP:
        raise InvalidRule("host_socket", "is a stream, and UDP is not")


def _check_host(rule: PortRule) -> None:
    try:
        host_address(rule.host_ip)
    except ValueError:
        raise InvalidRule(
            "host_ip", f"is {rule.host_ip!r}, which is neither {LOCALHOST} nor a numeric address"
        ) from None
    _check_range("host_port", rule.host_port, rule.ports)


def _check_static(rule: PortRule) -> None:
    if rule.ports > MAX_STATIC:
        raise InvalidRule("static", f"is for {rule.ports} ports; {MAX_STATIC} are possible in a rule")
    if rule.proto is not Proto.UDP and 0 <= SSH_PORT - rule.guest_port < rule.ports:
        raise InvalidRule(
            "guest_port", f"has {SSH_PORT} in it, which is the VM's own SSH server and stays inside"
        )


def _check_range(key: str, first: int, ports: int) -> None:
    last = first + ports - 1
    if not 1 <= first <= last <= LAST_PORT:
        shown = str(first) if ports == 1 else f"{first}-{last}"
        raise InvalidRule(key, f"is {shown}; ports are 1-{LAST_PORT}")


@lru_cache(maxsize=1024)
def _numeric(text: str) -> _IpAddress:
    """An address as it is compared: an IPv4 one that is written as IPv6 is that IPv4 one."""
    ip = ipaddress.ip_address(text)
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
