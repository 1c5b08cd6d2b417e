"""The process's start and end, with programs of the shell in its place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent import file_server_process
from host_agent.file_server_process import end_predecessor, record, started
from host_agent.process import ProcessIdentity
from tests.descriptors import open_descriptors

#: Ends with its control socket: what follows are the words --control-fd N --store-fd N.
SOUND = ["/bin/bash", "-c", 'echo "$0 $2"; read -r -u "$1"']


@asynccontextmanager
async def running(program: list[str], log: Path) -> AsyncIterator[tuple[trio.Process, trio.SocketStream]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        async with started(program, log, theirs) as it:
            yield it


async def test_it_has_its_sockets_and_ends_with_the_one_that_controls_it(tmp_path: Path) -> None:
    async with running(SOUND, tmp_path / "log") as (process, control):
        await control.send_all(b"x")
        assert process.poll() is None
    assert process.returncode == 1, "read saw the end of the socket"
    assert (tmp_path / "log").read_text() == "--control-fd --store-fd\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


async def test_one_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_server_process, "END_TIME", 0.1)
    async with running(["/bin/bash", "-c", "exec sleep 1000"], tmp_path / "log") as (process, _):
        pass
    assert process.returncode == -signal.SIGKILL


async def test_one_that_cannot_be_started_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(open_descriptors())
    with pytest.raises(FileNotFoundError):
        async with running(["/nonexistent/program"], tmp_path / "log"):
            pass
    assert len(open_descriptors()) <= before


@contextmanager
def predecessor(identity: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        record(process.pid, identity)
        yield process
        process.kill()


async def test_a_predecessor_is_waited_for(tmp_path: Path) -> None:
    with predecessor(tmp_path / "identity", "cat") as left:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_predecessor, tmp_path / "identity")
            await trio.testing.wait_all_tasks_blocked()
            assert left.poll() is None
            assert left.stdin is not None
            left.stdin.close()
            left.wait()
    assert left.returncode == 0


async def test_a_predecessor_that_stays_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_server_process, "END_TIME", 0.1)
    with predecessor(tmp_path / "identity", "sleep", "1000") as left:
        await end_predecessor(tmp_path / "identity")
        assert left.wait() == -signal.SIGKILL


async def test_one_that_cannot_even_be_killed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is while it waits for a disk that does not answer."""
    monkeypatch.setattr(file_server_process, "END_TIME", 0.05)
    monkeypatch.setattr(ProcessIdentity, "send_signal", lambda self, number: None)
    with predecessor(tmp_path / "identity", "sleep", "1000") as left:
        with pytest.raises(OSError, match=f"pid {left.pid}, does not end"):
            await end_predecessor(tmp_path / "identity")


async def test_without_a_predecessor_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    await end_predecessor(tmp_path / "identity")


def test_an_identity_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(os.getpid(), tmp_path / "missing" / "identity")
    assert "could not be saved" in caplog.text
