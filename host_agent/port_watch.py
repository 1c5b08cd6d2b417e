"""``agentctl ports --watch``: how each forwarded port is, then each change of that, as it happens.

The law: nothing between the two is missed; what is said twice is the same both times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import trio

from host_agent.client import RESTART_TIME, all_forwards, connected
from host_agent.paths import InstancePaths
from host_agent.rules import HostAddress, HostEnd, HostSocket
from protocol.api import Event, Forward, ForwardState, Subscribe
from protocol.link import Service


async def watch(paths: InstancePaths, say: Callable[[Event], None]) -> None:
    """Call ``say`` until cancelled. Raises what it raises, and ``UserError`` when the instance, or its host agent, has
    gone."""
    # Never full: who does not read is dropped by the host agent (``api_server.MAX_BEHIND``).
    sender, changes = trio.open_memory_channel[Event](math.inf)
    service = Service()

    async def on_event(event: Event) -> None:
        if event.kind.startswith("port-"):
            sender.send_nowait(event)

    service.on_notice(Event, on_event)
    async with connected(paths, service, patience=RESTART_TIME) as link:
        await link.request(Subscribe(only_new=True))  # how what was before has ended is in the rows
        for event in current(await all_forwards(link)):
            say(event)
        async for event in changes:
            say(event)


def current(rows: Iterable[Forward]) -> Iterator[Event]:
    """The state of each end on the host, told as the change to it."""
    told: set[HostEnd] = set()
    for row in rows:
        end = _end(row)
        if row.state is ForwardState.IGNORED or end in told:
            continue
        told.add(end)
        fields = {"path": row.host_address}
        if isinstance(end, HostAddress):
            fields = {"port": str(end.port), "address": end.address, "proto": end.proto.value}
        if row.reason:
            fields["reason"] = row.reason
        message = f"{end} is forwarded to the VM"
        if row.state is not ForwardState.LISTENING:
            message = f"{end} is not forwarded: {row.reason or row.state}"
        yield Event(time.time(), f"port-{row.state}", message, fields)


def _end(row: Forward) -> HostEnd:
    if row.host_port:
        return HostAddress(row.proto, row.host_address, row.host_port)
    return HostSocket(row.host_address)


def as_object(event: Event) -> dict[str, Any]:
    """A line of ``--json``: ``time``, ``kind``, ``message``, and ``proto``, ``address``, ``port`` or ``path``.

    With one of the last two there is ``state``: that of a row, or "closed".
    """
    values: dict[str, Any] = {
        "time": event.time,
        "kind": event.kind,
        "message": event.message,
        **event.fields,
    }
    if "port" in values:
        values["port"] = int(values["port"])
    if "port" in values or "path" in values:
        values["state"] = event.kind.removeprefix("port-")
    return values
