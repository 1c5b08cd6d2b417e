"""``agentctl cp``: files from this machine into the guest, and out of it, over the link.

The guest's end is a process there (``guest_agent.copying``), started like any that ``exec`` starts; ours is a
thread that reads or writes files, and pipes between it and the stream: for the records, and for the answers of who
receives them. The law: whatever ends first ends the others, and then no file is there by half under its name.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import trio

from host_agent.errors import ExitCode, UserError
from host_agent.groups import collapsed
from host_agent.paths import InstancePaths
from host_agent.remote import record
from protocol import build, execio, packedfile
from protocol.api import Exec, GetStatus
from protocol.errors import DecodeError, ErrorCode, OpenRefused
from protocol.link import Link, MuxStream
from protocol.treecopy import MAX_PIECE, Cut
from protocol.treegauge import Gauge
from protocol.treereceive import CannotReceive, Receiver
from protocol.treesend import Sender
from protocol.treesurvey import Survey

#: Where the guest has its agents, for those of its users, too.
_AGENTS: Final = "/run/agentctl/agent"
_PROGRAM: Final = ("/usr/bin/python3", "-S", "-P", "-m", "guest_agent.copying")


@dataclass(frozen=True, slots=True)
class FarEnd:
    """What is started over there. ``resumes``: it knows of files that are there already. ``packs``: what is copied is
    packed on its way.

    ``prefix`` is what its paths begin with as they are shown, ``name`` what it is called in a sentence.
    """

    program: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = True
    packs: bool = False
    prefix: str = "guest:"
    name: str = "the guest"

    def to_send(self, sources: Sequence[str], *, total: bool) -> list[str]:
        if not self.resumes:
            return [*self.program, "send", *sources]
        return [*self.program, "offer", *self._packed, *(["--total"] if total else []), "--", *sources]

    def to_receive(self, destination: str, *, single: bool) -> list[str]:
        options = ["--single"] if single else []
        if not self.resumes:
            return [*self.program, "receive", *options, destination]
        return [*self.program, "take", *self._packed, *options, "--", destination]

    @property
    def _packed(self) -> list[str]:
        return ["--packed"] if self.packs else []


def far_end(paths: InstancePaths, prefix: str) -> FarEnd:
    """Of an attached machine it is the agent that was brought there. Raises ``UserError`` for a damaged record."""
    attached = record.load(paths)
    if attached is None:
        return FarEnd(_PROGRAM, {"PYTHONPATH": _AGENTS}, prefix=prefix, name=f"instance {paths.name}")
    return FarEnd((*shlex.split(attached.program), "copying"), prefix=prefix, name=f"instance {paths.name}")


async def as_it_runs(link: Link, end: FarEnd) -> FarEnd:
    """A guest of another version may know of nothing but whole copies. Raises ``RpcError``, ``LinkError``."""
    status = await link.request(GetStatus())
    known = status.guest_digest in (
        "",
        build.digest(),
    )  # one that is not there just now is most likely the same
    if not known:
        return replace(end, resumes=False)
    far = status.attached is not None and status.attached.packs
    return replace(end, packs=far and packedfile.is_there())


class CutOff(UserError):
    """The connection was lost while something was copied; another attempt goes on where this one was."""


#: Characters of one line of the guest's, which is told as a problem.
_MAX_LINE: Final = 8192


@dataclass(slots=True)
class Copy:
    """How far it is, in one attempt after another.

    ``tell`` is called with each problem, once, from any thread. ``watched``: somebody wants to know of how much it is.
    ``sent``: nothing is left to be sent, or to be received. ``waits``: the connection is gone, and may come back.
    ``resumes``: another attempt goes on where this one was.
    """

    tell: Callable[[str], None]
    watched: bool = False
    gauge: Gauge = field(default_factory=Gauge)
    sent: bool = False
    waits: bool = False
    resumes: bool = True
    _told: set[str] = field(default_factory=set, repr=False)
    _line: bytes = field(default=b"", repr=False)

    @property
    def problems(self) -> int:
        return len(self._told)

    def begin(self) -> None:
        """Another attempt."""
        self.gauge, self._line = Gauge(), b""

    def problem(self, path: str, reason: str) -> None:
        self.say(f"{path}: {reason}")

    def say(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.tell(text)

    def on_stderr(self, data: bytes, prefix: str) -> None:
        """What the guest's end says, a line for each problem."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self.say(prefix + os.fsdecode(line[:_MAX_LINE]))
        self._line = self._line[:_MAX_LINE]


async def into_guest(
    link: Link, sources: Sequence[str], destination: str, user: str, copy: Copy, end: FarEnd
) -> None:
    """Raises ``UserError`` if there can be no copy; what could not be copied is told to ``copy``."""
    argv = end.to_receive(destination, single=len(sources) == 1)
    async with _guest_end(link, end, argv, user) as stream:
        copy.waits = False
        ours, records = os.pipe()
        answers, heard = os.pipe()

        def send() -> None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.suppress(BrokenPipeError, Cut))  # who ends it says why
                if end.packs:
                    file = stack.enter_context(packedfile.writer(records))
                else:
                    file = stack.enter_context(open(records, "wb", MAX_PIECE))
                asked = stack.enter_context(open(answers, "rb"))
                survey = stack.enter_context(Survey(sources)) if copy.watched else None
                sender = Sender(
                    file, copy.problem, copy.gauge, answers=asked if end.resumes else None, survey=survey
                )
                for source in sources:
                    sender.send(source)
                sender.finish()
                copy.sent = True

        # The pipes are closed first: a thread that still has something to send, or to hear, hears so, and ends.
        async with (
            trio.open_nursery() as nursery,
            trio.lowlevel.FdStream(ours) as content,
            trio.lowlevel.FdStream(heard) as back,
        ):
            nursery.start_soon(trio.to_thread.run_sync, send)
            nursery.start_soon(_send_stdin, stream, content)
            code = await _hear(stream, _lenient(back), copy, end)
        _check(code, copy, end)


async def out_of_guest(
    link: Link, sources: Sequence[str], destination: str, user: str, copy: Copy, end: FarEnd
) -> None:
    """Raises ``UserError`` if there can be no copy; what could not be copied is told to ``copy``."""
    argv = end.to_send(sources, total=copy.watched)
    async with _guest_end(link, end, argv, user) as stream:
        copy.waits = False
        records, ours = os.pipe()
        said, answers = os.pipe()
        cut: Exception | None = None
        code: int | None = None

        def receive() -> None:
            nonlocal cut
            single = len(sources) == 1
            try:
                with (
                    packedfile.reader(records) if end.packs else open(records, "rb", MAX_PIECE) as file,
                    open(answers, "wb", 0) as asked,
                ):
                    Receiver(
                        file,
                        destination,
                        copy.problem,
                        copy.gauge,
                        single=single,
                        answers=asked if end.resumes else None,
                    ).run()
                copy.sent = True
            except CannotReceive as error:
                copy.say(str(error))
            except (Cut, DecodeError) as error:
                cut = error

        async with (
            trio.open_nursery() as nursery,
            trio.lowlevel.FdStream(ours) as content,
            trio.lowlevel.FdStream(said) as back,
        ):
            nursery.start_soon(trio.to_thread.run_sync, receive)
            nursery.start_soon(_send_stdin, stream, back)
            with contextlib.suppress(_NotWanted):
                code = await _hear(stream, _strict(content), copy, end)
        if code is not None:
            _check(code, copy, end)
        if cut is not None and not copy.problems:  # else that is why
            copy.say(f"{end.prefix}{sources[0]}: {cut}")


def _check(code: int, copy: Copy, end: FarEnd) -> None:
    """A guest's end that did not end well says why, unless it was ended, or never began."""
    if code and not copy.problems:
        raise UserError(
            f"the copy ended in {end.name} with status {code}",
            "see: agentctl logs --component guest",
            ExitCode.GUEST,
        )


@contextlib.asynccontextmanager
async def _guest_end(link: Link, end: FarEnd, argv: list[str], user: str) -> AsyncIterator[MuxStream]:
    """The streams of the process in the guest, which is hung up on when the block ends before it."""
    try:
        stream = await link.open(Exec(argv, dict(end.environment), user=user))
    except OpenRefused as error:
        kind = CutOff if error.code is ErrorCode.UNREACHABLE else UserError
        raise kind(error.message, error.hint, ExitCode.GUEST) from None
    try:
        with collapsed():
            async with stream:
                yield stream
    except DecodeError as error:
        raise UserError(
            f"the guest agent answered nonsense: {error}", "see: agentctl logs", ExitCode.GUEST
        ) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise CutOff(
            f"the connection to {end.name} was lost during the copy", "see: agentctl status", ExitCode.GUEST
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


#: Takes what the guest's end writes to its stdout.
_Take = Callable[[bytes], Awaitable[None]]


def _strict(content: trio.lowlevel.FdStream) -> _Take:
    async def take(data: bytes) -> None:
        try:
            await content.send_all(data)
        except trio.BrokenResourceError:
            raise _NotWanted from None

    return take


def _lenient(answers: trio.lowlevel.FdStream) -> _Take:
    """Of one who has sent all, or has given up, nobody minds answers."""

    async def take(data: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await answers.send_all(data)

    return take


async def _hear(stream: MuxStream, take: _Take, copy: Copy, end: FarEnd) -> int:
    """The exit status of the guest's end, after all that it wrote."""
    decoder = execio.Decoder()
    while data := await stream.receive_some():
        for packet in decoder.receive_data(data):
            match packet:
                case execio.Stdout(said):
                    await take(said)
                case execio.Stderr(said):
                    copy.on_stderr(said, end.prefix)
                case execio.Exit(code):
                    return code
    raise trio.BrokenResourceError("the stream ended without an exit status")
