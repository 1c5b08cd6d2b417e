"""What is there, then what changes: whoever keeps the last line of each thing knows the instance as it is."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from host_agent import instance_watch, state
from host_agent.client import hello
from host_agent.errors import UserError
from host_agent.instance_watch import Change, Picture, Topic, as_object, of_event
from host_agent.paths import InstancePaths
from host_agent.state import InstanceState
from protocol.api import (
    ControlLink,
    Event,
    Forward,
    ForwardState,
    Mount,
    MountSpec,
    MountState,
    Proto,
    Stage,
    Transport,
)
from tests.host_agent.stand_in import HOME, STATUS, WEB, Agent, running

NAMES = Forward(Proto.UDP, "::", 53, "localhost", 53, ForwardState.CONFLICT, "port 53 is in use")
LOST = Mount(MountSpec("/disk", "/disk"), MountState.MISSING, "/disk is missing on the host", "mount it")


class Reader:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._more = trio.Event()

    def tell(self, change: Change) -> None:
        self.changes.append(change)
        self._more.set()
        self._more = trio.Event()

    def said(self) -> list[str]:
        """Each line in short."""
        return [
            " ".join([change.topic.value, *map(str, change.names.values()), change.state])
            for change in self.changes
        ]

    async def until(self, line: str, since: int = 0) -> int:
        """How many lines there are when ``line`` has been told, after the first ``since``."""
        while line not in self.said()[since:]:
            await self._more.wait()
        return len(self.changes)


BEGIN = [
    "host-agent connected",
    "instance running",
    "guest connected",
    "disk ok",
    "mount /home/me mounted",
    "port tcp localhost 8080 listening",
]


@pytest.fixture
def lock(instance: InstancePaths) -> int:
    """Held as its keeper and its agent would."""
    descriptor = state.try_lock(instance.lock)
    assert descriptor is not None
    return descriptor


# --- one change ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Event(1.0, "stage", "waiting for Docker", {"stage": "docker"}),
            {"topic": "instance", "state": "docker", "message": "waiting for Docker"},
        ),
        (
            Event(1.0, "failed", "it panicked", {"hint": "see", "code": "7"}),
            {"topic": "instance", "state": "failed", "message": "it panicked", "hint": "see"},
        ),
        (
            Event(1.0, "docker-failed", "no Docker", {"hint": "see"}),
            {"topic": "instance", "state": "docker", "message": "no Docker", "hint": "see"},
        ),
        (
            Event(1.0, "boot-stage", "guest: init", {"stage": "init"}),
            {"topic": "boot", "state": "init", "message": "guest: init"},
        ),
        (
            Event(1.0, "boot-failed", "again", {"reason": "it hangs"}),
            {"topic": "boot", "state": "failed", "message": "again", "reason": "it hangs"},
        ),
        (
            Event(1.0, "guest-connected", "there", {"clock_step_ms": "0"}),
            {"topic": "guest", "state": "connected", "message": "there"},
        ),
        (
            Event(1.0, "control-link", "over SSH", {"state": "ssh", "reason": "silence"}),
            {"topic": "link", "state": "ssh", "message": "over SSH", "reason": "silence"},
        ),
        (Event(1.0, "guest-lost", "gone"), {"topic": "guest", "state": "away", "message": "gone"}),
        (
            Event(1.0, "disk-full", "it waits", {"hint": "make room"}),
            {"topic": "disk", "state": "full", "message": "it waits", "hint": "make room"},
        ),
        (Event(1.0, "disk-low", "soon"), {"topic": "disk", "state": "low", "message": "soon"}),
        (Event(1.0, "disk-has-room", "on"), {"topic": "disk", "state": "ok", "message": "on"}),
        (
            Event(1.0, "mount", "gone", {"path": "/a", "state": "missing", "reason": "why", "hint": ""}),
            {"topic": "mount", "state": "missing", "message": "gone", "path": "/a", "reason": "why"},
        ),
        (
            Event(1.0, "port-closed", "gone", {"port": "80", "address": "localhost", "proto": "tcp"}),
            {"topic": "port", "state": "closed", "message": "gone"}
            | {"proto": "tcp", "address": "localhost", "port": 80},
        ),
        (
            Event(1.0, "port-listening", "there", {"path": "/run/db.sock"}),
            {"topic": "port", "state": "listening", "message": "there", "path": "/run/db.sock"},
        ),
        (
            Event(1.0, "port-limit", "too many"),
            {"topic": "note", "state": "port-limit", "message": "too many"},
        ),
        (
            Event(1.0, "adopted", "found", {"pid": "7"}),
            {"topic": "note", "state": "adopted", "message": "found", "pid": "7"},
        ),
    ],
)
def test_what_an_event_means(event: Event, line: dict[str, Any]) -> None:
    assert as_object(of_event(event)) == {"time": 1.0, **line}


def test_what_explains_never_hides_what_every_line_has() -> None:
    change = Change(1.0, Topic.NOTE, "odd", "said", details={"state": "7", "topic": "mount", "reason": "why"})
    line = as_object(change)
    assert list(line) == ["time", "topic", "state", "message", "reason"]
    assert (line["state"], line["topic"]) == ("odd", "note")


# --- the picture -----------------------------------------------------------------------------------


def test_what_is_as_it_was_is_not_told_again() -> None:
    reader = Reader()
    picture = Picture(reader.tell)
    for _ in range(2):
        picture.agent_found(STATUS, [WEB, NAMES], [HOME, LOST])
    assert reader.said() == [
        *BEGIN[:5],
        "mount /disk missing",
        BEGIN[5],
        "port udp localhost 53 conflict",
    ]
    assert reader.changes[5].details == {"reason": LOST.reason, "hint": "mount it"}
    assert reader.changes[7].details == {"reason": "port 53 is in use"}
    picture.change(Change(0.0, Topic.MOUNT, "missing", "still", {"path": "/disk"}, reader.changes[5].details))
    assert len(reader.changes) == 8
    picture.change(Change(0.0, Topic.MOUNT, "missing", "still", {"path": "/disk"}, {"reason": "another"}))
    assert len(reader.changes) == 9


def test_what_carries_the_link_is_told_once_it_is_known() -> None:
    reader = Reader()
    picture = Picture(reader.tell)
    lost = ControlLink(Transport.NONE, 5.0, "silence")
    for control in (
        lost,  # for a moment, perhaps
        replace(lost, problem="sshd is not there", hint="look", attempts=1),
        ControlLink(Transport.SSH, 6.0, "silence"),
        ControlLink(Transport.SSH, 7.0, "silence"),
        ControlLink(Transport.VIRTIO_SERIAL, 8.0),
    ):
        picture.agent_found(replace(STATUS, control=control), [], [])
    told = [change for change in reader.changes if change.topic is Topic.LINK]
    assert [(change.state, change.details) for change in told] == [
        ("none", {"reason": "sshd is not there", "hint": "look"}),
        ("ssh", {"reason": "silence"}),
        ("virtio-serial", {}),
    ]
    picture.ended(lambda: STATUS)
    assert "link none" in reader.said()


def test_what_has_gone_while_nobody_could_tell_is_told() -> None:
    reader = Reader()
    picture = Picture(reader.tell)
    picture.agent_found(STATUS, [WEB, NAMES], [HOME, LOST])
    picture.agent_lost()
    told = len(reader.changes)
    starting = replace(STATUS, stage=Stage.STARTING, detail="", guest_connected=False, disk_state="full")
    picture.agent_found(starting, [NAMES], [HOME])
    assert reader.said()[told - 1 :] == [
        "host-agent away",
        "host-agent connected",
        "instance starting",
        "guest away",
        "disk full",
        "mount /disk gone",
        "port tcp localhost 8080 closed",
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_last_line_of_each_thing_is_how_it_is(seed: int) -> None:
    """Whatever happened, and whenever the agent was lost."""
    chance = random.Random(seed)
    reader = Reader()
    picture = Picture(reader.tell)
    ports: dict[int, ForwardState] = {}

    def rows() -> list[Forward]:
        return [replace(WEB, host_port=port, state=state) for port, state in ports.items()]

    picture.agent_found(STATUS, rows(), [])
    for _ in range(200):
        port = chance.randrange(1, 6)
        if chance.random() < 0.1:
            picture.agent_lost()
            picture.agent_found(STATUS, rows(), [])
        ports.pop(port, None)
        fields = {"port": str(port), "address": "localhost", "proto": "tcp"}
        kind = "closed"
        if chance.random() < 0.6:
            ports[port] = chance.choice([ForwardState.LISTENING, ForwardState.CONFLICT])
            kind = ports[port].value
        if chance.random() < 0.8:  # else it happens while nobody can tell
            picture.change(of_event(Event(0.0, f"port-{kind}", "", fields)))
        else:
            picture.agent_lost()
            picture.agent_found(STATUS, rows(), [])
    known = {change.thing: change for change in reader.changes if change.topic is Topic.PORT}
    there = {change.names["port"]: change.state for change in known.values() if change.state != "closed"}
    assert there == ports


# --- the instance ----------------------------------------------------------------------------------


async def test_an_instance_that_is_stopped_while_it_is_watched(instance: InstancePaths, lock: int) -> None:
    agent, reader = Agent(), Reader()
    # While it is asked something changes: that must not be lost.
    port = {"port": "8080", "address": "localhost", "proto": "tcp"}
    agent.on_forwards = lambda: agent.events.say("port-conflict", "taken", reason="by another", **port)
    agent.events.say("port-listening", "of before", port="1", address="localhost", proto="tcp")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instance_watch.watch, instance, reader.tell)
            async with running(instance, agent) as server:
                await reader.until("port tcp localhost 8080 conflict")
                agent.events.say("stage", "stopping", stage="stopping")
                agent.events.say("guest-lost", "gone")
                agent.events.say("stage", "stopped", stage="stopped")
                await server.farewell("stopped")
            os.close(lock)
    assert reader.said() == [
        *BEGIN,
        "port tcp localhost 8080 conflict",
        "instance stopping",
        "guest away",
        "host-agent away",
        "port tcp localhost 8080 closed",
        "mount /home/me gone",
        "instance stopped",
    ]


async def test_a_killed_agent_is_waited_for(instance: InstancePaths, lock: int) -> None:
    first, second, reader = Agent(), Agent(), Reader()
    second.rows, second.mounts = [NAMES], [HOME]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instance_watch.watch, instance, reader.tell)
            async with running(instance, first):
                told = await reader.until(BEGIN[-1])
            await reader.until("host-agent away")
            async with running(instance, second):
                await reader.until("port udp localhost 53 conflict")
                second.events.say("port-closed", "gone", port="53", address="localhost", proto="udp")
                await reader.until("port udp localhost 53 closed")
            os.close(lock)
    assert reader.said()[told:] == [
        "host-agent away",
        "host-agent connected",
        "port tcp localhost 8080 closed",
        "port udp localhost 53 conflict",
        "port udp localhost 53 closed",
        "host-agent away",
        "mount /home/me gone",
        "guest away",
        "instance stopped",
    ]


async def test_how_it_failed_is_the_last_word(instance: InstancePaths, lock: int) -> None:
    agent, reader = Agent(), Reader()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instance_watch.watch, instance, reader.tell)
            async with running(instance, agent) as server:
                await reader.until(BEGIN[-1])
                agent.events.say("stage", "QEMU ended", stage="failed")
                agent.events.say("failed", "QEMU ended", hint="start it again: agentctl up", code="7")
                await server.farewell("QEMU ended")
            state.save(
                instance.state, InstanceState(failure="QEMU ended", hint="start it again: agentctl up")
            )
            os.close(lock)
    assert (reader.said()[-1], reader.said().count("instance failed")) == ("instance failed", 1)
    assert reader.changes[-1].details == {"hint": "start it again: agentctl up"}


async def test_who_watches_for_ever_sees_the_next_start(instance: InstancePaths) -> None:
    reader = Reader()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: instance_watch.watch(instance, reader.tell, forever=True))
            assert await reader.until("instance stopped") == 1
            for _ in range(2):
                told = len(reader.changes)
                lock = state.try_lock(instance.lock)
                assert lock is not None
                async with running(instance, Agent()):
                    await reader.until(BEGIN[-1], told)
                os.close(lock)
                await reader.until("instance stopped", told)
            nursery.cancel_scope.cancel()


async def test_an_agent_of_another_version_is_said(
    instance: InstancePaths, lock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(20):
        async with running(instance, Agent()):
            monkeypatch.setattr("host_agent.client.hello", lambda name: replace(hello(name), major=99))
            with pytest.raises(UserError, match="of another version"):
                await instance_watch.watch(instance, Reader().tell)
    os.close(lock)


async def test_who_cannot_be_told_any_more_ends_the_watch(instance: InstancePaths, lock: int) -> None:
    def tell(change: Change) -> None:
        raise BrokenPipeError

    with trio.fail_after(20):
        async with running(instance, Agent()):
            with pytest.raises(BrokenPipeError):
                await instance_watch.watch(instance, tell)
    os.close(lock)


# --- the command -----------------------------------------------------------------------------------


async def test_the_command_prints_lines_and_ends_with_the_instance(
    instance: InstancePaths, lock: int
) -> None:
    command, sources = [sys.executable, "-m", "host_agent", "watch"], Path(__file__).parents[2]
    with trio.fail_after(60):
        async with running(instance, Agent()):
            process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=sources)
            assert process.stdout is not None
            output = b""
            while output.count(b"\n") < len(BEGIN):
                output += await process.stdout.receive_some()
        os.close(lock)
        async for data in process.stdout:
            output += data
        assert await process.wait() == 0
        # ^C is how it is ended otherwise, and no error.
        process = await trio.lowlevel.open_process(
            [*command, "--forever"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=sources
        )
        assert process.stdout is not None
        assert process.stderr is not None
        output += await process.stdout.receive_some()
        process.send_signal(signal.SIGINT)
        assert (await process.wait(), await process.stderr.receive_some()) == (130, b"")
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["topic"] for line in lines[:2]] == ["host-agent", "instance"]
    assert [(line["topic"], line["state"]) for line in lines[-2:]] == [("instance", "stopped")] * 2
