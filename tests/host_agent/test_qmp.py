"""QMP: the decoder by any split, the client against a scripted QEMU and against the real one."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from host_agent import qmp
from host_agent.qmp import (
    QmpClient,
    QmpClosed,
    QmpDecoder,
    QmpError,
    QmpEvent,
    QmpFailure,
    QmpGreeting,
    QmpProtocolError,
    QmpReturn,
    QmpTimeout,
    connect_qmp,
)

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}\r\n'
)
STOP = b'{"timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "STOP"}\r\n'
TRANSCRIPT = (
    GREETING
    + b'{"return": {}, "id": 0}\r\n'
    + STOP
    + b"\r\n"
    + b'{"error": {"class": "GenericError", "desc": "no \\u00fc"}, "id": 7}\n'
    + b'{"return": [1, null, "x"], "id": 8}\r\n'
)
MESSAGES = [
    QmpGreeting((7, 2, 22)),
    QmpReturn(0, {}),
    QmpEvent("STOP", {}, 1700000000.25),
    QmpFailure(7, "GenericError", "no ü"),
    QmpReturn(8, [1, None, "x"]),
]


# --- the decoder -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, len(TRANSCRIPT))))
def test_any_split_gives_the_same_messages(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(TRANSCRIPT)]
    decoder = QmpDecoder()
    pieces = [TRANSCRIPT[a:b] for a, b in itertools.pairwise(edges)]
    assert [message for piece in pieces for message in decoder.receive_data(piece)] == MESSAGES


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_protocol_error(data: bytes) -> None:
    with suppress(QmpProtocolError):
        QmpDecoder().receive_data(data + b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"17",
        b'{"return": {}}',
        b'{"return": {}, "id": "one"}',
        b'{"error": {"class": "GenericError", "desc": "parse error"}}',
        b'{"error": "x", "id": 1}',
        b'{"event": "STOP"}',
        b'{"event": "STOP", "timestamp": {"seconds": 1e999, "microseconds": "x"}}',
        b'{"QMP": {"version": {"qemu": {"major": "seven"}}}}',
        b"[" * 100_000,
    ],
)
def test_other_lines_are_protocol_errors(line: bytes) -> None:
    with pytest.raises(QmpProtocolError):
        QmpDecoder().receive_data(line + b"\n")


def test_a_line_without_end_is_refused() -> None:
    decoder = QmpDecoder()
    assert decoder.receive_data(b"x" * qmp.MAX_LINE) == []
    with pytest.raises(QmpProtocolError, match="longer than"):
        decoder.receive_data(b"x")


def test_an_unknown_time_is_nan() -> None:
    line = b'{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "RESUME", "data": {"a": 1}}\n'
    (event,) = QmpDecoder().receive_data(line)
    assert isinstance(event, QmpEvent)
    assert math.isnan(event.timestamp)
    assert event.data == {"a": 1}


# --- the client against a script -------------------------------------------------------------------


class ScriptedQemu:
    """The other end of the socket: reads commands, says what the test tells it to."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def command(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some()
            assert data, "the client closed"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        command: dict[str, Any] = json.loads(line)
        return command

    async def say(self, message: dict[str, Any]) -> None:
        await self.stream.send_all(json.dumps(message).encode() + b"\r\n")

    async def negotiate(self) -> None:
        await self.stream.send_all(GREETING)
        command = await self.command()
        assert command["execute"] == "qmp_capabilities"
        await self.say({"return": {}, "id": command["id"]})


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[QmpClient, ScriptedQemu, trio.Nursery]]:
    ours, theirs = trio.socket.socketpair()
    client, server = QmpClient(trio.SocketStream(ours)), ScriptedQemu(trio.SocketStream(theirs))
    async with server.stream, trio.open_nursery() as nursery:
        nursery.start_soon(server.negotiate)
        await nursery.start(client.run)
        yield client, server, nursery
        nursery.cancel_scope.cancel()


async def test_negotiates_and_executes() -> None:
    async with scripted() as (client, server, nursery):
        assert client.version == (7, 2, 22)

        async def serve() -> None:
            command = await server.command()
            assert command == {"execute": "device_del", "arguments": {"id": "data"}, "id": command["id"]}
            await server.say({"return": {"ok": True}, "id": command["id"]})

        nursery.start_soon(serve)
        assert await client.execute("device_del", {"id": "data"}) == {"ok": True}


async def test_answers_find_their_commands_in_any_order() -> None:
    async with scripted() as (client, server, _nursery):
        answers = {}

        async def ask(name: str) -> None:
            answers[name] = await client.execute(name)

        async with trio.open_nursery() as askers:
            askers.start_soon(ask, "first")
            askers.start_soon(ask, "second")
            commands = [await server.command(), await server.command()]
            for command in reversed(commands):
                await server.say({"return": command["execute"].upper(), "id": command["id"]})
        assert answers == {"first": "FIRST", "second": "SECOND"}


async def test_a_refusal_is_an_error_of_that_command_only() -> None:
    async with scripted() as (client, server, nursery):

        async def serve() -> None:
            command = await server.command()
            error = {"class": "DeviceNotFound", "desc": "Device 'data' not found"}
            await server.say({"error": error, "id": command["id"]})
            command = await server.command()
            await server.say({"return": {}, "id": command["id"]})

        nursery.start_soon(serve)
        with pytest.raises(QmpError, match="Device 'data' not found") as caught:
            await client.execute("device_del", {"id": "data"})
        assert caught.value.error_class == "DeviceNotFound"
        assert await client.execute("query-status") == {}


async def test_events_arrive_and_end_with_the_connection() -> None:
    async with scripted() as (client, server, _nursery):
        await server.stream.send_all(STOP + STOP)
        await server.stream.send_eof()
        assert [event.name async for event in client.events] == ["STOP", "STOP"]
        assert isinstance(client.closed, QmpClosed)


async def test_unread_events_are_dropped_and_counted() -> None:
    async with scripted() as (client, server, nursery):
        nursery.start_soon(server.stream.send_all, STOP * (qmp.MAX_EVENTS + 3))
        while client.events_dropped < 3:
            await trio.lowlevel.checkpoint()
        assert client.closed is None


@pytest.mark.parametrize(
    ("last_words", "expected"),
    [(b"", QmpClosed), (b"not json\n", QmpProtocolError), (GREETING, QmpProtocolError)],
    ids=["dies", "garbage", "greets again"],
)
async def test_the_end_of_qemu_fails_what_is_pending_and_what_comes_after(
    last_words: bytes, expected: type[QmpClosed]
) -> None:
    async with scripted() as (client, server, nursery):

        async def die() -> None:
            await server.command()
            if last_words:
                await server.stream.send_all(last_words)
            else:
                await server.stream.aclose()

        nursery.start_soon(die)
        with pytest.raises(expected) as caught:
            await client.execute("query-status")
        assert type(caught.value) is expected
        with pytest.raises(expected):
            await client.execute("query-status")


async def test_no_answer_is_a_timeout_and_a_late_one_is_ignored(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scripted() as (client, server, nursery):
        with pytest.raises(QmpTimeout, match="did not answer query-status in 10 s"):
            await client.execute("query-status")
        late = await server.command()

        async def serve() -> None:
            await server.say({"return": "late", "id": late["id"]})
            command = await server.command()
            await server.say({"return": "now", "id": command["id"]})

        nursery.start_soon(serve)
        assert await client.execute("query-status") == "now"


async def test_a_command_cut_short_ends_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    async with scripted() as (client, _server, _nursery):
        with pytest.raises(QmpTimeout):
            await client.execute("human-monitor-command", {"command-line": "x" * (8 << 20)}, timeout=1)
        with pytest.raises(QmpClosed, match="cut short"):
            await client.execute("query-status")


async def test_a_silent_monitor_times_out(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.socket.socketpair()
    with theirs:
        async with trio.open_nursery() as nursery:
            with pytest.raises(QmpTimeout, match="silent for 5 s"):
                await nursery.start(QmpClient(trio.SocketStream(ours)).run)


@pytest.mark.parametrize("answer", [b'{"error": {"class": "GenericError", "desc": "no"}, "id": 0}\n', b""])
async def test_a_monitor_that_does_not_negotiate_is_refused(answer: bytes) -> None:
    ours, theirs = trio.socket.socketpair()
    async with trio.SocketStream(theirs) as server, trio.open_nursery() as nursery:
        await server.send_all(GREETING + answer if answer else STOP)
        with pytest.raises(QmpProtocolError):
            await nursery.start(QmpClient(trio.SocketStream(ours)).run)


async def test_nothing_listening_is_closed(tmp_path: Path) -> None:
    with pytest.raises(QmpClosed, match="no monitor at"):
        async with connect_qmp(tmp_path / "qmp.sock"):
            pass


# --- the client against QEMU -----------------------------------------------------------------------

QEMU = shutil.which("qemu-system-x86_64")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")


@contextmanager
def real_qemu(path: Path) -> Iterator[None]:
    """A QEMU without a machine, its monitor at ``path``: it inherits a socket that listens already."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        chardev = f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"
        argv = [str(QEMU), "-M", "none", "-S", "-nodefaults", "-display", "none", "-chardev", chardev]
        process = subprocess.Popen([*argv, "-mon", "chardev=qmp,mode=control"], pass_fds=[listener.fileno()])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@needs_qemu
async def test_real_qemu_answers_refuses_and_quits(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with real_qemu(path):
        async with connect_qmp(path) as client:
            assert client.version >= (6, 0, 0)
            assert (await client.execute("query-status"))["status"] == "prelaunch"
            with pytest.raises(QmpError) as caught:
                await client.execute("no-such-command")
            assert caught.value.error_class == "CommandNotFound"
            assert len(await client.execute("query-qmp-schema")) > 100
            await client.execute("quit")
            assert [event.name async for event in client.events] == ["SHUTDOWN"]
            with pytest.raises(QmpClosed):
                await client.execute("query-status")


@needs_qemu
async def test_a_second_client_of_real_qemu_times_out_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with real_qemu(path):
        async with connect_qmp(path) as client:
            with pytest.raises(QmpTimeout):
                async with connect_qmp(path, timeout=0.2):
                    pass
            assert (await client.execute("query-status"))["running"] is False
