"""``agentctl cp``: files from this machine into the VM, and out of it, over the link.

The guest's end is a process there (``guest_agent.copying``), started like any that ``exec`` starts; ours is a
thread that reads or writes files, and a pipe between it and the stream. The law: whatever ends first ends the
others, and then no half of a file is left on either side.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from host_agent.errors import ExitCode, UserError
from host_agent.groups import collapsed
from host_agent.paths import InstancePaths
from host_agent.remote import record
from protocol import execio
from protocol.api import Exec
from protocol.errors import DecodeError, OpenRefused
from protocol.link import Link, MuxStream
from protocol.treecopy import MAX_PIECE, Cut
from protocol.treereceive import CannotReceive, Receiver
from protocol.treesend import Sender

#: What names a file of the VM.
PREFIX: Final = "guest:"

#: Where the guest has its agents, for those of its users, too.
_AGENTS: Final = "/run/agentctl/agent"
_PROGRAM: Final = ("/usr/bin/python3", "-S", "-P", "-m", "guest_agent.copying")


@dataclass(frozen=True, slots=True)
class FarEnd:
    """What is started over there."""

    program: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def far_end(paths: InstancePaths) -> FarEnd:
    """Of an attached machine it is the agent that was brought there. Raises ``UserError`` for a damaged record."""
    attached = record.load(paths)
    if attached is None:
        return _of_vm()
    return FarEnd((*shlex.split(attached.program), "copying"))


def _of_vm() -> FarEnd:
    return FarEnd(_PROGRAM, {"PYTHONPATH": _AGENTS})


#: Characters of one line of the guest's, which is told as a problem.
_MAX_LINE: Final = 8192


@dataclass(slots=True)
class Copy:
    """How far it is. ``tell`` is called with each problem, from any thread, and ``problems`` counts them."""

    tell: Callable[[str], None]
    files: int = 0
    size: int = 0
    path: str = ""
    problems: int = 0
    _line: bytes = field(default=b"", repr=False)

    def progress(self, path: str, size: int) -> None:
        self.files += path != self.path
        self.path = path
        self.size += size

    def problem(self, path: str, reason: str) -> None:
        self.say(f"{path}: {reason}")

    def say(self, text: str) -> None:
        self.problems += 1
        self.tell(text)

    def on_stderr(self, data: bytes) -> None:
        """What the guest's end says, a line for each problem."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self.say(PREFIX + os.fsdecode(line[:_MAX_LINE]))
        self._line = self._line[:_MAX_LINE]


async def into_guest(
    link: Link, sources: Sequence[str], destination: str, user: str, copy: Copy, end: FarEnd | None = None
) -> None:
    """Raises ``UserError`` if there can be no copy; what could not be copied is told to ``copy``."""
    words = ["receive", *(["--single"] if len(sources) == 1 else []), destination]
    async with _guest_end(link, end, words, user) as stream:
        ours, pipe = os.pipe()

        def send() -> None:
            with contextlib.suppress(BrokenPipeError), open(pipe, "wb", MAX_PIECE) as file:
                sender = Sender(file, copy.problem, copy.progress)
                for source in sources:
                    sender.send(source)
                sender.finish()

        # The pipe is closed first: a thread that still has something to send hears so, and ends.
        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(ours) as content:
            nursery.start_soon(trio.to_thread.run_sync, send)
            nursery.start_soon(_send_stdin, stream, content)
            code = await _hear(stream, None, copy)
        _check(code, copy)


async def out_of_guest(
    link: Link, sources: Sequence[str], destination: str, user: str, copy: Copy, end: FarEnd | None = None
) -> None:
    """Raises ``UserError`` if there can be no copy; what could not be copied is told to ``copy``."""
    async with _guest_end(link, end, ["send", *sources], user) as stream:
        pipe, ours = os.pipe()
        cut: Exception | None = None
        code: int | None = None

        def receive() -> None:
            nonlocal cut
            single = len(sources) == 1
            try:
                with open(pipe, "rb", MAX_PIECE) as file:
                    Receiver(file, destination, copy.problem, copy.progress, single=single).run()
            except CannotReceive as error:
                copy.say(str(error))
            except (Cut, DecodeError) as error:
                cut = error

        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(ours) as content:
            nursery.start_soon(trio.to_thread.run_sync, receive)
            with contextlib.suppress(_NotWanted):
                code = await _hear(stream, content, copy)
        if code is not None:
            _check(code, copy)
        if cut is not None and not copy.problems:  # else that is why
            copy.say(f"{PREFIX}{sources[0]}: {cut}")


def _check(code: int, copy: Copy) -> None:
    """A guest's end that did not end well says why, unless it was ended, or never began."""
    if code and not copy.problems:
        raise UserError(
            f"the copy ended in the VM with status {code}",
            "see: agentctl logs --component guest",
            ExitCode.GUEST,
        )


@contextlib.asynccontextmanager
async def _guest_end(link: Link, end: FarEnd | None, words: list[str], user: str) -> AsyncIterator[MuxStream]:
    """The streams of the process in the guest, which is hung up on when the block ends before it."""
    end = end or _of_vm()
    try:
        stream = await link.open(Exec([*end.program, *words], dict(end.environment), user=user))
    except OpenRefused as error:
        raise UserError(error.message, error.hint, ExitCode.GUEST) from None
    try:
        with collapsed():
            async with stream:
                yield stream
    except DecodeError as error:
        raise UserError(
            f"the guest agent answered nonsense: {error}", "see: agentctl logs", ExitCode.GUEST
        ) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise UserError(
            "the connection to the guest was lost during the copy", "see: agentctl status", ExitCode.GUEST
        ) from None


async def _send_stdin(stream: MuxStream, content: trio.lowlevel.FdStream) -> None:
    # It may have ended; its exit status says why.
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in content:
            view = memoryview(data)
            for start in range(0, len(view), execio.MAX_DATA):
                packet = execio.Stdin(bytes(view[start : start + execio.MAX_DATA]))
                await stream.send_all(execio.encode(packet))
        await stream.send_all(execio.encode(execio.StdinEof()))


class _NotWanted(Exception):
    """Our end has given up, and has told why."""


async def _hear(stream: MuxStream, content: trio.abc.SendStream | None, copy: Copy) -> int:
    """The exit status of the guest's end, after all that it wrote."""
    decoder = execio.Decoder()
    while data := await stream.receive_some():
        for packet in decoder.receive_data(data):
            match packet:
                case execio.Stdout(said):
                    if content is not None:
                        try:
                            await content.send_all(said)
                        except trio.BrokenResourceError:
                            raise _NotWanted from None
                case execio.Stderr(said):
                    copy.on_stderr(said)
                case execio.Exit(code):
                    return code
    raise trio.BrokenResourceError("the stream ended without an exit status")
