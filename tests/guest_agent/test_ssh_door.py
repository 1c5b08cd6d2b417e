"""Stdio handed to the agent that runs, with real processes: the door, who comes through it, and what it replaces."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from guest_agent import ssh_door
from protocol.api import GetGuestInfo
from protocol.build import digest
from protocol.errors import LinkError
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.serial import SocketPort

REPOSITORY = Path(__file__).parents[2]

PATIENCE = 60.0

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}


class Guest:
    """An agent with a port and a door."""

    def __init__(self, folder: Path, listener: trio.SocketListener) -> None:
        self.door = folder / "door"
        self._port = folder / "port"
        self._listener = listener
        self.process: trio.Process

    async def start(self) -> SerialChannel:
        """The host's end of the port."""
        argv = [
            sys.executable,
            "-m",
            "guest_agent",
            "--door",
            str(self.door),
            "--connect-unix",
            str(self._port),
        ]
        self.process = await trio.lowlevel.open_process(argv, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        with trio.fail_after(PATIENCE):
            return SerialChannel(SocketPort(await self._listener.accept()))

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await self.process.wait()

    @asynccontextmanager
    async def visitor(self) -> AsyncIterator[tuple[SerialChannel, trio.Process]]:
        """The host's end of the stdio of who hands it over."""
        ours, theirs = trio.socket.socketpair()
        with theirs:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", "guest_agent.ssh_door", str(self.door)],
                env=ENVIRONMENT,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
            )
        try:
            async with SocketPort(trio.SocketStream(ours)) as transport:
                yield SerialChannel(transport), process
        finally:
            with trio.CancelScope(shield=True), trio.fail_after(PATIENCE):
                await process.wait()


@asynccontextmanager
async def session(channel: SerialChannel) -> AsyncIterator[Link]:
    """One that works; it may be ended by the agent."""
    with trio.fail_after(PATIENCE):
        stream = await channel.establish()
    link = Link(stream, Role.HOST, Service(), Hello(name="host", digest=digest()))
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[Link]) -> None:
            with suppress(LinkError):
                await link.run(task_status)

        with trio.fail_after(PATIENCE):
            await nursery.start(run)
            assert (await link.request(GetGuestInfo())).cpus >= 1
        yield link
        nursery.cancel_scope.cancel()


async def is_over(link: Link) -> None:
    with trio.fail_after(PATIENCE), pytest.raises(LinkError):
        while True:
            await link.request(GetGuestInfo())
            await trio.sleep(0.02)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "port"))
        bound.listen()
        bound.setblocking(False)
        guest = Guest(tmp_path, trio.SocketListener(trio.socket.from_stdlib_socket(bound)))
        try:
            yield guest
        finally:
            await guest.kill()


async def test_the_newest_session_is_the_one(guest: Guest) -> None:
    port = await guest.start()
    async with session(port) as over_port:
        async with guest.visitor() as (door, visitor):
            async with session(door) as over_door:
                assert stat.S_IMODE(guest.door.stat().st_mode) == 0o700
                await is_over(over_port)
                async with session(port) as again:
                    await is_over(over_door)
                    with trio.fail_after(PATIENCE):
                        assert await visitor.wait() == 0  # what was succeeded is closed
                    await again.request(GetGuestInfo())
    await port.aclose()


async def test_an_agent_that_is_killed_has_a_successor_behind_the_same_door(guest: Guest) -> None:
    first = await guest.start()
    async with session(first):
        async with guest.visitor() as (door, visitor):
            async with session(door):
                await guest.kill()
                with trio.fail_after(PATIENCE):
                    assert await visitor.wait() == 0
    await first.aclose()
    async with guest.visitor() as (door, _):
        second = await guest.start()  # who comes meanwhile waits for it
        async with session(door) as link:
            await link.request(GetGuestInfo())
    await second.aclose()


def test_where_no_agent_is_none_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ssh_door, "PATIENCE", 0.3)
    assert ssh_door.main(tmp_path / "door") == ssh_door.IMPOSSIBLE
    assert "the guest agent does not run" in capsys.readouterr().err
    assert not (tmp_path / "door").exists()


def test_who_hands_over_imports_nothing_heavy() -> None:
    program = (
        "import sys, guest_agent.ssh_door, guest_agent.remote.connector\n"
        "assert not {'trio', 'msgpack', 'pyroute2', 'asyncio'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, timeout=PATIENCE)
