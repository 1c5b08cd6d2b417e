"""Who in the guest answers at one end of the host, of all that map to it. Pure.

The law: a listener comes before a static rule for which nobody listens, the one of an earlier rule before that of a
later one, then who has the same port in the guest, then the address that is best to dial. Who comes first answers;
others that share its port in the guest stand in for it. However many a guest makes up, a question costs the same.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, insort
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple

from host_agent.rules import HostAddress, HostEnd, Static
from protocol.api import Listener

# Looked at for one connection. More than a few share a port in the guest only where somebody makes them up, under one
# name of a unit after the other.
MAX_LOOKED_AT = 64


class _Place(NamedTuple):
    """Where somebody stands in the row; the first words decide."""

    rank: int
    moved: bool
    how: int
    address: str
    port: int
    listener: Listener | None = None


class GuestEnds:
    """Those of ``host``. ``rank`` is the place of the rule that says so, as a ``Forwarding`` has it."""

    def __init__(self, host: HostEnd) -> None:
        self._port = host.port if isinstance(host, HostAddress) else 0
        self._listeners: list[_Place] = []
        self._statics: list[_Place] = []

    def __bool__(self) -> bool:
        return bool(self._listeners or self._statics)

    @property
    def listened(self) -> bool:
        """Whether somebody listens, and not only a static rule asks for it."""
        return bool(self._listeners)

    @property
    def rank(self) -> int:
        """The best of all ranks. Raises ``ValueError`` if there is nobody."""
        return min(places[0].rank for places in (self._listeners, self._statics) if places)

    @property
    def port(self) -> int:
        """Who answers, by its port in the guest. Raises ``IndexError`` if nobody listens."""
        return self._listeners[0].port

    def join(self, listener: Listener, rank: int) -> None:
        """A listener that has a numeric address, and is not there yet."""
        insort(self._listeners, self._place(rank, listener.address, listener.port, listener))

    def leave(self, listener: Listener, rank: int) -> None:
        """The rank is the one with which it came."""
        place = self._place(rank, listener.address, listener.port, listener)
        del self._listeners[bisect_left(self._listeners, place)]

    def add(self, static: Static) -> None:
        """A static rule."""
        insort(self._statics, self._place(static.rank, static.guest_address, static.guest_port))

    def forget_statics(self) -> None:
        """All of the static rules."""
        self._statics.clear()

    def targets(self) -> tuple[tuple[str, int], ...]:
        """The address and port to dial in the guest, best first; all of one port, since another is another program."""
        best: dict[tuple[str, int], None] = {}
        for place in islice(chain(self._listeners, self._statics), MAX_LOOKED_AT):
            best.setdefault((place.address, place.port))
        answering = next((port for _, port in best), 0)
        return tuple((address, port) for address, port in best if port == answering)

    def _place(self, rank: int, address: str, port: int, listener: Listener | None = None) -> _Place:
        return _Place(rank, port != self._port, *_dialled(address), port, listener)


@lru_cache(maxsize=1024)
def _dialled(address: str) -> tuple[int, str]:
    """How good a bound address is to dial (less is better), and what to dial for it.

    A wildcard is reached through its family's loopback; IPv4 first, since a listener on ``::`` may or may
    not take IPv4 while one on ``0.0.0.0`` certainly does. Anything else is reached as itself.
    """
    ip = ipaddress.ip_address(address)
    loopback = "127.0.0.1" if ip.version == 4 else "::1"
    if ip.is_unspecified or str(ip) == loopback:
        return (0 if ip.version == 4 else 1), loopback
    return (2 if ip.is_loopback else 3), address
