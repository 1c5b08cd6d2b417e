"""The table of forwards: what listens in the guest, and what the host opened for it.

Sans-IO: news comes in by method calls, what to do about it comes out as a list of effects, and time is an
argument (seconds of any monotonic clock). Its laws:

- A host port (or unix socket) is open while at least one listener of the guest maps to it, and is shared by all of
  them; or while a static rule of the user's asks for it.
- A port of all addresses and the same of one address exclude each other: who has the earlier rule is there, or who
  has all addresses. So it does not depend on who came first.
- Effects are carried out in order, and each ``OpenPort`` is answered by ``bound`` or ``bind_failed`` before
  anything else is told to the table. So a state is never a promise: ``LISTENING`` is said after the bind.
- A lost link closes nothing: connections wait or are reset by whoever dials. The next full snapshot is
  reconciled with what is open, without closing and reopening what both have.
- The guest is not trusted with the host's memory or descriptors: both are bounded by named limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from host_agent.bind_failures import verdict
from host_agent.guest_ends import GuestEnds
from host_agent.rules import (
    EVERYWHERE,
    MAX_RULES,
    Decision,
    Forwarding,
    HostAddress,
    HostEnd,
    HostSocket,
    Ignored,
    Static,
    decide,
)
from protocol.api import DialTcp, DialUdp, Forward, ForwardState, Listener, Listeners, Proto

# Two sockets each (IPv4, IPv6). 8,192 descriptors leave half of the smallest usual hard limit, 16,384, to the
# connections; a machine with thousands of published ports has not been seen outside of tests.
MAX_FORWARDS = 4096
# Every port on one address; a row costs 0.7 KB and, with words of MAX_WORD, 1.4 KB (measured), so a lying guest
# gets 92 MB and no more.
MAX_LISTENERS = 65536
# Bytes of an address or a unit's name: systemd's longest has 255 characters, all ASCII (systemd.unit(5)). Others
# are kept as escapes, since one wide character makes Python take four bytes for each of its neighbours.
MAX_WORD = 256
# A snapshot may come in pieces and only its first is marked. What the earlier session had and the new one has
# not named after this long is gone. Pieces follow each other at once; 1 s is for a slow emulated guest.
SETTLE = 1.0
# What a row says of a static rule for which nothing listens in the guest so far.
NOBODY_YET = "nothing in the VM listens there yet"


@dataclass(frozen=True, slots=True)
class OpenPort:
    """Listen at ``host``, with all sockets that this means or none, and report the outcome at once."""

    host: HostEnd


@dataclass(frozen=True, slots=True)
class ClosePort:
    """Stop listening at ``host``; connections that are established live on."""

    host: HostEnd


@dataclass(frozen=True, slots=True)
class Change:
    """News for the user, already true.

    ``kind`` is a stable name: ``port-listening``, ``port-conflict``, ``port-denied``, ``port-pending``,
    ``port-closed``, or ``port-limit``, which is about no port in particular (``host`` is None).
    """

    kind: str
    message: str
    host: HostEnd | None = None
    reason: str = ""


Effect = OpenPort | ClosePort | Change


@dataclass(slots=True)
class _HostPort:
    """A port of the host that some listener maps to, or some static rule."""

    guests: GuestEnds
    rival: HostEnd | None = None
    """What is there instead, so that this is not to be open."""
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
        self._statics: set[Static] = set()
        self._ports: dict[HostEnd, _HostPort] = {}
        # The ends of one port, on whatever addresses.
        self._addresses: dict[tuple[Proto, int], dict[HostAddress, None]] = {}
        # The ports nobody has been asked to open yet; oldest first, and for long only beyond the limit.
        self._waiting: dict[HostEnd, None] = {}
        self._synchronized = False
        self._unconfirmed: set[Listener] = set()
        self._settle_at: float | None = None
        self._touched: dict[HostEnd, None] = {}
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

    # --- news from the user ----------------------------------------------------------------------

    def change_rules(self, decide: Callable[[Listener], Decision], statics: Iterable[Static]) -> list[Effect]:
        """Decide anew about every listener. What is open and stays where it is is not touched."""
        self._decide = decide
        for listener, before in tuple(self._listeners.items()):
            decision = decide(listener)
            if (decision, _rank(decision)) != (before, _rank(before)):
                self._leave(before, listener)
                self._listeners[listener] = decision
                self._join(decision, listener)
        for static in self._statics:
            self._ports[static.host].guests.forget_statics()
            self._touched[static.host] = None
        self._statics = set(statics)
        for static in sorted(self._statics, key=str):
            self._entry(static.host).guests.add(static)
        return self._reconcile()

    # --- the outcome of an OpenPort --------------------------------------------------------------

    def bound(self, host: HostEnd) -> list[Effect]:
        """``host`` is listening now."""
        return self._enter(host, ForwardState.LISTENING, "")

    def bind_failed(self, host: HostEnd, error: int, now: float, owner: str = "") -> list[Effect]:
        """``host`` could not be bound, for the reason ``error`` (an ``errno``). It will be tried again.

        ``owner``: who has it, in some words, where that is known; of a socket, what is in the way.
        """
        entry = self._ports[host]
        by_itself = entry.guests.rank > MAX_RULES
        state, reason, delay = verdict(host, error, entry.failures, owner, by_itself)
        entry.failures += 1
        entry.retry_at = now + delay
        return self._enter(host, state, reason)

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
        for host, entry in self._ports.items():
            if entry.retry_at is not None and entry.retry_at <= now:
                entry.retry_at = None
                effects.append(OpenPort(host))
        return effects

    # --- questions -------------------------------------------------------------------------------

    def udp_targets(self, host: HostEnd) -> tuple[DialUdp, ...]:
        """``targets`` for datagrams."""
        return tuple(DialUdp(address, port) for address, port in self._guest_ends(host))

    def targets(self, host: HostEnd) -> tuple[DialTcp, ...]:
        """What to dial in the guest for a connection to ``host``: the best first, and none of another port than that.

        There is more than one when several listeners share the port (``guest_ends``). The next is for when one has
        just died (Docker's IPv4 and IPv6 proxies close up to 2 s apart). Empty: nobody is left.
        """
        return tuple(DialTcp(address, port) for address, port in self._guest_ends(host))

    def rows(self) -> list[Forward]:
        """Every known listener with what became of it, and what is static; ordered by guest port and address."""
        rows = [self._row(listener, decision) for listener, decision in self._listeners.items()]
        rows += [
            self._static_row(static)
            for static in self._statics
            if not self._ports[static.host].guests.listened
        ]
        return sorted(rows, key=lambda row: (row.guest_port, row.proto, row.guest_address))

    # --- inside ----------------------------------------------------------------------------------

    def _guest_ends(self, host: HostEnd) -> tuple[tuple[str, int], ...]:
        entry = self._ports.get(host)
        return () if entry is None else entry.guests.targets()

    def _add(self, listener: Listener) -> None:
        if listener in self._listeners:
            return
        if len(self._listeners) >= MAX_LISTENERS:
            self._dropped += 1
            return
        decision = self._listeners[listener] = self._decide(listener)
        self._join(decision, listener)

    def _remove(self, listener: Listener) -> None:
        if (decision := self._listeners.pop(listener, None)) is not None:
            self._leave(decision, listener)

    def _join(self, decision: Decision, listener: Listener) -> None:
        if isinstance(decision, Forwarding):
            self._entry(decision.host).guests.join(listener, decision.rank)

    def _leave(self, decision: Decision, listener: Listener) -> None:
        if isinstance(decision, Forwarding):
            self._ports[decision.host].guests.leave(listener, decision.rank)
            self._touched[decision.host] = None

    def _entry(self, host: HostEnd) -> _HostPort:
        """The entry of ``host``, of which something changes; a new one waits to be opened."""
        self._touched[host] = None
        if host not in self._ports:
            self._ports[host] = _HostPort(GuestEnds(host))
            self._waiting[host] = None
            if isinstance(host, HostAddress):
                self._addresses.setdefault((host.proto, host.port), {})[host] = None
        return self._ports[host]

    def _reconcile(self) -> list[Effect]:
        """Make the open ports what the listeners ask for, once all of a notice has been taken in.

        So a server that moves within one notice (127.0.0.1 to 0.0.0.0) keeps its host port, and one that
        came and went never had it. Ports are closed first: their places are for those that wait.
        """
        effects: list[Effect] = []
        for host in self._touched:
            if not self._ports[host].guests:
                effects += self._drop(host)
        places = [(host.proto, host.port) for host in self._touched if isinstance(host, HostAddress)]
        for place in dict.fromkeys(places):
            effects += self._exclude(place)
        self._touched.clear()
        while self._waiting and len(self._ports) - len(self._waiting) < self._max_forwards:
            host = next(iter(self._waiting))
            del self._waiting[host]
            effects.append(OpenPort(host))
        return effects + self._report_limits()

    def _exclude(self, place: tuple[Proto, int]) -> list[Effect]:
        """Decide between all addresses and single ones, of one port."""
        everywhere = HostAddress(place[0], EVERYWHERE, place[1])
        ends = list(self._addresses.get(place, ()))
        rivals: dict[HostAddress, HostAddress] = {}
        if everywhere in ends and len(ends) > 1:
            single = min((self._ports[end].guests.rank, end) for end in ends if end != everywhere)
            if self._ports[everywhere].guests.rank <= single[0]:
                rivals = dict.fromkeys((end for end in ends if end != everywhere), everywhere)
            else:
                rivals = {everywhere: single[1]}
        return [effect for end in ends for effect in self._yield(end, rivals.get(end))]

    def _yield(self, host: HostAddress, rival: HostEnd | None) -> list[Effect]:
        """Have ``host`` closed while there is a ``rival``."""
        entry = self._ports[host]
        before, entry.rival = entry.rival, rival
        if rival is None:
            if before is not None:
                entry.state, entry.reason, entry.failures = ForwardState.PENDING, "", 0
                self._waiting[host] = None
            return []
        effects: list[Effect] = [ClosePort(host)] if entry.state is ForwardState.LISTENING else []
        self._waiting.pop(host, None)
        entry.retry_at = None
        return effects + self._enter(host, ForwardState.CONFLICT, f"{rival} of this VM comes first")

    def _drop(self, host: HostEnd) -> list[Effect]:
        entry = self._ports.pop(host)
        if isinstance(host, HostAddress):
            ends = self._addresses[host.proto, host.port]
            del ends[host]
            if not ends:
                del self._addresses[host.proto, host.port]
        if host in self._waiting:
            del self._waiting[host]
            return []
        if entry.state is ForwardState.LISTENING:
            message = f"{host} is closed: nothing in the VM asks for it any more"
            return [ClosePort(host), Change("port-closed", message, host)]
        return [Change("port-closed", f"nothing in the VM asks for {host} any more", host)]

    def _report_limits(self) -> list[Effect]:
        """Say that a limit is exceeded when that begins, not for each of thousands of listeners."""
        if not (exceeded := bool(self._waiting or self._dropped)):
            self._limit_reported = False
        if not exceeded or self._limit_reported:
            return []
        self._limit_reported = True
        return [Change("port-limit", f"the VM listens on too many ports: {self._max_forwards} are forwarded")]

    def _enter(self, host: HostEnd, state: ForwardState, reason: str) -> list[Effect]:
        """Move to ``state``; a retry that ends as the last one did is no news."""
        entry = self._ports[host]
        if entry.state is state and entry.reason == reason:
            return []
        entry.state, entry.reason = state, reason
        message = f"{host} is not forwarded: {reason}" if reason else f"{host} is forwarded to the VM"
        return [Change(f"port-{state}", message, host, reason)]

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
        placed = self._placed(row, decision.host)
        answering = self._ports[decision.host].guests.port
        if placed.state is ForwardState.LISTENING and answering != listener.port:
            return replace(placed, reason=f"port {answering} of the VM is there, too, and answers")
        return placed

    def _static_row(self, static: Static) -> Forward:
        row = Forward(
            proto=static.proto,
            guest_address=static.guest_address,
            guest_port=static.guest_port,
            host_address="",
            host_port=0,
            state=ForwardState.IGNORED,
        )
        placed = self._placed(row, static.host)
        return placed if placed.reason else replace(placed, reason=NOBODY_YET)

    def _placed(self, row: Forward, host: HostEnd) -> Forward:
        """``row`` with where it is on the host, and how that is."""
        entry = self._ports[host]
        row = replace(row, state=entry.state, reason=entry.reason)
        if host in self._waiting:
            row = replace(row, reason=f"the limit of {self._max_forwards} forwards is reached")
        if isinstance(host, HostSocket):
            return replace(row, host_address=host.path)
        return replace(row, host_address=host.address, host_port=host.port)


def _clipped(listener: Listener) -> Listener:
    """``listener`` as it is kept: its words in at most ``MAX_WORD`` bytes of ASCII, cut where they are longer.

    The same words are cut the same way each time, so what was added is what is removed.
    """
    address, unit = clipped(listener.address), clipped(listener.unit)
    if address is listener.address and unit is listener.unit:
        return listener
    return replace(listener, address=address, unit=unit)


def clipped(word: str) -> str:
    """``word``, which is the guest's, as it is kept."""
    if len(word) <= MAX_WORD and word.isascii():
        return word
    return word[:MAX_WORD].encode("ascii", "backslashreplace")[:MAX_WORD].decode("ascii")


def _rank(decision: Decision) -> int:
    return decision.rank if isinstance(decision, Forwarding) else 0
