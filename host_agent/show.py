"""What the command line prints: tables for people, JSON for programs.

The law of the JSON: keys are the field names of the messages in ``protocol.api``, sizes are bytes, times
are seconds; keys are added, never renamed. Progress and errors go to stderr, answers to stdout.

The law of the text: words that come from the guest, a file name or another program are data. They never
reach the terminal as control sequences, nor rich as markup (``words``).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from host_agent import sizes
from host_agent.errors import UserError
from protocol.api import Forward, ForwardState, InstanceStatus, Mount, Mounts, MountState, Stage

_STATE_STYLE = {
    ForwardState.LISTENING: "green",
    ForwardState.PENDING: "yellow",
    ForwardState.CONFLICT: "red",
    ForwardState.DENIED: "red",
    ForwardState.IGNORED: "dim",
}


_MOUNT_STYLE = {MountState.MOUNTED: "green", MountState.WAITING: "yellow"}

#: Where nobody looks at it a table is as wide as it has to be: `agentctl ports | grep` wants whole lines.
_UNFOLDED = 4096


def out() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _UNFOLDED)


def err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def words(text: str, style: str = "") -> Text:
    """``text`` on one line, as harmless as it looks: what is not printable is shown as its escape."""
    line = " ".join(text.splitlines())
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), style)


def as_json(value: Any) -> None:
    """Print ``value`` (of dataclasses, lists, enums) as one JSON document."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def status(status: InstanceStatus) -> None:
    """A page about one instance."""
    console = out()
    colour = {Stage.RUNNING: "green", Stage.FAILED: "red", Stage.STOPPED: "dim"}.get(status.stage, "yellow")
    heading = Text.assemble(words(status.name, "bold"), "  ", words(status.stage.value, colour))
    # A hint beside a running instance belongs to something that is wrong all the same (a full disk).
    if status.detail and (status.hint or status.stage is not Stage.RUNNING):
        heading.append("  ").append_text(words(status.detail))
    console.print(heading)
    if status.hint:
        console.print(words(f"  hint: {status.hint}"))
    table = Table.grid(padding=(0, 3))
    for label, value in _facts(status):
        table.add_row(f"  {label}", words(value))
    console.print(table)


def _facts(status: InstanceStatus) -> list[tuple[str, str]]:
    facts = [
        ("cpus", str(status.cpus)),
        ("memory", sizes.show(status.memory)),
        ("disk", _disk(status)),
    ]
    if status.qemu_pid:
        facts += [
            ("accelerator", status.accelerator),
            ("up for", _duration(time.time() - status.started_at)),
            ("guest agent", _agent(status)),
            ("docker", f"unix://{status.docker_socket}"),
            ("context", status.docker_context),
            ("mounts", _mounts(status)),
            ("bulk data", _bulk(status)),
        ]
    if status.restarts:
        facts.append(("boots retried", str(status.restarts)))
    if status.agent_restarts:
        facts.append(("host agent restarts", str(status.agent_restarts)))
    return facts


def _disk(status: InstanceStatus) -> str:
    text = sizes.show(status.disk)
    if status.guest is not None and status.guest.data_total:
        text += f", {sizes.show(status.guest.data_total - status.guest.data_free)} used"
    return text


def _mounts(status: InstanceStatus) -> str:
    if status.mounts == status.mounts_working:
        return str(status.mounts) if status.mounts else "none"
    return f"{status.mounts_working} of {status.mounts} work; see: agentctl mounts"


def _bulk(status: InstanceStatus) -> str:
    if status.bulk_memory:
        return f"shared memory, {sizes.show(status.bulk_memory)}"
    return f"inline ({status.bulk_reason})" if status.bulk_reason else "inline"


def _agent(status: InstanceStatus) -> str:
    if not status.guest_connected:
        return "not connected"
    if status.guest_digest != status.host_digest:
        return "connected, of another version; restart to update it: agentctl stop && agentctl up"
    return "connected"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def forwards(rows: list[Forward], *, everything: bool) -> None:
    """The table of ``agentctl ports``."""
    shown = [row for row in rows if everything or row.state is not ForwardState.IGNORED]
    console = out()
    if not shown:
        console.print("nothing in the VM listens; try: docker run -d -p 8080:80 IMAGE", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("HOST", "GUEST", "PROTO", "STATE", "FROM", "REASON"):
        table.add_column(title)
    for row in shown:
        host = endpoint(row.host_address, row.host_port) if row.host_address else "-"
        table.add_row(
            words(host),
            words(endpoint(row.guest_address, row.guest_port)),
            row.proto.value,
            words(row.state.value, _STATE_STYLE[row.state]),
            words(row.unit),
            words(row.reason),
        )
    console.print(table)


def mounts(table: Mounts) -> None:
    """The table of ``agentctl mounts``, and what to do about those that do not work."""
    console = out()
    if not table.mounts:
        console.print("the VM sees no folder of this machine; try: agentctl up --mount .", markup=False)
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("FOLDER", "IN THE VM", "MODE", "STATE", "REASON"):
        grid.add_column(title)
    for mount in table.mounts:
        grid.add_row(
            words(mount.spec.host_path),
            words("same path" if mount.spec.guest_path == mount.spec.host_path else mount.spec.guest_path),
            _mode(mount),
            words(mount.state.value, _MOUNT_STYLE.get(mount.state, "red")),
            words(mount.reason),
        )
    console.print(grid)
    for hint in dict.fromkeys(mount.hint for mount in table.mounts if mount.hint):
        console.print(words(f"hint: {hint}"))
    for mount in table.mounts:
        if mount.lost:
            lost = f"in {mount.spec.guest_path}, {mount.lost} open files or locks were lost (ESTALE)"
            console.print(words(f"note: {lost}"))


def _mode(mount: Mount) -> str:
    return ("ro" if mount.spec.read_only else "rw") + (", locks=host" if mount.spec.host_locks else "")


def mounts_json(table: Mounts) -> None:
    """What a mount is and how it does are one object."""
    rows = [asdict(mount) for mount in table.mounts]
    as_json([{**row.pop("spec"), **row} for row in rows])


def endpoint(address: str, port: int) -> str:
    """``127.0.0.1:80`` or ``[::1]:80``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def forwards_json(rows: list[Forward]) -> None:
    as_json([asdict(row) for row in rows])


def status_json(status: InstanceStatus) -> None:
    as_json(asdict(status))


def error(error: UserError) -> None:
    """One sentence and a hint."""
    console = err()
    console.print(_said("error:", "bold red", error.message))
    if error.hint:
        console.print(_said("hint:", "bold", error.hint))


def warning(text: str) -> None:
    err().print(_said("warning:", "bold yellow", text))


def note(text: str) -> None:
    err().print(_said("note:", "bold", text))


def _said(label: str, style: str, text: str) -> Text:
    """Without the full stop that only some sentences come with."""
    return Text.assemble((label, style), " ", words(text.removesuffix(".")))
