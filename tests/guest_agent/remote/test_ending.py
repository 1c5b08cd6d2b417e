from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import trio

from guest_agent.remote import ending
from guest_agent.remote.ending import CannotEnd, end
from guest_agent.remote.rundir import FOLDER
from tests.guest_agent.remote.conftest import Machine
from tests.guest_agent.remote.test_connect import works


async def test_a_session_that_never_was_is_ended(machine: Machine) -> None:
    await machine.end("never")
    assert list(machine.home.iterdir()) == []


async def test_both_agents_end_and_nothing_is_left(machine: Machine) -> None:
    control, files = await machine.connect(), await machine.connect(plane="files")
    for connection in (control, files):
        async with connection.session():
            pass
    agents = [machine.agent(plane=plane) for plane in ("control", "files")]
    await machine.end()
    for agent in agents:
        await machine.is_over(agent)
    assert (await control.ended(), await files.ended()) == (0, 0)
    assert not (machine.home / FOLDER).exists()
    await machine.end()


async def test_several_who_end_it_at_once(machine: Machine) -> None:
    await works(await machine.connect())
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(machine.end)
    assert not machine.place().folder.exists()


async def test_what_the_killed_leave_is_removed(machine: Machine) -> None:
    await works(await machine.connect())
    agent = machine.agent()
    agent.signal(signal.SIGKILL)
    await machine.is_over(agent)
    await machine.end()
    assert not machine.place().folder.exists()


async def test_an_agent_that_hangs_is_killed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    await works(await machine.connect())
    agent = machine.agent()
    agent.signal(signal.SIGSTOP)
    monkeypatch.setattr(ending, "GENTLE", 0.2)
    monkeypatch.setenv("HOME", str(machine.home))
    await trio.to_thread.run_sync(end, "one")
    await machine.is_over(agent)
    assert not machine.place().folder.exists()


def test_who_cannot_be_ended_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is held by somebody who is not in it, as between being taken and being written to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ending, "GENTLE", 0.1)
    monkeypatch.setattr(ending, "FORCED", 0.1)
    rundir = ending.RunDir.of("one")
    rundir.make()
    lock = rundir.plane("files").take_lock()
    assert lock is not None
    with pytest.raises(
        CannotEnd, match=r"the files agent cannot be ended; who it is stands in .*files\.lock"
    ):
        end("one")
    os.close(lock)
    end("one")
    assert not rundir.path.exists()


async def test_it_can_be_begun_again_while_it_is_ended(machine: Machine) -> None:
    """Whoever is later has its way, and nothing hangs."""
    await works(await machine.connect())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.end)
        connection = await machine.connect()
    deadline = time.monotonic() + 60
    while connection.process.returncode is None and time.monotonic() < deadline:
        try:
            await works(connection)
            break
        except (trio.BrokenResourceError, ExceptionGroup):
            await connection.ended()
    else:
        assert await connection.ended() == 0, await connection.said()
        await works(await machine.connect())


def test_no_name_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("", "..", "a/b", "A", "a" * 41, "ä"):
        with pytest.raises(CannotEnd, match="cannot be the name of a session"):
            end(name)
