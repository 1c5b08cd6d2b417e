"""A client of QEMU's monitor: JSON lines over a unix socket, answers by id, events as they come.

The law here: QEMU may die, stall or talk nonsense at any moment, and each of these costs its caller a
``QmpError`` or ``QmpClosed`` and nothing more: no hang, no unbounded memory, no half-sent command that
a later one continues. ``QmpDecoder`` is sans-IO; ``QmpClient`` is the only part that touches a stream.
Protocol: QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio
from trio import TaskStatus

# The longest line of QEMU 7.2 is the answer to query-qmp-schema, 207,000 bytes.
MAX_LINE = 1 << 20

# A VM of ours emits a few events in its life, and a few hundred when ports come and go; whoever does
# not read them loses the newest, counted in ``QmpClient.events_dropped``.
MAX_EVENTS = 256

RECEIVE_CHUNK = 1 << 16


class QmpError(Exception):
    """QEMU refused a command. ``error_class`` is QAPI's (mostly ``GenericError``), ``desc`` is for people."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc


class QmpClosed(Exception):
    """The monitor is gone, usually because QEMU is; whatever was asked of it has no answer."""


class QmpProtocolError(QmpClosed):
    """What came is not QMP; the connection is given up."""


class QmpTimeout(QmpClosed):
    """QEMU did not answer in time: it is stuck, or another client has its only monitor connection."""


@dataclass(frozen=True, slots=True)
class QmpGreeting:
    """The first line: which QEMU this is, as (major, minor, micro)."""

    version: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class QmpReturn:
    """The answer to command ``id``; ``value`` is JSON as Python has it."""

    id: int
    value: Any


@dataclass(frozen=True, slots=True)
class QmpFailure:
    """The refusal of command ``id``."""

    id: int
    error_class: str
    desc: str


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """Something that happened in QEMU. ``timestamp`` is in seconds since the epoch by QEMU's clock."""

    name: str
    data: Mapping[str, Any]
    timestamp: float


QmpMessage = QmpGreeting | QmpReturn | QmpFailure | QmpEvent


class QmpDecoder:
    """Bytes in, messages out; any split of the bytes gives the same messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> list[QmpMessage]:
        """The messages completed by ``data``. Raises QmpProtocolError; the decoder is then of no more use."""
        start = len(self._buffer)
        self._buffer += data
        messages = []
        while (end := self._buffer.find(b"\n", start)) >= 0:
            _check_line(end)
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            start = 0
            if line:
                messages.append(parse_line(line))
        _check_line(len(self._buffer))
        return messages


def _check_line(length: int) -> None:
    if length > MAX_LINE:
        raise QmpProtocolError(f"a QMP line is longer than {MAX_LINE} bytes")


def encode_command(command: str, arguments: Mapping[str, Any], command_id: int) -> bytes:
    """One command as QEMU reads it."""
    return json.dumps({"execute": command, "arguments": dict(arguments), "id": command_id}).encode() + b"\n"


def parse_line(line: bytes) -> QmpMessage:
    """The message in one line. Raises QmpProtocolError."""
    try:
        message = json.loads(line)
        return _message(message)
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
        raise QmpProtocolError(f"not a QMP message: {line[:80]!r}") from error


def _message(message: dict[str, Any]) -> QmpMessage:
    """Raises KeyError, TypeError or ValueError when the shape is wrong."""
    match message:
        case {"QMP": {"version": {"qemu": version}}}:
            return QmpGreeting((int(version["major"]), int(version["minor"]), int(version["micro"])))
        case {"event": str(name), "timestamp": stamp}:
            return QmpEvent(name, dict(message.get("data", {})), _seconds(stamp))
        case {"return": value, "id": int(command_id)}:
            return QmpReturn(command_id, value)
        case {"error": error, "id": int(command_id)}:
            return QmpFailure(command_id, str(error["class"]), str(error["desc"]))
        case _:
            raise ValueError("no known kind")


def _seconds(stamp: Mapping[str, Any]) -> float:
    """QEMU gives -1 for both when its clock fails; that is NaN here."""
    seconds = float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
    return seconds if seconds >= 0 else math.nan


class _Pending:
    """A command waiting for its answer."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: QmpReturn | QmpFailure | None = None


class QmpClient:
    """One monitor connection. ``await nursery.start(client.run)``, then ``execute``; read ``events``.

    ``events`` ends when the connection does. QEMU serves one client per monitor socket at a time, so
    hold a client no longer than it is needed, or share it.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._decoder = QmpDecoder()
        self._received: deque[QmpMessage] = deque()
        self._send_lock = trio.Lock()
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._scope = trio.CancelScope()
        self._closed: QmpClosed | None = None
        self._publish_events, self.events = trio.open_memory_channel[QmpEvent](MAX_EVENTS)
        self.version = (0, 0, 0)
        self.events_dropped = 0

    @property
    def closed(self) -> QmpClosed | None:
        """Why the connection is over, None while it is not."""
        return self._closed

    async def run(
        self, *, timeout: float = 5.0, task_status: TaskStatus[QmpClient] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own the stream until it ends or the caller cancels. Started once commands are accepted.

        Raises QmpClosed when it does not get that far in ``timeout`` seconds. Later the end of the
        connection is told to whoever has a command pending, and this returns.
        """
        negotiated = False
        try:
            async with self._stream:
                with self._scope:
                    await self._negotiate(timeout)
                    negotiated = True
                    task_status.started(self)
                    while True:
                        self._dispatch(await self._next())
        except QmpClosed as reason:
            self._close(reason)
            if not negotiated:
                raise
        finally:
            self._close(QmpClosed("the monitor connection was closed"))

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> Any:
        """Run a command and return its value (JSON as Python has it). ``timeout`` is in seconds.

        Raises QmpError when QEMU refuses it, QmpTimeout, QmpClosed. A command whose wait is cancelled
        may still be carried out.
        """
        command_id, pending = next(self._ids), _Pending()
        self._pending[command_id] = pending
        try:
            with trio.move_on_after(timeout) as deadline:
                await self._send(encode_command(command, arguments or {}, command_id))
                await pending.done.wait()
        finally:
            del self._pending[command_id]
        match pending.answer:
            case QmpReturn(value=value):
                return value
            case QmpFailure(error_class=error_class, desc=desc):
                raise QmpError(error_class, desc)
        if deadline.cancelled_caught:
            raise QmpTimeout(f"QEMU did not answer {command} in {timeout:g} s")
        raise self._reason()

    async def _negotiate(self, timeout: float) -> None:
        with trio.move_on_after(timeout) as deadline:
            greeting = await self._next()
            if not isinstance(greeting, QmpGreeting):
                raise QmpProtocolError("QEMU's monitor did not greet")
            self.version = greeting.version
            await self._send(encode_command("qmp_capabilities", {}, 0))
            while not isinstance(answer := await self._next(), QmpReturn | QmpFailure):
                self._dispatch(answer)
            if isinstance(answer, QmpFailure):
                raise QmpProtocolError(f"QEMU refused qmp_capabilities: {answer.desc}")
        if deadline.cancelled_caught:
            raise QmpTimeout(f"QEMU's monitor was silent for {timeout:g} s")

    async def _next(self) -> QmpMessage:
        while not self._received:
            try:
                data = await self._stream.receive_some(RECEIVE_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                raise QmpClosed("QEMU closed its monitor")
            self._received.extend(self._decoder.receive_data(bytes(data)))
        return self._received.popleft()

    async def _send(self, line: bytes) -> None:
        async with self._send_lock:
            if self._closed:
                raise self._reason()
            try:
                await self._stream.send_all(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._close(QmpClosed("QEMU closed its monitor"))
                raise self._reason() from None
            except trio.Cancelled:
                # Part of the line may be on its way, and the next command would continue it.
                self._close(QmpClosed("a command was cut short"))
                raise

    def _dispatch(self, message: QmpMessage) -> None:
        match message:
            case QmpEvent():
                self._publish(message)
            case QmpReturn(id=command_id) | QmpFailure(id=command_id):
                # No such command: its caller stopped waiting.
                if pending := self._pending.get(command_id):
                    pending.answer = message
                    pending.done.set()
            case QmpGreeting():
                raise QmpProtocolError("QEMU's monitor greeted twice")

    def _publish(self, event: QmpEvent) -> None:
        try:
            self._publish_events.send_nowait(event)
        except trio.WouldBlock:
            self.events_dropped += 1
        except trio.BrokenResourceError:
            pass  # the reader closed its end: nobody wants events

    def _close(self, reason: QmpClosed) -> None:
        """The first reason is the one that is told."""
        if self._closed is None:
            self._closed = reason
            self._publish_events.close()
            for pending in self._pending.values():
                pending.done.set()
            self._scope.cancel()

    def _reason(self) -> QmpClosed:
        """A fresh exception for each caller, since a raised one carries its caller's traceback."""
        reason = self._closed or QmpClosed("the monitor connection is not open")
        return type(reason)(*reason.args)


@asynccontextmanager
async def connect_qmp(socket: Path, *, timeout: float = 5.0) -> AsyncIterator[QmpClient]:
    """A client of the monitor at ``socket``, for the length of a block.

    Raises QmpClosed when nothing listens there, QmpTimeout when it does not greet in ``timeout`` seconds.
    """
    try:
        stream = await trio.open_unix_socket(socket)
    except OSError as error:
        raise QmpClosed(f"no monitor at {socket}: {error.strerror or error}") from None
    try:
        async with trio.open_nursery() as nursery:
            client: QmpClient = await nursery.start(partial(QmpClient(stream).run, timeout=timeout))
            try:
                yield client
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # ``run`` raises nothing by now, so what is here is what the block raised.
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
