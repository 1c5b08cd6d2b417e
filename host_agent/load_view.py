"""How busy an instance is, as people see it: the page of ``agentctl top``."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from host_agent import kind, sizes
from host_agent.instance_load import ContainerLoad, GuestLoad, Load, MountLoad
from host_agent.show import FORWARD_STYLE, MOUNT_STYLE, endpoint, words
from protocol.api import Forward, MountState, Stage

#: Rows of one table; a screen has no more.
MAX_ROWS = 40

_HOST_NAMES = {"qemu": "QEMU", "host-agent": "host agent", "file-server": "file server"}


def page(load: Load, note: str = "") -> RenderableType:
    """Everything; ``note`` is said beside the name."""
    heading = Text.assemble(
        words(load.name, "bold"),
        "  ",
        words(load.stage.value, "green" if load.stage is Stage.RUNNING else "yellow"),
        "  ",
        words(time.strftime("%H:%M:%S", time.localtime(load.time)), "dim"),
        words(f"  {note}" if note else "", "yellow"),
    )
    parts: list[RenderableType] = [heading, _figures(load)]
    for table in (_containers(load.containers), _mounts(load.mounts), _ports(load.ports)):
        if table is not None:
            parts += ["", table]
    return Group(*parts)


def _figures(load: Load) -> Table:
    grid = Table.grid(padding=(0, 3))
    for _ in range(3):
        grid.add_column()
    host_cpu = "   ".join(f"{_HOST_NAMES.get(p.name, p.name)} {_percent(p.cpu)}" for p in load.processes)
    host_memory = "   ".join(
        f"{_HOST_NAMES.get(p.name, p.name)} {sizes.show(p.memory)}" for p in load.processes
    )
    allocated = f"{sizes.show(load.disk_allocated)} allocated, {sizes.show(load.disk_free)} free"
    there = kind.called("the VM")
    connections = f"{_flow(load.received)} from {there}, {_flow(load.sent)} to it"
    if load.guest is None:
        grid.add_row("", Text("the guest agent does not answer", "yellow"), "")
    rows = _guest(load.guest)
    grid.add_row("", Text(kind.called("in the VM").upper(), "bold"), Text("ON THIS MACHINE", "bold"))
    grid.add_row("cpu", rows[0], host_cpu)
    grid.add_row("memory", rows[1], host_memory)
    grid.add_row("disk", rows[2], allocated)
    grid.add_row("network", rows[3], connections)
    return grid


def _guest(guest: GuestLoad | None) -> tuple[str, str, str, str]:
    """Processors, memory, disk, network."""
    if guest is None:
        return ("-",) * 4
    cpu = f"{_percent(guest.cpu_busy)} of {guest.cpus}, load {' '.join(f'{each:.2f}' for each in guest.load)}"
    if guest.cpu_waiting >= 0.05:
        cpu += f", waits for the disk {_percent(guest.cpu_waiting)}"
    if guest.cpu_stolen >= 0.05:
        cpu += f", stolen {_percent(guest.cpu_stolen)}"
    used = guest.memory_total - guest.memory_available
    memory = f"{sizes.show(used)} of {sizes.show(guest.memory_total)}, cache {sizes.show(guest.memory_cache)}"
    disk = f"{sizes.show(guest.data_total - guest.data_free)} of {sizes.show(guest.data_total)}"
    disk += f", read {_flow(guest.data_read)}, written {_flow(guest.data_written)}"
    network = f"in {_flow(guest.network_received)}, out {_flow(guest.network_sent)}"
    return cpu, memory, disk, network


def _containers(rows: list[ContainerLoad]) -> Table | None:
    if not rows:
        return None
    table = _table("CONTAINER", "CPU", "MEMORY", "PROCESSES")
    for row in rows[:MAX_ROWS]:
        table.add_row(words(row.name), _percent(row.cpu), sizes.show(row.memory), str(row.processes))
    return _cut(table, len(rows))


def _mounts(rows: list[MountLoad]) -> Table | None:
    if not rows:
        return None
    table = _table("MOUNT", "STATE", "CALLS", "READ", "WRITTEN")
    for row in rows[:MAX_ROWS]:
        style = MOUNT_STYLE.get(row.state, "red")
        state = words(MountState(row.state).value, style)
        table.add_row(words(row.path), state, f"{row.calls:.0f}/s", _flow(row.read), _flow(row.written))
    return _cut(table, len(rows))


def _ports(rows: list[Forward]) -> Table | None:
    if not rows:
        return None
    table = _table("PORT", "PROTO", "STATE", "FROM")
    for row in rows[:MAX_ROWS]:
        host = endpoint(row.host_address, row.host_port) if row.host_port else row.host_address or "-"
        state = words(row.state.value, FORWARD_STYLE[row.state])
        origin = words(kind.called(row.reason) or row.container or row.process or row.unit)
        table.add_row(words(host), row.proto.value, state, origin)
    return _cut(table, len(rows))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _cut(table: Table, rows: int) -> Table:
    if rows > MAX_ROWS:
        table.add_row(Text(f"and {rows - MAX_ROWS} more", "dim"))
    return table


def _percent(processors: float) -> str:
    """Of one processor."""
    return f"{processors * 100:.0f} %"


def _flow(rate: float) -> str:
    return f"{sizes.show(rate)}/s"
