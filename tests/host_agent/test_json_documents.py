"""docs/json.md says what is printed: its examples have the keys that are there, all of them and no others."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import trio

from host_agent import show, state
from host_agent.cli import PLACES, cli
from host_agent.instance_load import as_object, between
from host_agent.instance_watch import Topic
from host_agent.paths import InstancePaths
from protocol.api import (
    Attachment,
    ControlLink,
    Event,
    ForwardState,
    GuestInfo,
    LinkState,
    PortRule,
    PortSettings,
    Proto,
    SocketForward,
    SocketRow,
    SocketRows,
    Stage,
    Transport,
    View,
    ViewPlace,
    ViewStage,
)
from tests.host_agent.command_line import agentctl
from tests.host_agent.stand_in import STATUS, Agent, running
from tests.host_agent.test_instance_load import LOOK

DOCUMENT = (Path(__file__).parents[2] / "docs" / "json.md").read_text()

_SECTION = re.compile(r"^## agentctl (.+)\n((?:(?!^## ).*\n?)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"```json\n(.*?)```", re.DOTALL)


def sections() -> dict[str, str]:
    """The text about each command, or form of one."""
    return {
        name.strip().removeprefix("agentctl "): text
        for names, text in _SECTION.findall(DOCUMENT)
        for name in names.split(",")
    }


def examples(command: str) -> list[Any]:
    """What stands in the document about ``command``: one value, or one of each line."""
    found = _EXAMPLE.search(sections()[command])
    assert found is not None, command
    try:
        return [json.loads(found[1])]
    except ValueError:
        return [json.loads(line) for line in found[1].splitlines()]


def shape(value: Any) -> Any:
    """The keys of ``value``, and of all that is in it; what is in a list is taken together."""
    match value:
        case dict():
            return {key: shape(each) for key, each in sorted(value.items())}
        case list():
            return [together([shape(each) for each in value])]
        case _:
            return None


def together(shapes: list[Any]) -> Any:
    """What all of them have."""
    if not all(isinstance(each, dict) for each in shapes) or not shapes:
        return next((each for each in shapes if each is not None), None)
    keys = sorted({key for each in shapes for key in each})
    return {key: together([each[key] for each in shapes if key in each]) for key in keys}


def commands(group: click.Group, words: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{words}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{words}{name} ")


def test_every_command_that_prints_json_is_in_the_document() -> None:
    printing = {
        name for name, command in commands(cli) if any("--json" in option.opts for option in command.params)
    }
    assert printing <= sections().keys()
    assert sections().keys() - printing == {"watch", "ports --watch"}
    assert {name.split()[0] for name in sections()} <= PLACES.keys()


STARTING = ("status", "up", "start", "restart", "attach")
MACHINE = Attachment("me@machine", LinkState.CONNECTED)
CONTROL = ControlLink(Transport.VIRTIO_SERIAL, 1.0)
RULE = PortRule(Proto.TCP, guest_port=8000, ports=11, host_ip="0.0.0.0", host_port=9000)


def full() -> Agent:
    """One that has everything there can be."""
    guest = GuestInfo("6.12", 39.5, 1, 2, 3, 4, 5, "tracefs", 6)
    sockets = SocketRows([SocketRow(SocketForward("/run/db.sock", "/db.sock"), ForwardState.LISTENING)])
    status = replace(STATUS, guest=guest, attached=MACHINE, control=CONTROL)
    return Agent(status=status, port_settings=PortSettings([RULE]), sockets=sockets)


@pytest.mark.parametrize("command", ["status", "list", "ports", "mounts", "forward list", "env", "doctor"])
async def test_what_is_printed_has_the_keys_of_the_document(instance: InstancePaths, command: str) -> None:
    lock = state.try_lock(instance.lock)
    assert lock is not None
    with trio.fail_after(60):
        async with running(instance, full()):
            done = await trio.to_thread.run_sync(agentctl, *command.split(), "--json")
    os.close(lock)
    expected = [shape(examples("status")[0])] if command == "list" else shape(examples(command)[0])
    printed = json.loads(done.stdout)
    if command == "env":
        printed.pop("PATH", None)
    assert shape(printed) == expected


def test_up_prints_what_status_prints(capsys: pytest.CaptureFixture[str]) -> None:
    guest = GuestInfo("6.12", 39.5, 1, 2, 3, 4, 5, "tracefs", 6)
    show.status_json(replace(STATUS, guest=guest, attached=MACHINE, control=CONTROL))
    printed = json.loads(capsys.readouterr().out)
    assert all(shape(examples(name)[0]) == shape(printed) for name in STARTING)
    said = {*re.findall(r"`(\w+)`", sections()["status"])}
    assert said >= {stage.value for stage in Stage} | {each.value for each in LinkState}
    assert {*re.findall(r"`([\w-]+)`", sections()["status"])} >= {each.value for each in Transport}


def test_what_view_prints(capsys: pytest.CaptureFixture[str]) -> None:
    show.view_json(View(ViewStage.MOUNTED, "/there", "me", True, places=[ViewPlace("volumes/db", False)]))
    assert shape(json.loads(capsys.readouterr().out)) == shape(examples("view")[0])


def test_the_lines_of_top() -> None:
    assert shape(as_object(between(LOOK, LOOK))) == shape(examples("top")[0])


def printed_by(function: Callable[[Event], None], event: Event) -> Any:
    with redirect_stdout(io.StringIO()) as output:
        function(event)
    return json.loads(output.getvalue())


def test_the_lines_of_ports_as_they_change() -> None:
    port = {"port": "8080", "address": "localhost", "proto": "tcp"}
    first = printed_by(show.change_json, Event(1.0, "port-listening", "there", port))
    second = printed_by(show.change_json, Event(1.0, "port-conflict", "no", {"path": "/x", "reason": "why"}))
    assert [shape(each) for each in examples("ports --watch")] == [shape(first), shape(second)]


def test_the_lines_of_watch() -> None:
    for line in examples("watch"):
        assert list(line)[:4] == ["time", "topic", "state", "message"]
        named = {"mount": {"path"}, "port": {"proto", "address", "port"}}.get(line["topic"], set())
        assert set(line) - {"time", "topic", "state", "message", "reason", "hint"} in (named, {"path"})
    table = sections()["watch"]
    assert {*re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)} == {topic.value for topic in Topic}
    words = {*re.findall(r"`([\w-]+)`", table)}
    assert words >= {stage.value for stage in Stage} | {each.value for each in ForwardState} - {"ignored"}
