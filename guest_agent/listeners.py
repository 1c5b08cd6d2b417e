"""From two pictures of what listens to the notices that lead from one to the other. Pure, sans-IO.

The law: the truth is a set. Whatever happened between two pictures, however often a port opened and
closed meanwhile, the peer needs only the difference; and a peer that knows nothing needs all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from protocol.api import Listener, Listeners, Proto

MAX_PER_NOTICE = 512
"""Listeners in one notice. A listener takes at most about 350 bytes on the wire (a unit name is at
most 255, an address 45), so a notice stays below 180 KiB; a header may have 256 KiB."""

MAX_UNIT = 255
"""systemd's own limit of a unit name, in characters (UNIT_NAME_MAX)."""

MAX_LISTENERS = 16_384
"""Listeners of one protocol that are reported at all, lowest ports first. A guest that opens more costs itself the
highest of them, but neither side its memory. Ten thousand is the most that was ever asked for."""

Snapshot = frozenset[Listener]
Protos = frozenset[Proto]

ALL_PROTOS: Protos = frozenset(Proto)


def bounded(snapshot: Snapshot) -> Snapshot:
    """``snapshot`` itself, or the part of it with the lowest ports if it is beyond ``MAX_LISTENERS``."""
    if len(snapshot) <= MAX_LISTENERS:
        return snapshot
    return frozenset(sorted(snapshot, key=lambda listener: (listener.port, listener))[:MAX_LISTENERS])


def notices(before: Snapshot | None, after: Snapshot) -> Iterator[Listeners]:
    """The notices that turn a peer's knowledge from ``before`` into ``after``.

    ``None`` before means that the peer knows nothing yet: the first notice is then ``full``, and
    there is one even if nothing listens. Otherwise equal pictures give no notice at all. What goes and
    what comes on one port is in one notice, so that the port stays open for a server that only moves.
    """
    full = before is None
    changed = sorted(
        after ^ (before or frozenset()), key=lambda each: (each.proto, each.port, each in after, each)
    )
    for part in _parts(changed):
        yield Listeners(
            full=full,
            added=[each for each in part if each in after],
            removed=[each for each in part if each not in after],
        )
        full = False
    if full:
        yield Listeners(full=True, added=[])


def _parts(changed: list[Listener]) -> Iterator[list[Listener]]:
    """``changed``, ``MAX_PER_NOTICE`` at a time, and no port's apart unless it has more than that."""
    part: list[Listener] = []
    for _, of_port in groupby(changed, key=lambda each: (each.proto, each.port)):
        together = list(of_port)
        if part and len(part) + len(together) > MAX_PER_NOTICE:
            yield part
            part = []
        part += together
        while len(part) > MAX_PER_NOTICE:
            yield part[:MAX_PER_NOTICE]
            part = part[MAX_PER_NOTICE:]
    if part:
        yield part
