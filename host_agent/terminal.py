"""The user's end of a shell or exec session: this process's stdin, stdout, stderr and terminal.

The law: the terminal is given back as it was found, however the session ends; the exit status is the
guest process's own, as a shell would give it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator

import trio

from host_agent.errors import ExitCode, UserError
from host_agent.groups import collapsed
from protocol import execio
from protocol.api import Exec, WindowSize
from protocol.errors import DecodeError, OpenRefused
from protocol.link import Link, MuxStream

#: What one read of stdin takes at the most: half a packet's limit.
CHUNK = 32 * 1024

#: Signals that are passed on to the guest's process when there is no terminal to turn keys into signals.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

#: Signals that end a session with a terminal. The guest's process is hung up by the end of its stream.
_ENDING = (signal.SIGTERM, signal.SIGHUP)

#: What a terminal that does not know its size counts as.
_USUAL_SIZE = os.terminal_size((80, 24))


def window_size() -> WindowSize:
    """The size of the terminal that is our stdin; the environment may still tell that of long ago."""
    try:
        size = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        size = _USUAL_SIZE
    if not (size.lines and size.columns):
        size = _USUAL_SIZE
    return WindowSize(rows=size.lines, columns=size.columns)


async def run(link: Link, target: Exec) -> int:
    """Run ``target`` in the guest with our standard streams; its exit status.

    Raises ``UserError`` if the guest would not start it or the connection was lost.
    """
    try:
        stream = await link.open(target)
    except OpenRefused as error:
        raise UserError(error.message, error.hint, ExitCode.GUEST) from None
    try:
        with _raw_terminal(enabled=target.tty is not None), collapsed():
            return await _Session(stream, with_tty=target.tty is not None).run()
    except DecodeError as error:
        raise UserError(
            f"the guest agent answered nonsense: {error}", "see: agentctl logs", ExitCode.GUEST
        ) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise UserError(
            "the connection to the guest was lost while the command ran",
            "see: agentctl status",
            ExitCode.GUEST,
        ) from None


@contextlib.contextmanager
def _raw_terminal(*, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        # Not the default TCSAFLUSH: it would throw away what was typed while the shell was starting.
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        # A terminal that has gone away needs nothing back.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class _Session:
    def __init__(self, stream: MuxStream, *, with_tty: bool) -> None:
        self._stream = stream
        self._with_tty = with_tty
        self._sending = trio.Lock()

    async def run(self) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_input)
            nursery.start_soon(self._pass_signals)
            status = await self._receive_output()
            nursery.cancel_scope.cancel()
        return status

    async def _send(self, packet: execio.Packet) -> None:
        async with self._sending:
            await self._stream.send_all(execio.encode(packet))

    async def _send_input(self) -> None:
        descriptor = sys.stdin.fileno()
        try:
            while data := await _read(descriptor):
                await self._send(execio.Stdin(data))
            await self._send(execio.StdinEof())
        except trio.BrokenResourceError:
            # The process has ended and does not read on; its exit status is on the way.
            return

    async def _pass_signals(self) -> None:
        wanted = (signal.SIGWINCH, *_ENDING) if self._with_tty else _FORWARDED
        with trio.open_signal_receiver(*wanted) as received, contextlib.suppress(trio.BrokenResourceError):
            async for number in received:
                if number == signal.SIGWINCH:
                    size = window_size()
                    await self._send(execio.Resize(size.rows, size.columns))
                elif self._with_tty:
                    # Through all the blocks that give the terminal back, which dying of it would not do.
                    raise SystemExit(128 + number)
                else:
                    await self._send(execio.Signal(number))

    async def _receive_output(self) -> int:
        decoder = execio.Decoder()
        while data := await self._stream.receive_some():
            for packet in decoder.receive_data(data):
                match packet:
                    case execio.Stdout(content):
                        await _write(sys.stdout.fileno(), content)
                    case execio.Stderr(content):
                        await _write(sys.stderr.fileno(), content)
                    case execio.Exit(code):
                        return code
        raise trio.BrokenResourceError("the stream ended without an exit status")


async def _read(descriptor: int) -> bytes:
    """What there is to read; b"" at the end of file, or when nobody is at the terminal any more."""
    try:
        await trio.lowlevel.wait_readable(descriptor)
    except OSError:
        # Regular files and /dev/null cannot be polled, and never block for long.
        return await trio.to_thread.run_sync(os.read, descriptor, CHUNK)
    try:
        return os.read(descriptor, CHUNK)
    except OSError:
        return b""


async def _write(descriptor: int, content: bytes) -> None:
    """All of ``content``, in a thread: our stdout may be a pipe that nobody reads just now."""
    view = memoryview(content)
    while view:
        try:
            view = view[await trio.to_thread.run_sync(os.write, descriptor, view, abandon_on_cancel=True) :]
        except BrokenPipeError:
            # Like any filter whose reader went away (`agentctl exec cat big | head`).
            raise SystemExit(128 + signal.SIGPIPE) from None
        except BlockingIOError:
            await trio.lowlevel.wait_writable(descriptor)
