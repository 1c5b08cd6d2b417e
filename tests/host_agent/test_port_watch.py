"""Ports as they are, then as they change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from host_agent import port_watch
from host_agent.api_server import Answers, ApiServer
from host_agent.errors import UserError
from host_agent.events import EventLog
from host_agent.paths import InstancePaths
from protocol.api import Event, Forward, Forwards, ForwardState, Proto

ROW = Forward(Proto.TCP, "0.0.0.0", 80, "localhost", 8080, ForwardState.LISTENING, unit="docker.service")
TAKEN = Forward(Proto.UDP, "::", 53, "0.0.0.0", 53, ForwardState.CONFLICT, "port 53 is in use")
INSIDE = Forward(Proto.TCP, "::", 22, "", 0, ForwardState.IGNORED, "SSH")
SOCKET = replace(ROW, host_address="/run/web.sock", host_port=0)


def test_what_is_there_is_told_as_changes_to_it() -> None:
    events = list(port_watch.current([ROW, replace(ROW, guest_address="::"), INSIDE, TAKEN, SOCKET]))
    assert [(event.kind, event.message, event.fields) for event in events] == [
        (
            "port-listening",
            "localhost:8080 is forwarded to the VM",
            {"port": "8080", "address": "localhost", "proto": "tcp"},
        ),
        (
            "port-conflict",
            "0.0.0.0:53/udp is not forwarded: port 53 is in use",
            {"port": "53", "address": "0.0.0.0", "proto": "udp", "reason": "port 53 is in use"},
        ),
        ("port-listening", "/run/web.sock is forwarded to the VM", {"path": "/run/web.sock"}),
    ]


def test_a_line_has_numbers_where_numbers_are() -> None:
    event = Event(1.5, "port-closed", "gone", {"port": "80", "address": "localhost", "proto": "tcp"})
    assert port_watch.as_object(event) == {
        "time": 1.5,
        "kind": "port-closed",
        "message": "gone",
        "port": 80,
        "address": "localhost",
        "proto": "tcp",
        "state": "closed",
    }
    assert "state" not in port_watch.as_object(Event(1.5, "port-limit", "too many"))


async def test_first_what_is_then_what_changes_and_nothing_of_before(instance: InstancePaths) -> None:
    events = EventLog(lambda: 0.0)
    events.say("port-listening", "long ago", port="1")

    def forwards() -> Forwards:
        # While the table is asked for something changes: that must not be lost, nor come first.
        publish("port-closed", "meanwhile")
        return Forwards([ROW])

    def publish(kind: str, message: str) -> None:
        events.publish(Event(0.0, kind, message, {}))  # whatever the clock says, which may be set back

    async def never(*_: object) -> object:
        raise NotImplementedError

    answers = Answers(**{**dict.fromkeys(Answers.__slots__, never), "forwards": forwards})  # type: ignore[arg-type]
    server = ApiServer(instance.agent_socket, answers, events)
    told: list[str] = []

    def say(event: Event) -> None:
        told.append(event.message)
        if event.message == "meanwhile":
            publish("stage", "ready")
            publish("port-listening", "later")
        if event.message == "later":
            scope.cancel()

    scope = trio.CancelScope()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            with scope:
                await port_watch.watch(instance, say)
            nursery.cancel_scope.cancel()
    assert told == ["localhost:8080 is forwarded to the VM", "meanwhile", "later"]


async def test_who_cannot_be_told_any_more_ends_the_watch(instance: InstancePaths) -> None:
    """Of `ports --watch | head -1`, which must not go on for ever."""
    events = EventLog()

    async def never(*_: object) -> object:
        raise NotImplementedError

    answers = Answers(
        **{**dict.fromkeys(Answers.__slots__, never), "forwards": lambda: Forwards([])}  # type: ignore[arg-type]
    )
    server = ApiServer(instance.agent_socket, answers, events)

    def say(event: Event) -> None:
        raise BrokenPipeError

    async def change() -> None:
        while True:
            events.say("port-listening", "something")
            await trio.sleep(0.01)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(change)
            with pytest.raises(BrokenPipeError):
                await port_watch.watch(instance, say)
            nursery.cancel_scope.cancel()


async def test_the_end_of_the_agent_is_the_end_of_watching(instance: InstancePaths) -> None:
    with pytest.raises(UserError, match="instance default is not running"):
        await port_watch.watch(instance, lambda event: None)
