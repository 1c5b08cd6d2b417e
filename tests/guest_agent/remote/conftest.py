"""A machine as it is seen over SSH: commands with a home of their own, whose stdin and stdout are played by the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from guest_agent.remote.rundir import Place, Process, RunDir, start_ticks
from protocol.build import digest
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.serial import SocketPort

REPOSITORY = Path(__file__).parents[3]

PATIENCE = 60.0
"""Seconds for what takes one, on a machine that is busy with other tests."""


class Connection:
    """A ``connect`` that runs, and the host's end of its stdio."""

    def __init__(self, process: trio.Process, transport: trio.abc.Stream) -> None:
        self.process = process
        self.transport = transport
        self.channel = SerialChannel(transport)

    @asynccontextmanager
    async def session(self, service: Service | None = None, **options: int) -> AsyncIterator[Link]:
        with trio.fail_after(PATIENCE):
            stream = await self.channel.establish()
        link = Link(stream, Role.HOST, service or Service(), Hello(name="host", digest=digest()), **options)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE):
                await nursery.start(link.run)
            yield link
            await link.goodbye("the session is over")

    async def ended(self) -> int:
        """The connector's exit status."""
        with trio.fail_after(PATIENCE):
            return await self.process.wait()

    async def said(self) -> str:
        """The last words of a connector that has ended, on stderr."""
        assert self.process.stderr is not None
        return bytes(await self.process.stderr.receive_some(2000)).decode()

    async def hangs_up(self) -> None:
        """The other side has closed the connection, whatever it says last."""
        with trio.fail_after(PATIENCE):
            try:
                while await self.transport.receive_some(65536):
                    pass
            except trio.BrokenResourceError:
                pass

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self.transport)


class Machine:
    """A home, and what runs there. ``prefix`` stands before each command, to enter namespaces."""

    def __init__(self, home: Path, prefix: tuple[str, ...] = ()) -> None:
        self.home = home
        self.prefix = prefix
        self.root = REPOSITORY
        """Where the agents' sources are."""
        self.sessions: set[str] = set()
        self.connections: list[Connection] = []

    @property
    def environment(self) -> dict[str, str]:
        own = {"HOME": str(self.home), "PYTHONPATH": str(self.root), "PYTHONWARNINGS": "error"}
        return {**os.environ, **own, "PYTHONDONTWRITEBYTECODE": "1"}

    def command(self, *words: str) -> list[str]:
        return [*self.prefix, sys.executable, "-P", "-m", "guest_agent.remote", *words]

    async def connect(
        self, session: str = "one", plane: str = "control", *, grace: str = "60", pipes: bool = False
    ) -> Connection:
        self.sessions.add(session)
        words = ["connect", plane, session, "--grace", grace]
        theirs, transport = _pipes() if pipes else _socket()
        try:
            process = await trio.lowlevel.open_process(
                self.command(*words),
                stdin=theirs[0],
                stdout=theirs[1],
                stderr=subprocess.PIPE,
                env=self.environment,
                cwd="/",
            )
        finally:
            for fd in set(theirs):
                os.close(fd)
        connection = Connection(process, transport)
        self.connections.append(connection)
        return connection

    async def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """A command that ends by itself."""
        with trio.fail_after(PATIENCE):
            return await trio.run_process(
                self.command(*words),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=self.environment,
                cwd="/",
            )

    async def end(self, session: str = "one") -> None:
        done = await self.run("end", session)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def place(self, session: str = "one", plane: str = "control") -> Place:
        return RunDir.of(session, self.home).plane(plane)

    def agent(self, session: str = "one", plane: str = "control") -> Process:
        """The daemon that runs."""
        process = self.place(session, plane).holder()
        assert process is not None
        assert start_ticks(process.pid) == process.started
        return process

    async def is_over(self, process: Process) -> None:
        with trio.fail_after(PATIENCE):
            while start_ticks(process.pid) == process.started:
                await trio.sleep(0.02)

    def other_build(self, folder: Path) -> None:
        """From now on the commands are those of another version."""
        for package in ("protocol", "fileserver", "guest_agent"):
            shutil.copytree(
                REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        (folder / "guest_agent" / "of_another_version.py").write_text("")
        self.root = folder

    async def aclose(self) -> None:
        for connection in self.connections:
            await connection.aclose()
            assert connection.process.stderr is not None
            await connection.process.stderr.aclose()
        ends = [await self.run("end", session) for session in self.sessions]
        for connection in self.connections:
            await connection.ended()
        assert all(end.returncode == 0 for end in ends), ends
        left = [name for name in self.sessions if RunDir.of(name, self.home).path.exists()]
        assert not left, left


def _socket() -> tuple[tuple[int, int], trio.abc.Stream]:
    """As sshd does it: one end of one socket for both directions."""
    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    return (fd, fd), SocketPort(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))


def _pipes() -> tuple[tuple[int, int], trio.abc.Stream]:
    """As other servers do it."""
    (reading, to), (from_, writing) = os.pipe(), os.pipe()
    return (reading, writing), trio.StapledStream(trio.lowlevel.FdStream(to), trio.lowlevel.FdStream(from_))


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    home = tmp_path / "home"
    home.mkdir()
    machine = Machine(home)
    try:
        yield machine
    finally:
        with trio.CancelScope(shield=True):
            await machine.aclose()
