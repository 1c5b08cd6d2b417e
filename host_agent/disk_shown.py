"""What ``agentctl disk`` prints."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from host_agent import sizes
from host_agent.disk_room import LOW_HINT, DiskRoom, DiskState, little_left
from host_agent.show import as_json, err, out, warning, words
from protocol.api import Disk


def disk_json(disk: Disk) -> None:
    as_json(asdict(disk))


def disk(disk: Disk) -> None:
    table = Table.grid(padding=(0, 3))
    rows = [("size", sizes.show(disk.size))]
    if disk.used is not None:
        rows.append(("used in the VM", sizes.show(disk.used)))
    rows.append(("on this machine", sizes.show(disk.allocated)))
    if disk.overlay:
        rows.append(("until it stops", f"{sizes.show(disk.overlay)} for what is not on it"))
    rows.append(("free here", sizes.show(disk.free)))
    for label, value in rows:
        table.add_row(label, words(value))
    out().print(table)
    if DiskRoom(disk.size, disk.allocated, disk.free).judged(DiskState.ROOMY, stopped=False) is DiskState.LOW:
        warning(f"{little_left(disk.free)} ({LOW_HINT})")


def given_back(disk: Disk) -> None:
    """After the figures, in a sentence."""
    amount = (
        f"{sizes.show(disk.given_back)} were given back"
        if disk.given_back
        else "there was nothing to give back"
    )
    err().print(words(amount))
