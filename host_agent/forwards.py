"""The table of forwards: what listens in the guest, and what the host opened for it.

Sans-IO: news comes in by method calls, what to do about it comes out as a list of effects, and time is an
argument (seconds of any monotonic clock). Its laws:

- A host port is open while at least one listener of the guest maps to it, and is shared by all of them.
- Effects are carried out in order, and each ``OpenPort`` is answered by ``bound`` or ``bind_failed`` before
  anything else is told to the table. So a state is never a promise: ``LISTENING`` is said after the bind.
- A lost link closes nothing: connections wait or are reset by whoever dials. The next full snapshot is
  reconciled with what is open, without closing and reopening what both have.
- The guest is not trusted with the host's memory or descriptors: both are bounded by named limits.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from host_agent.rules import Decision, Forwarding, Ignored, decide
from protocol.api import DialTcp, Forward, ForwardState, Listener, Listeners

# Two sockets each (IPv4, IPv6). 8,192 descriptors leave half of the smallest usual hard limit, 16,384, to the
# connections; a machine with thousands of published ports has not been seen outside of tests.
MAX_FORWARDS = 4096
# Every port on one address; a row costs 0.5 KB and, with words of MAX_WORD, 1.2 KB (measured), so a lying guest
# gets 76 MB and no more.
MAX_LISTENERS = 65536
# Bytes of an address or a unit's name: systemd's longest has 255 characters, all ASCII (systemd.unit(5)). Others
# are kept as escapes, since one wide character makes Python take four bytes for each of its neighbours.
MAX_WORD = 256
# A taken port is usually a server the user is just stopping: look soon, then every few seconds.
CONFLICT_RETRY = (1.0, 2.0, 4.0, 5.0)
# A privilege appears when an administrator changes a sysctl: rare, but then it should just work.
DENIED_RETRY = 30.0
# Out of descriptors or memory: a condition of the host that passes.
EXHAUSTED_RETRY = 5.0
# A snapshot may come in pieces and only its first is marked. What the earlier session had and the new one has
# not named after this long is gone. Pieces follow each other at once; 1 s is for a slow emulated guest.
SETTLE = 1.0

# What a row shows as the host's address: one name for 127.0.0.1 and ::1, both of which are bound.
LOCALHOST = "localhost"


@dataclass(frozen=True, slots=True)
class OpenPort:
    """Bind ``port`` on localhost, both families or none, and report the outcome at once."""

    port: int


@dataclass(frozen=True, slots=True)
class ClosePort:
    """Stop listening on ``port``; connections that are established live on."""

    port: int


@dataclass(frozen=True, slots=True)
class Change:
    """News for the user, already true.

    ``kind`` is a stable name: ``port-listening``, ``port-conflict``, ``port-denied``, ``port-pending``,
    ``port-closed``, or ``port-limit``, which is about no port in particular (``port`` is 0).
    """

    kind: str
    message: str
    port: int = 0
    reason: str = ""


Effect = OpenPort | ClosePort | Change


@dataclass(slots=True)
class _HostPort:
    """A port of the host that some listener maps to."""

    guests: set[Listener] = field(default_factory=set)
    state: ForwardState = ForwardState.PENDING
    reason: str = ""
    failures: int = 0
    retry_at: float | None = None


class ForwardTable:
    """See the module's docstring. ``decide`` must be pure."""

    def __init__(
        self, decide: Callable[[Listener], Decision] = decide, *, max_forwards: int = MAX_FORWARDS
    ) -> None:
        self._decide = decide
        self._max_forwards = max_forwards
        self._listeners: dict[Listener, Decision] = {}
        self._ports: dict[int, _HostPort] = {}
        # The ports nobody has been asked to open yet; oldest first, and for long only beyond the limit.
        self._waiting: dict[int, None] = {}
        self._synchronized = False
        self._unconfirmed: set[Listener] = set()
        self._settle_at: float | None = None
        self._touched: dict[int, None] = {}
        self._dropped = 0
        self._limit_reported = False

    # --- news from the guest ---------------------------------------------------------------------

    def receive(self, notice: Listeners, now: float) -> list[Effect]:
        """Take in what the guest said. Changes that come before the session's snapshot are dropped."""
        if notice.full:
            self._synchronized = True
            self._dropped = 0
            self._unconfirmed = set(self._listeners)
            self._settle_at = now + SETTLE if self._unconfirmed else None
        if not self._synchronized:
            return []
        for listener in map(_clipped, notice.added):
            self._unconfirmed.discard(listener)
            self._add(listener)
        for listener in map(_clipped, notice.removed):
            self._remove(listener)
        return self._reconcile()

    def link_lost(self) -> None:
        """The guest is out of reach: keep everything, and believe no change until its next snapshot."""
        self._synchronized = False
        self._settle_at = None
        self._unconfirmed.clear()

    # --- the outcome of an OpenPort --------------------------------------------------------------

    def bound(self, port: int) -> list[Effect]:
        """``port`` is listening on localhost now."""
        return self._enter(port, ForwardState.LISTENING, "")

    def bind_failed(self, port: int, error: int, now: float) -> list[Effect]:
        """``port`` could not be bound, for the reason ``error`` (an ``errno``). It will be tried again."""
        entry = self._ports[port]
        state, reason, delay = _verdict(port, error, entry.failures)
        entry.failures += 1
        entry.retry_at = now + delay
        return self._enter(port, state, reason)

    # --- time ------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When ``expire`` should next be called; None while there is nothing to wait for."""
        times = [entry.retry_at for entry in self._ports.values() if entry.retry_at is not None]
        if self._settle_at is not None:
            times.append(self._settle_at)
        return min(times, default=None)

    def expire(self, now: float) -> list[Effect]:
        """Do what has become due: retries, and the end of a snapshot's settling time."""
        if self._settle_at is not None and self._settle_at <= now:
            self._settle_at = None
            for listener in self._unconfirmed:
                self._remove(listener)
            self._unconfirmed.clear()
        effects = self._reconcile()
        for port, entry in self._ports.items():
            if entry.retry_at is not None and entry.retry_at <= now:
                entry.retry_at = None
                effects.append(OpenPort(port))
        return effects

    # --- questions -------------------------------------------------------------------------------

    def targets(self, port: int) -> tuple[DialTcp, ...]:
        """What to dial in the guest for a connection to the host's ``port``: the best first.

        There is more than one when listeners on several addresses share the port; the next is for when a
        listener has just died (Docker's IPv4 and IPv6 proxies close up to 2 s apart). Empty: nobody is left.
        """
        entry = self._ports.get(port)
        if entry is None:
            return ()
        ranked = sorted((_dial_rank(guest.address), guest.port) for guest in entry.guests)
        return tuple(dict.fromkeys(DialTcp(address, guest_port) for (_, address), guest_port in ranked))

    def rows(self) -> list[Forward]:
        """Every known listener with what became of it, ordered by guest port and address."""
        rows = [self._row(listener, decision) for listener, decision in self._listeners.items()]
        return sorted(rows, key=lambda row: (row.guest_port, row.proto, row.guest_address))

    # --- inside ----------------------------------------------------------------------------------

    def _add(self, listener: Listener) -> None:
        if listener in self._listeners:
            return
        if len(self._listeners) >= MAX_LISTENERS:
            self._dropped += 1
            return
        decision = self._listeners[listener] = self._decide(listener)
        if isinstance(decision, Ignored):
            return
        if decision.host_port not in self._ports:
            self._ports[decision.host_port] = _HostPort()
            self._waiting[decision.host_port] = None
        self._ports[decision.host_port].guests.add(listener)

    def _remove(self, listener: Listener) -> None:
        decision = self._listeners.pop(listener, None)
        if isinstance(decision, Forwarding):
            self._ports[decision.host_port].guests.discard(listener)
            self._touched[decision.host_port] = None

    def _reconcile(self) -> list[Effect]:
        """Make the open ports what the listeners ask for, once all of a notice has been taken in.

        So a server that moves within one notice (127.0.0.1 to 0.0.0.0) keeps its host port, and one that
        came and went never had it. Ports are closed first: their places are for those that wait.
        """
        effects: list[Effect] = []
        for port in self._touched:
            if not self._ports[port].guests:
                effects += self._drop(port)
        self._touched.clear()
        while self._waiting and len(self._ports) - len(self._waiting) < self._max_forwards:
            port = next(iter(self._waiting))
            del self._waiting[port]
            effects.append(OpenPort(port))
        return effects + self._report_limits()

    def _drop(self, port: int) -> list[Effect]:
        entry = self._ports.pop(port)
        if port in self._waiting:
            del self._waiting[port]
            return []
        if entry.state is ForwardState.LISTENING:
            message = f"localhost:{port} is closed: nothing in the VM listens on it any more"
            return [ClosePort(port), Change("port-closed", message, port)]
        return [Change("port-closed", f"nothing in the VM asks for localhost:{port} any more", port)]

    def _report_limits(self) -> list[Effect]:
        """Say that a limit is exceeded when that begins, not for each of thousands of listeners."""
        if not (exceeded := bool(self._waiting or self._dropped)):
            self._limit_reported = False
        if not exceeded or self._limit_reported:
            return []
        self._limit_reported = True
        return [Change("port-limit", f"the VM listens on too many ports: {self._max_forwards} are forwarded")]

    def _enter(self, port: int, state: ForwardState, reason: str) -> list[Effect]:
        """Move to ``state``; a retry that ends as the last one did is no news."""
        entry = self._ports[port]
        if entry.state is state and entry.reason == reason:
            return []
        entry.state, entry.reason = state, reason
        message = f"localhost:{port} is forwarded to the VM"
        if reason:
            message = f"localhost:{port} is not forwarded: {reason}"
        return [Change(f"port-{state}", message, port, reason)]

    def _row(self, listener: Listener, decision: Decision) -> Forward:
        row = Forward(
            proto=listener.proto,
            guest_address=listener.address,
            guest_port=listener.port,
            host_address="",
            host_port=0,
            state=ForwardState.IGNORED,
            unit=listener.unit,
        )
        if isinstance(decision, Ignored):
            return replace(row, reason=decision.reason)
        if decision.host_port in self._waiting:
            return replace(row, reason=f"the limit of {self._max_forwards} forwards is reached")
        entry = self._ports[decision.host_port]
        return replace(
            row,
            host_address=LOCALHOST,
            host_port=decision.host_port,
            state=entry.state,
            reason=entry.reason,
        )


def _clipped(listener: Listener) -> Listener:
    """``listener`` as it is kept: its words in at most ``MAX_WORD`` bytes of ASCII, cut where they are longer.

    The same words are cut the same way each time, so what was added is what is removed.
    """
    address, unit = _ascii(listener.address), _ascii(listener.unit)
    if address is listener.address and unit is listener.unit:
        return listener
    return replace(listener, address=address, unit=unit)


def _ascii(word: str) -> str:
    if len(word) <= MAX_WORD and word.isascii():
        return word
    return word[:MAX_WORD].encode("ascii", "backslashreplace")[:MAX_WORD].decode("ascii")


def _verdict(port: int, error: int, failures: int) -> tuple[ForwardState, str, float]:
    """The state, the reason for the user and the delay (seconds) that a failed bind means."""
    if error == errno.EADDRINUSE:
        delay = CONFLICT_RETRY[min(failures, len(CONFLICT_RETRY) - 1)]
        reason = f"port {port} is in use on the host; it is taken as soon as it is free"
        return ForwardState.CONFLICT, reason, delay
    if error in (errno.EACCES, errno.EPERM):
        reason = (
            f"port {port} needs a privilege on this host; to allow it: "
            f"sudo sysctl net.ipv4.ip_unprivileged_port_start={port}"
        )
        return ForwardState.DENIED, reason, DENIED_RETRY
    return ForwardState.PENDING, f"{os.strerror(error)}; trying again", EXHAUSTED_RETRY


def _dial_rank(address: str) -> tuple[int, str]:
    """How good a bound address is to dial (less is better), and what to dial for it.

    A wildcard is reached through its family's loopback; IPv4 first, since a listener on ``::`` may or may
    not take IPv4 while one on ``0.0.0.0`` certainly does. Anything else is reached as itself.
    """
    ip = ipaddress.ip_address(address)
    loopback = "127.0.0.1" if ip.version == 4 else "::1"
    if ip.is_unspecified or str(ip) == loopback:
        return (0 if ip.version == 4 else 1), loopback
    return (2 if ip.is_loopback else 3), address
