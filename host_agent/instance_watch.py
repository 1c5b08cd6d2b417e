"""``agentctl watch``: what an instance consists of, then each change of that, as it happens.

The law: whoever keeps the last change of each thing (of its topic, and of the port or path that it names) knows
the instance as it is, whatever came in between: an agent that was killed, a guest that booted again, a connection
that was lost. Nothing is told twice in a row as it was before, and the last word is how the instance ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final

import trio

from host_agent import at_rest, port_watch, state
from host_agent.client import RESTART_TIME, ConnectionLost, all_forwards, connected
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from protocol.api import (
    Attachment,
    ControlLink,
    Event,
    Forward,
    GetMounts,
    GetStatus,
    InstanceStatus,
    Mount,
    Stage,
    Subscribe,
    Transport,
)
from protocol.link import Service

#: How often an instance that does not run is looked at by who waits for its start, seconds.
START_INTERVAL = 0.2

#: Before a host agent is looked for again after it was lost, seconds: its keeper starts another.
RETRY = 0.05

ENDED: Final = frozenset({Stage.STOPPED.value, Stage.FAILED.value})


class Topic(StrEnum):
    """What a change is about."""

    INSTANCE = "instance"
    HOST_AGENT = "host-agent"
    BOOT = "boot"
    MACHINE = "machine"
    GUEST = "guest"
    LINK = "link"
    DISK = "disk"
    MOUNT = "mount"
    PORT = "port"
    NOTE = "note"


#: Of these each change is news in itself, and none is a state that lasts.
_PASSING: Final = frozenset({Topic.BOOT, Topic.NOTE})

#: The state of a thing that is not there any more, where it is one of several.
_GONE: Final = {Topic.PORT: "closed", Topic.MOUNT: "gone"}

#: What an event of one kind says, where the kind alone does: topic and state.
_KINDS: Final = {
    "docker-failed": (Topic.INSTANCE, Stage.DOCKER.value),
    "failed": (Topic.INSTANCE, Stage.FAILED.value),
    "boot-failed": (Topic.BOOT, "failed"),
    "guest-connected": (Topic.GUEST, "connected"),
    "guest-lost": (Topic.GUEST, "away"),
    "disk-full": (Topic.DISK, "full"),
    "disk-low": (Topic.DISK, "low"),
    "disk-has-room": (Topic.DISK, "ok"),
}

#: What every line has.
_ALWAYS: Final = ("time", "topic", "state", "message")

#: Fields of events that say why, and what to do.
_EXPLAINING: Final = ("reason", "hint")


@dataclass(frozen=True, slots=True)
class Change:
    """``names`` tell things of one topic from each other; ``details`` explain (``reason``, ``hint``)."""

    time: float
    topic: Topic
    state: str
    message: str
    names: Mapping[str, str | int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def thing(self) -> tuple[object, ...]:
        return (self.topic, *self.names.values())

    @property
    def news(self) -> tuple[object, ...]:
        """What makes another change of the same thing a change."""
        said = self.message if self.topic is Topic.INSTANCE else ""
        return (self.state, said, *(self.details.get(name, "") for name in _EXPLAINING))


def as_object(change: Change) -> dict[str, Any]:
    """A line: ``time`` (s since the epoch), ``topic``, ``state``, ``message``, and what names and explains it."""
    return {
        **dict(zip(_ALWAYS, (change.time, change.topic.value, change.state, change.message), strict=True)),
        **change.names,
        **{name: said for name, said in change.details.items() if name not in _ALWAYS},
    }


# --- from events -----------------------------------------------------------------------------------


def of_event(event: Event) -> Change:
    """What ``event`` means; a note if it is about nothing that lasts."""
    fields = event.fields
    explained = {name: fields[name] for name in _EXPLAINING if fields.get(name)}
    names: dict[str, str | int] = {}
    match event.kind:
        case "stage":
            topic, condition = Topic.INSTANCE, fields["stage"]
        case "boot-stage":
            topic, condition = Topic.BOOT, fields["stage"]
        case "machine":
            topic, condition = Topic.MACHINE, fields["state"]
        case "control-link":
            topic, condition = Topic.LINK, fields["state"]
        case "mount":
            topic, condition, names = Topic.MOUNT, fields["state"], {"path": fields["path"]}
        case kind if kind.startswith("port-") and "port" in fields:
            topic, condition = Topic.PORT, kind.removeprefix("port-")
            names = {"proto": fields["proto"], "address": fields["address"], "port": int(fields["port"])}
        case kind if kind.startswith("port-") and "path" in fields:
            topic, condition, names = Topic.PORT, kind.removeprefix("port-"), {"path": fields["path"]}
        case kind if kind in _KINDS:
            topic, condition = _KINDS[kind]
        case kind:
            topic, condition, explained = Topic.NOTE, kind, dict(fields)
    return Change(event.time, topic, condition, event.message, names, explained)


# --- from what is there ----------------------------------------------------------------------------


def of_status(status: InstanceStatus) -> Iterator[Change]:
    """The instance itself, its guest, what carries the link to it, and its disk."""
    now = time.time()
    explained = {"hint": status.hint} if status.hint else {}
    yield Change(now, Topic.INSTANCE, status.stage.value, status.detail, details=explained)
    yield _guest(connected=status.guest_connected)
    if status.attached is not None:
        yield _machine(status.attached)
        return
    if status.control is not None and (
        status.control.problem or status.control.transport is not Transport.NONE
    ):
        yield _link(status.control)  # one that is away for a moment is no news
    told = {"": "there is room on the disk", "low": "the host's disk is nearly full"}
    message = told.get(status.disk_state, "the host's disk is full, and the VM waits")
    yield Change(now, Topic.DISK, status.disk_state or "ok", message)


def of_mounts(mounts: Iterable[Mount]) -> Iterator[Change]:
    """Each mount."""
    for mount in mounts:
        path = mount.spec.guest_path
        message = f"the mount {path}: {mount.reason or mount.state}"
        explained = {name: said for name, said in (("reason", mount.reason), ("hint", mount.hint)) if said}
        yield Change(time.time(), Topic.MOUNT, mount.state.value, message, {"path": path}, explained)


def of_forwards(rows: Iterable[Forward]) -> Iterator[Change]:
    """Each port and socket of the host that leads to the guest, or should."""
    return map(of_event, port_watch.current(rows))


def _guest(*, connected: bool) -> Change:
    if connected:
        return Change(time.time(), Topic.GUEST, "connected", "the guest agent is connected")
    return Change(time.time(), Topic.GUEST, "away", "the guest agent is not connected")


def _machine(machine: Attachment) -> Change:
    said = {"reason": machine.reason, "hint": machine.hint}
    explained = {name: words for name, words in said.items() if words}
    message = f"{machine.address} is {machine.link.value}"
    return Change(time.time(), Topic.MACHINE, machine.link.value, message, details=explained)


def _link(control: ControlLink) -> Change:
    said = {"reason": control.problem or control.reason, "hint": control.hint}
    explained = {name: words for name, words in said.items() if words}
    state = control.transport.value
    message = (
        f"the control link goes over {state}"
        if control.transport is not Transport.NONE
        else "the control link is lost"
    )
    return Change(time.time(), Topic.LINK, state, message, details=explained)


def _host_agent(*, connected: bool) -> Change:
    if connected:
        return Change(time.time(), Topic.HOST_AGENT, "connected", "the host agent answers")
    return Change(time.time(), Topic.HOST_AGENT, "away", "the host agent is gone")


# --- what was told ---------------------------------------------------------------------------------


class Picture:
    """What whoever listens knows of the instance; tells them what they do not."""

    def __init__(self, tell: Callable[[Change], None]) -> None:
        self._tell = tell
        self._known: dict[tuple[object, ...], Change] = {}
        self._end: Change | None = None

    def change(self, change: Change) -> None:
        """Something changed. How the instance ends is kept for the last word."""
        if change.topic in _PASSING:
            self._tell(change)
        elif change.topic is Topic.INSTANCE and change.state in ENDED:
            self._end = change
        elif (before := self._known.get(change.thing)) is None or before.news != change.news:
            if change.state == _GONE.get(change.topic):
                self._known.pop(change.thing, None)
            else:
                self._known[change.thing] = change
            self._tell(change)

    def all_of(self, topic: Topic, changes: Iterable[Change]) -> None:
        """``changes`` are all things of ``topic`` that there are."""
        listed = list(changes)
        there = {change.thing for change in listed}
        for known in [*self._known.values()]:
            if known.topic is topic and known.thing not in there:
                name = known.names.get("path") or f"{known.names['address']}:{known.names['port']}"
                self.change(
                    Change(time.time(), topic, _GONE[topic], f"{name} is not there any more", known.names)
                )
        for change in listed:
            self.change(change)

    def agent_lost(self) -> None:
        """Nobody can tell any more; a successor will say how things are."""
        self.change(_host_agent(connected=False))

    def agent_found(self, status: InstanceStatus, rows: Iterable[Forward], mounts: Iterable[Mount]) -> None:
        """How things are, from a host agent that answers."""
        self.change(_host_agent(connected=True))
        for change in of_status(status):
            self.change(change)
        self.all_of(Topic.MOUNT, of_mounts(mounts))
        self.all_of(Topic.PORT, of_forwards(rows))

    def ended(self, left: Callable[[], InstanceStatus]) -> None:
        """The instance does not run; ``left`` is asked how it ended if its host agent did not say so."""
        self.all_of(Topic.PORT, ())
        self.all_of(Topic.MOUNT, ())
        gone = Change(time.time(), Topic.MACHINE, "lost", "the machine is not attached any more")
        unlinked = Change(time.time(), Topic.LINK, Transport.NONE.value, "the VM does not run any more")
        for change in (_guest(connected=False), unlinked, gone, _host_agent(connected=False)):
            if change.thing in self._known:
                self.change(change)
        last = self._end or next(of_status(left()))
        if (before := self._known.get(last.thing)) is None or before.state != last.state:
            self._known[last.thing] = last
            self._tell(last)
        self._end = None


# --- the instance ----------------------------------------------------------------------------------


async def watch(paths: InstancePaths, tell: Callable[[Change], None], *, forever: bool = False) -> None:
    """Call ``tell`` with how things are and each change, until the instance has ended, or, ``forever``, cancelled.

    Raises what ``tell`` raises, and ``UserError`` when its host agent is of another version.
    """
    picture = Picture(tell)
    while True:
        while state.is_locked(paths.lock):
            await _follow(paths, picture)
        picture.ended(partial(at_rest.status, paths))
        if not forever:
            return
        while not state.is_locked(paths.lock):
            await trio.sleep(START_INTERVAL)


async def _follow(paths: InstancePaths, picture: Picture) -> None:
    """One host agent, to its end."""
    # Never full: who does not read is dropped by the host agent (``api_server.MAX_BEHIND``).
    sender, events = trio.open_memory_channel[Event](math.inf)
    service = Service()

    async def on_event(event: Event) -> None:
        await trio.lowlevel.checkpoint()
        sender.send_nowait(event)

    service.on_notice(Event, on_event)
    try:
        async with connected(paths, service, patience=RESTART_TIME) as link:
            await link.request(Subscribe(only_new=True))  # what was before is in the answers
            status, rows = await link.request(GetStatus()), await all_forwards(link)
            picture.agent_found(status, rows, (await link.request(GetMounts())).mounts)
            async for event in events:
                picture.change(of_event(event))
    except ConnectionLost:
        # What it said last is here already, and may be why it ended.
        while True:
            try:
                picture.change(of_event(events.receive_nowait()))
            except trio.WouldBlock:
                break
        picture.agent_lost()
        await trio.sleep(RETRY)
    except UserError as error:
        if error.exit_code is not ExitCode.NOT_RUNNING:
            raise
