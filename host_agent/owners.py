"""Who listens in the guest, beside what of it is on this host.

The law: rows do without. The guest is asked only for who wants to see it, and where it does not answer in time a row
says what it said before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from host_agent.forwards import clipped
from protocol.api import Forward, GetOwners, Owner
from protocol.errors import AgentctlProtocolError
from protocol.link import Link

logger = logging.getLogger(__name__)

#: How long the guest may take to look, seconds: dockerd, which it asks, may be busy.
PATIENCE = 4.0


async def ask(link: Link | None) -> list[Owner]:
    """What the guest says; nothing if it does not, or is of an older version."""
    if link is None:
        return []
    try:
        return (await link.request(GetOwners(), timeout=PATIENCE)).owners
    except AgentctlProtocolError as error:
        logger.info("the guest does not say who listens: %s", error)
        return []


def named(rows: Iterable[Forward], owners: Iterable[Owner]) -> list[Forward]:
    """``rows`` with the processes and containers behind them, as far as they are known."""
    known = {(owner.proto, owner.address, owner.port): owner for owner in owners}
    return [_named(row, known.get((row.proto, row.guest_address, row.guest_port))) for row in rows]


def _named(row: Forward, owner: Owner | None) -> Forward:
    if owner is None:
        return row
    return replace(row, process=clipped(owner.process), container=clipped(owner.container))
