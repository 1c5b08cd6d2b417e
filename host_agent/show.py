"""What the command line prints: tables for people, JSON for programs.

The law of the JSON: keys are the field names of the messages in ``protocol.api``, sizes are bytes, times
are seconds; keys are added, never renamed. Progress and errors go to stderr, answers to stdout.

The law of the text: words that come from the guest, a file name or another program are data. They never
reach the terminal as control sequences, nor rich as markup (``words``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from host_agent import hints, kind, sizes
from host_agent.disk_room import LOW_HINT, DiskState, little_left
from host_agent.doctor.finding import Diagnosis, Level
from host_agent.errors import UserError
from host_agent.show_json import as_json as as_json
from host_agent.show_json import as_line
from host_agent.show_json import status_json as status_json
from protocol.api import (
    Attachment,
    ControlLink,
    Event,
    Forward,
    ForwardState,
    InstanceStatus,
    LinkState,
    Mount,
    Mounts,
    MountState,
    PortRule,
    PortSettings,
    SocketRows,
    Stage,
    Transport,
    View,
    ViewStage,
)

if TYPE_CHECKING:
    from host_agent.disuse import StoredImage, Unused
    from host_agent.log_lines import LogLine  # `status` does without

FORWARD_STYLE = {
    ForwardState.LISTENING: "green",
    ForwardState.PENDING: "yellow",
    ForwardState.CONFLICT: "red",
    ForwardState.DENIED: "red",
    ForwardState.IGNORED: "dim",
}


_LEVEL_STYLE = {Level.OK: "green", Level.ADVICE: "yellow", Level.PROBLEM: "red"}

_TRANSPORTS = {Transport.VIRTIO_SERIAL: "virtio-serial", Transport.SSH: "SSH"}

MOUNT_STYLE = {MountState.MOUNTED: "green", MountState.WAITING: "yellow"}

_LOG_STYLE = {
    "host": "cyan",
    "files": "blue",
    "view": "blue",
    "console": "magenta",
    "guest": "green",
    "docker": "yellow",
}

#: Where nobody looks at it a table is as wide as it has to be: `agentctl ports | grep` wants whole lines.
_UNFOLDED = 4096


def out() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _UNFOLDED)


def err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def words(text: str, style: str = "") -> Text:
    """``text`` on one line, as harmless as it looks: what is not printable is shown as its escape.

    Commands that it names are those of the chosen instance (``hints``).
    """
    line = hints.addressed(" ".join(text.splitlines()))
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), style)


def sentence(text: str, style: str = "") -> Text:
    """``words`` of ours, which call the instance what it is (``kind``)."""
    return words(kind.called(text), style)


def yaml(text: str) -> None:
    """A configuration; in colours on a terminal."""
    console = out()
    if not console.is_terminal:
        sys.stdout.write(text)
        return
    from rich.syntax import Syntax

    console.print(Syntax(text.rstrip(), "yaml", theme="ansi_dark", background_color="default"))


def status(status: InstanceStatus) -> None:
    """A page about one instance."""
    console = out()
    heading = Text.assemble(
        words(status.name, "bold"), "  ", words(status.stage.value, _stage_style(status.stage))
    )
    # A hint beside a running instance belongs to something that is wrong all the same (a full disk).
    if status.detail and (status.hint or status.stage is not Stage.RUNNING):
        heading.append("  ").append_text(sentence(status.detail))
    console.print(heading)
    if status.hint:
        console.print(sentence(f"  hint: {status.hint}"))
    if status.disk_state == DiskState.LOW:
        console.print(words(f"  {little_left(status.host_free)}", "yellow"))
        console.print(words(f"  hint: {LOW_HINT}"))
    if status.control is not None and (said := _link_trouble(status.control)):
        console.print(words(f"  {said}", "yellow"))
        if status.control.hint:
            console.print(words(f"  hint: {status.control.hint}"))
    table = Table.grid(padding=(0, 3))
    for label, value in _facts(status):
        table.add_row(f"  {label}", words(value))
    console.print(table)


def _headed(*titles: str) -> Table:
    """A table without rows as yet."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title)
    return table


def instances(statuses: list[InstanceStatus]) -> None:
    """The table of ``agentctl list``."""
    console = out()
    if not statuses:
        console.print(words("there is no instance yet; make one: agentctl up"))
        return
    machines = any(status.attached for status in statuses)
    address = ["MACHINE"] if machines else []
    table = _headed("NAME", "STATE", *address, "CPUS", "MEMORY", "DISK", "UP FOR", "CONTEXT", "DETAIL")
    for status in statuses:
        known = bool(status.cpus)
        runs = bool(status.qemu_pid or (status.attached and status.agent_pid))
        # That one is stopped is no news; that it is on its way, or why it ended, is.
        quiet = status.stage in (Stage.STOPPED, Stage.RUNNING) and not status.hint
        table.add_row(
            words(status.name, "bold"),
            words(status.stage.value, _stage_style(status.stage)),
            *([words(status.attached.address if status.attached else "VM")] if machines else []),
            str(status.cpus) if known else "-",
            sizes.show(status.memory) if known else "-",
            _disk(status) if known else "-",
            _duration(time.time() - status.started_at) if runs else "-",
            words(status.docker_context),
            words("" if quiet else kind.called(status.detail, attached=status.attached is not None)),
        )
    console.print(table)


def images(stored: list[StoredImage]) -> None:
    """The table of ``agentctl image list``."""
    console = out()
    if not stored:
        console.print(words("no image is built yet; build one: agentctl image build"))
        return
    table = _headed("IMAGE", "DEBIAN", "KERNEL", "BUILT", "SIZE", "USED BY")
    for each in stored:
        of = each.manifest
        users = ["the next start"] * each.current + [f"instance {name}" for name in each.used_by]
        table.add_row(
            words(each.path.name, "bold"),
            words(of.suite if of else "damaged"),
            words(of.kernel_release if of else "-"),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(of.built_at)) if of else "-",
            sizes.show(each.size),
            words(", ".join(users) or "nobody"),
        )
    console.print(table)
    if any(not each.in_use for each in stored):
        console.print(words("to remove those that nobody uses: agentctl image prune"))


def unused(things: list[Unused]) -> None:
    """What ``agentctl prune`` is about to remove."""
    console = err()
    table = _headed("SIZE", "WHAT", "PATH")
    for each in things:
        table.add_row(sizes.show(each.size), words(each.what), words(str(each.path)))
    console.print(table)


def facts(named: Mapping[str, str]) -> None:
    """A line for each."""
    table = Table.grid(padding=(0, 3))
    for name, value in named.items():
        table.add_row(name, words(value))
    out().print(table)


def _stage_style(stage: Stage) -> str:
    return {Stage.RUNNING: "green", Stage.FAILED: "red", Stage.STOPPED: "dim"}.get(stage, "yellow")


def _facts(status: InstanceStatus) -> list[tuple[str, str]]:
    if status.attached is not None:
        return _facts_of_machine(status, status.attached)
    facts = [
        ("cpus", str(status.cpus)),
        ("memory", sizes.show(status.memory)),
        (
            "disk",
            _disk(status) + (f", {sizes.show(status.disk_allocated)} here" if status.disk_allocated else ""),
        ),
    ]
    if status.qemu_pid:
        facts += [
            ("accelerator", status.accelerator),
            ("up for", _duration(time.time() - status.started_at)),
            ("guest agent", _agent(status)),
            *(_control(status.control) if status.control else []),
            *_sockets(status),
            ("mounts", _mounts(status)),
            ("bulk data", _bulk(status)),
        ]
    if status.restarts:
        facts.append(("boots retried", str(status.restarts)))
    if status.agent_restarts:
        facts.append(("host agent restarts", str(status.agent_restarts)))
    return facts


def _link_trouble(control: ControlLink) -> str:
    """What is wrong with it, in a sentence; "" if nothing is."""
    if control.transport is Transport.SSH:
        return f"the control link goes over SSH: {control.reason}"
    if control.problem:
        return f"the control link is lost: {control.reason}; nor over SSH: {control.problem}"
    return ""


def _control(control: ControlLink) -> list[tuple[str, str]]:
    if not control.since:
        return []
    said = "lost" if control.transport is Transport.NONE else f"over {_TRANSPORTS[control.transport]}"
    said += f", for {_duration(time.time() - control.since)}"
    return [("control link", f"{said}, {control.attempts} attempts" if control.attempts else said)]


def _facts_of_machine(status: InstanceStatus, machine: Attachment) -> list[tuple[str, str]]:
    """Of one that is attached."""
    by_user = machine.mounting == "fusermount3"
    facts = [("machine", machine.address)]
    if status.agent_pid:
        ago = _duration(time.time() - machine.since)
        link = f"{machine.link.value}, for {ago}"
        if machine.link is not LinkState.CONNECTED and machine.attempts:
            link += f", {machine.attempts} attempts"
        facts.append(("link", link))
    if machine.user:
        facts.append(("there", f"{machine.user}, Python {machine.python}"))
    if status.guest is not None:
        facts += [
            ("kernel", status.guest.kernel),
            ("memory", f"{sizes.show(status.guest.memory_total)}, {status.guest.cpus} cpus"),
        ]
    if status.agent_pid:
        facts += [
            ("guest agent", _agent(status)),
            ("ports", f"found by {machine.ports}" if machine.ports else "unknown"),
            ("mounts", _mounts(status) + (", by fusermount3" if by_user and status.mounts else "")),
        ]
    if status.docker_socket:
        facts += _sockets(status)
    if status.agent_restarts:
        facts.append(("host agent restarts", str(status.agent_restarts)))
    if machine.keep:
        facts.append(("when detached", "what runs there goes on"))
    return facts


def _sockets(status: InstanceStatus) -> list[tuple[str, str]]:
    """Where what runs the containers is to be found."""
    if status.containerd_socket:
        return [("containerd", f"unix://{status.containerd_socket}")]
    return [("docker", f"unix://{status.docker_socket}"), ("context", status.docker_context)]


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
        console.print(sentence("nothing in the VM listens; try: docker run -d -p 8080:80 IMAGE"))
        return
    table = _headed("HOST", "GUEST", "PROTO", "STATE", "FROM", "REASON")
    for row in shown:
        host = endpoint(row.host_address, row.host_port) if row.host_port else row.host_address or "-"
        table.add_row(
            words(host),
            words(endpoint(row.guest_address, row.guest_port)),
            row.proto.value,
            words(row.state.value, FORWARD_STYLE[row.state]),
            words(_owner(row)),
            sentence(row.reason),
        )
    console.print(table)


def _owner(row: Forward) -> str:
    """``nginx (container web)``, ``python3 (session-3.scope)``, or what of it is known."""
    place = f"container {row.container}" if row.container else row.unit
    if not row.process:
        return place
    return f"{row.process} ({place})" if place else row.process


def mounts(table: Mounts) -> None:
    """The table of ``agentctl mounts``, and what to do about those that do not work."""
    console = out()
    if not table.mounts:
        console.print(sentence("the VM sees no folder of this machine; try: agentctl up --mount ."))
        return
    grid = _headed("FOLDER", kind.called("in the VM").upper(), "MODE", "STATE", "REASON")
    for mount in table.mounts:
        grid.add_row(
            words(mount.spec.host_path),
            words("same path" if mount.spec.guest_path == mount.spec.host_path else mount.spec.guest_path),
            _mode(mount),
            words("revalidating", "yellow")
            if mount.revalidating and mount.state is MountState.MOUNTED
            else words(mount.state.value, MOUNT_STYLE.get(mount.state, "red")),
            sentence(mount.reason),
        )
    console.print(grid)
    for hint in dict.fromkeys(mount.hint for mount in table.mounts if mount.hint):
        console.print(sentence(f"hint: {hint}"))
    for mount in table.mounts:
        if mount.lost:
            lost = f"in {mount.spec.guest_path}, {mount.lost} open files or locks were lost (ESTALE)"
            console.print(words(f"note: {lost}"))


def view(view: View) -> None:
    """Where the guest's files are, and which of them may be changed."""
    console = out()
    if view.stage is ViewStage.OFF:
        console.print(words("the guest's files are not shown here"))
        return
    console.print(words(view.path))
    grid = _headed("BELOW IT", "MODE")
    for place in view.places:
        grid.add_row(words(place.path), words("read-only" if place.read_only else "read-write"))
    console.print(grid)
    if view.reason:
        console.print(words(f"note: {view.reason}"))


def diagnosis(diagnosis: Diagnosis) -> None:
    """A line for each finding, what to do below it, and what it comes to."""
    console = out()
    width = max(len(finding.topic) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        style = _LEVEL_STYLE[finding.level]
        console.print(
            Text.assemble(
                words(finding.topic.ljust(width)),
                "  ",
                words(f"{finding.level.value:<7}", style),
                "  ",
                sentence(finding.message),
            )
        )
        if finding.fix:
            console.print(Text.assemble(" " * (width + 11), sentence(f"fix: {finding.fix}", "bold")))
    problems, advice = diagnosis.count(Level.PROBLEM), diagnosis.count(Level.ADVICE)
    if problems:
        console.print(f"{problems} {'thing does' if problems == 1 else 'things do'} not work")
    elif advice:
        console.print(f"everything works; {advice} {'thing' if advice == 1 else 'things'} could be better")
    else:
        console.print("everything is well")


def diagnosis_json(diagnosis: Diagnosis) -> None:
    as_json(asdict(diagnosis))


def _mode(mount: Mount) -> str:
    return ("ro" if mount.spec.read_only else "rw") + (", locks=host" if mount.spec.host_locks else "")


def rules(settings: PortSettings, sockets_of: SocketRows) -> None:
    """The tables of ``agentctl forward list``: rules of ports, and sockets."""
    from host_agent import rule_text

    console = out()
    if settings.lan:
        console.print(sentence("what listens on all addresses of the VM is open to other machines"))
    if settings.privileged_offset:
        console.print(f"ports below 1024 have {settings.privileged_offset} added")
    if settings.rules:
        grid = _headed("PORTS", "WHAT LISTENS ON", "OPTIONS")
        for rule in settings.rules:
            options = [name for name, given in (("ignore", rule.ignore), ("static", rule.static)) if given]
            grid.add_row(words(rule_text.words(rule)), words(_scope(rule)), ", ".join(options))
        console.print(grid)
    if sockets_of.rows:
        sockets(sockets_of)
    elif not settings.rules:
        console.print(
            words("nothing was added: every port is on localhost; see: agentctl forward add --help")
        )


def _scope(rule: PortRule) -> str:
    if rule.guest_ip not in ("0.0.0.0", "::"):
        return rule.guest_ip
    return "all addresses" if rule.guest_ip_must_be_zero else "any address"


def rules_json(settings: PortSettings, table: SocketRows) -> None:
    """Rules as the configuration has them."""
    from host_agent import rule_text

    listed = [rule_text.as_json(rule) for rule in settings.rules]
    as_json({**asdict(settings), "rules": listed, "sockets": _socket_objects(table)})


def change(event: Event) -> None:
    """A line of ``agentctl ports --watch``."""
    out().print(
        Text.assemble(
            words(time.strftime("%H:%M:%S", time.localtime(event.time)), "dim"), "  ", sentence(event.message)
        )
    )
    sys.stdout.flush()


def change_json(event: Event) -> None:
    from host_agent import port_watch

    as_line(port_watch.as_object(event))


def log_lines(lines: Iterable[LogLine]) -> None:
    """Lines of several logs, each with its moment, in the time of this machine, and where it is from."""
    console = out()
    for line in lines:
        second = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.time))
        console.print(
            Text.assemble(
                words(f"{second}.{int(line.time % 1 * 1000):03}", "dim"),
                "  ",
                words(f"{line.component:<7}", _LOG_STYLE.get(line.component, "")),
                "  ",
                words(line.text),
            )
        )
    sys.stdout.flush()


def sockets(table: SocketRows) -> None:
    """The sockets of ``agentctl forward list``."""
    console = out()
    grid = _headed("HOST", "", "GUEST", "STATE", "REASON")
    for row in table.rows:
        grid.add_row(
            words(row.forward.host),
            # The arrow is the way of a connection.
            "<-" if row.forward.reverse else "->",
            words(row.forward.guest),
            words(row.state.value, FORWARD_STYLE[row.state]),
            sentence(row.reason),
        )
    console.print(grid)


def _socket_objects(table: SocketRows) -> list[dict[str, Any]]:
    """What a forward is and how it does are one object."""
    rows = [asdict(row) for row in table.rows]
    return [{**row.pop("forward"), **row} for row in rows]


def view_json(view: View) -> None:
    as_json(asdict(view))


def mounts_json(table: Mounts) -> None:
    """What a mount is and how it does are one object."""
    rows = [asdict(mount) for mount in table.mounts]
    as_json([{**row.pop("spec"), **row} for row in rows])


def endpoint(address: str, port: int) -> str:
    """``127.0.0.1:80`` or ``[::1]:80``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def forwards_json(rows: list[Forward]) -> None:
    as_json([asdict(row) for row in rows])


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
    return Text.assemble((label, style), " ", sentence(text.removesuffix(".")))
