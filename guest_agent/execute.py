"""Processes for the host: the handler of ``Exec`` streams.

The law: the host sees what a shell in the guest would have seen. All the process wrote comes before its
exit code; a host that stops reading stops the process's writing, and the other way round; when the
stream or the link breaks, the process and its group are hung up on, then killed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from guest_agent.spawn import CannotExecute, Child, find_account, may_become, spawn
from protocol import execio
from protocol.api import Exec, WindowSize
from protocol.errors import DecodeError, ErrorCode
from protocol.link import Incoming, MuxStream, Service

log = logging.getLogger(__name__)

CHUNK = execio.MAX_DATA

IDLE_GRACE = 0.5
"""Seconds without output after the exit until the output counts as complete, if a background child
still holds the pipe open (``daemon &``). What the process itself wrote is in the pipe by then."""

BUSY_GRACE = 5.0
"""Seconds that a background child's output is still carried after the exit if it never pauses."""

PIPE_BYTES = 64 * 1024
"""A pipe's capacity (pipe(7)): so much after the exit may still be the process's own output."""

FAREWELL = 5.0
"""Seconds for the host to close its direction after the exit code; closing at once would reset the
stream, and a reset may overtake what has not been read yet."""

KINDS: tuple[Callable[[bytes], execio.Packet], ...] = (execio.Stdout, execio.Stderr)
"""What a child's outputs are sent as; a terminal has but one."""


class ExecSession:
    """One process and the stream it is used through."""

    def __init__(self, stream: MuxStream, child: Child) -> None:
        self._stream = stream
        self._child = child
        self._sending = trio.Lock()
        self._exited_at: float | None = None
        self._reading: set[trio.CancelScope] = set()
        self._host_ended = trio.Event()

    async def run(self) -> None:
        """Until the exit code is delivered. Raises what the stream raises when it breaks (grouped)."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear)
            async with trio.open_nursery() as speakers:
                for output, packet in zip(self._child.outputs, KINDS, strict=False):
                    speakers.start_soon(self._say, output, packet)
                code = await self._child.process.wait()
                self._note_exit()
            await self._send(execio.Exit(code if code >= 0 else 128 - code))
            await self._stream.send_eof()
            with trio.move_on_after(FAREWELL):
                await self._host_ended.wait()
            nursery.cancel_scope.cancel()

    async def _send(self, packet: execio.Packet) -> None:
        async with self._sending:
            await self._stream.send_all(execio.encode(packet))

    # --- host -> process -------------------------------------------------------------------------

    async def _hear(self) -> None:
        decoder = execio.Decoder()
        while data := await self._stream.receive_some(CHUNK):
            for packet in decoder.receive_data(data):
                await self._obey(packet)
        decoder.receive_eof()
        self._host_ended.set()
        await self._child.end_input()

    async def _obey(self, packet: execio.Packet) -> None:
        match packet:
            case execio.Stdin(data):
                # One that no longer reads is not the writer's error, as in a shell's pipe.
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._child.stdin.send_all(data)
            case execio.StdinEof():
                await self._child.end_input()
            case execio.Resize(rows, columns):
                self._child.resize(WindowSize(rows, columns))
            case execio.Signal(number):
                self._child.signal(number)
            case _:
                raise DecodeError(f"{type(packet).__name__} does not come from a host")

    # --- process -> host -------------------------------------------------------------------------

    async def _say(self, output: trio.abc.ReceiveStream, packet: Callable[[bytes], execio.Packet]) -> None:
        after_exit = 0
        while data := await self._read(output):
            await self._send(packet(data))
            if self._exited_at is not None:
                after_exit += len(data)
                lingered = trio.current_time() - self._exited_at
                if lingered > BUSY_GRACE and after_exit >= PIPE_BYTES:
                    return

    async def _read(self, output: trio.abc.ReceiveStream) -> bytes:
        """Output, or b"" when there will be none: its end, or silence after the exit."""
        deadline = math.inf if self._exited_at is None else trio.current_time() + IDLE_GRACE
        with trio.CancelScope(deadline=deadline) as scope:
            self._reading.add(scope)
            try:
                return bytes(await output.receive_some(CHUNK))
            except trio.BrokenResourceError:
                return b""  # EIO: the last process has closed the terminal
            finally:
                self._reading.discard(scope)
        return b""

    def _note_exit(self) -> None:
        self._exited_at = trio.current_time()
        for scope in self._reading:
            scope.deadline = self._exited_at + IDLE_GRACE


async def execute(default_user: Callable[[], str], target: Exec, incoming: Incoming) -> None:
    """Handler of ``Exec`` streams; ``default_user`` names the user for those that name none."""
    name = target.user or default_user()
    try:
        account = find_account(name)
    except KeyError:
        return await incoming.refuse(ErrorCode.NOT_FOUND, f"there is no user {name!r} in the guest")
    if not may_become(account):
        return await incoming.refuse(ErrorCode.DENIED, f"this agent cannot act as {name!r}")
    stream = await incoming.accept()
    try:
        child = await spawn(target, account)
    except CannotExecute as error:
        return await _say_goodbye(stream, error)
    return await _attend(stream, child, target)


async def _attend(stream: MuxStream, child: Child, target: Exec) -> None:
    try:
        await ExecSession(stream, child).run()
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        log.info("exec.hangup argv=%r pid=%d", target.argv[:1], child.process.pid)
    except* DecodeError as errors:
        await stream.reset(ErrorCode.PROTOCOL, str(errors.exceptions[0]))
    finally:
        await child.aclose()
    log.debug("exec.end argv=%r code=%s", target.argv[:1], child.process.returncode)


async def _say_goodbye(stream: MuxStream, error: CannotExecute) -> None:
    """There never was a process: say why as a shell would, and wait until it has been heard."""
    try:
        for packet in (execio.Stderr(f"agentctl: {error}\n".encode()), execio.Exit(error.code)):
            await stream.send_all(execio.encode(packet))
        await stream.send_eof()
        with trio.move_on_after(FAREWELL):
            while await stream.receive_some(CHUNK):
                pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # nobody is left to hear it


def register(service: Service, default_user: Callable[[], str]) -> None:
    """Answer ``Exec`` on a link."""
    service.on_stream(Exec, partial(execute, default_user))
