"""The real process, killed again and again with calls in flight; what was asked is done once, and all of it."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fileserver.control import SharedFolder
from protocol.files import (
    ROOT,
    Create,
    Forget,
    GetAttributes,
    MakeDirectory,
    OpenForLocks,
    Rename,
    SetLock,
    Unlink,
    Write,
)
from tests.fileserver.peers import SHARE, SOON, Kernel, Port, control_pair, host_agent, port, until

APPENDS_OF_EACH = 125
APPENDERS = 4
MAKERS = 4
MADE_BY_EACH = 60
KILLS = 8


@contextmanager
def process(place: Path, control: int) -> Iterator[subprocess.Popen[bytes]]:
    """A file server; killed at the end if it still runs."""
    with (place / "log").open("ab") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "host_agent.fileserver"),
                *("--guest-socket", str(place / "files.sock")),
                *("--control-fd", str(control)),
                *("--journal", str(place / "journal")),
                *("--hide", str(place / "root" / "hidden")),
            ],
            pass_fds=[control],
            stderr=log,
            umask=0o077,
        )
    try:
        yield server
    finally:
        server.kill()
        server.wait()


@asynccontextmanager
async def serving(place: Path, folder: SharedFolder) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A file server that was told what to share, by a host agent."""
    ours, theirs = control_pair()
    with theirs, process(place, theirs.fileno()) as server:
        theirs.close()
        async with host_agent(ours) as agent:
            with trio.fail_after(SOON):
                await agent.serve(folder)
            yield server


def log_of(place: Path) -> str:
    return (place / "log").read_text()


@pytest.fixture
def folder(place: Path) -> SharedFolder:
    (place / "root").mkdir()
    return SharedFolder(SHARE, str(place / "root"), "/guest", host_locks=True)


async def guest_life(opened: Port, kernel: Kernel) -> None:
    """A guest that takes up a session with each server that comes, for ever."""
    while True:
        channel = await opened.accept()
        async with kernel.session(channel):
            await kernel.over.wait()


async def answered(kernel: Kernel, count: int) -> None:
    await until(lambda: kernel.answers >= count)


async def append(kernel: Kernel, number: int) -> None:
    """Append records to a file of its own, each when the one before is there."""
    name = b"log-%d" % number
    entry = await kernel.ask(Create(SHARE, kernel.unique(), ROOT, name, 0o600, os.O_EXCL))
    for count in range(APPENDS_OF_EACH):
        write = Write(SHARE, kernel.unique(), entry.node, 0, append=True)
        written = await kernel.ask(write, b"%07d\n" % count)
        assert (written.size, written.offset) == (8, 8 * count)


async def make(kernel: Kernel, number: int) -> None:
    """Make files and directories, rename and remove them; any EEXIST or ENOENT is one that was done twice."""
    for count in range(MADE_BY_EACH):
        first, second = b"new-%d-%d" % (number, count), b"kept-%d-%d" % (number, count)
        if count % 3:
            await kernel.ask(Create(SHARE, kernel.unique(), ROOT, first, 0o600, os.O_EXCL))
        else:
            await kernel.ask(MakeDirectory(SHARE, kernel.unique(), ROOT, first, 0o700))
        await kernel.ask(Rename(SHARE, kernel.unique(), ROOT, first, ROOT, second))
        if count % 3 == 1:
            await kernel.ask(Unlink(SHARE, kernel.unique(), ROOT, second))


async def test_killed_with_changing_calls_in_flight(place: Path, folder: SharedFolder) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    kernel = Kernel()
    running = APPENDERS + MAKERS

    async def work(task: Callable[[Kernel, int], Awaitable[None]], number: int) -> None:
        nonlocal running
        await task(kernel, number)
        running -= 1

    kills = 0
    async with port(place) as opened, trio.open_nursery() as nursery:
        nursery.start_soon(guest_life, opened, kernel)
        for number in range(APPENDERS):
            nursery.start_soon(work, append, number)
        for number in range(MAKERS):
            nursery.start_soon(work, make, number)
        while running:
            async with serving(place, folder) as server:
                await until(lambda: kernel.link or not running)
                if kills < KILLS:
                    # By what was done, not by time: so that there is work left for the last of them.
                    await answered(kernel, kernel.answers + chance.randrange(10, 90))
                    kills += 1
                    assert server.poll() is None
                    server.kill()
                else:
                    await until(lambda: not running)
        nursery.cancel_scope.cancel()
    assert kills == KILLS
    root = place / "root"
    for number in range(APPENDERS):
        expected = b"".join(b"%07d\n" % count for count in range(APPENDS_OF_EACH))
        assert (root / f"log-{number}").read_bytes() == expected
    names = {f"log-{number}" for number in range(APPENDERS)}
    names |= {f"kept-{n}-{count}" for n in range(MAKERS) for count in range(MADE_BY_EACH) if count % 3 != 1}
    assert {path.name for path in root.iterdir()} == names
    assert "Traceback" not in log_of(place)


async def test_a_successor_knows_the_nodes_and_the_locks(place: Path, folder: SharedFolder) -> None:
    kernel = Kernel()
    root = place / "root"
    async with port(place) as opened, trio.open_nursery() as nursery:
        nursery.start_soon(guest_life, opened, kernel)
        async with serving(place, folder):
            made = await kernel.ask(MakeDirectory(SHARE, kernel.unique(), ROOT, b"d", 0o755))
            entry = await kernel.ask(Create(SHARE, kernel.unique(), made.node, b"file", 0o644, os.O_EXCL))
            create_again = Create(SHARE, kernel.unique(), made.node, b"other", 0o644, os.O_EXCL)
            other = await kernel.ask(create_again)
            opened_file = await kernel.ask(OpenForLocks(SHARE, kernel.unique(), entry.node, os.O_RDWR))
            lock = SetLock(SHARE, kernel.unique(), entry.node, opened_file.handle, 0, 0, 0, 1, whole=True)
            await kernel.ask(lock)
            assert not is_free(root / "d" / "file")
        await until(lambda: is_free(root / "d" / "file"))
        (root / "d").rename(root / "moved")  # while nobody looks
        (root / "moved").rename(root / "d")
        async with serving(place, folder):
            await kernel.ask(GetAttributes(SHARE, 0, entry.node))
            await until(lambda: not is_free(root / "d" / "file"))
            assert await kernel.ask(create_again) == replace(other, promise=0, above=b"")
            await kernel.ask(Write(SHARE, kernel.unique(), entry.node, 0), b"by its number")
            assert (root / "d" / "file").read_bytes() == b"by its number"
            third = await kernel.ask(Create(SHARE, kernel.unique(), ROOT, b"third", 0o644, os.O_EXCL))
            assert third.node > other.node
            await kernel.ask(Forget(SHARE, kernel.unique(), 0, [other.node], [1]))
        async with serving(place, folder):
            await kernel.ask(GetAttributes(SHARE, 0, third.node))
            with pytest.raises(OSError) as gone:
                await kernel.ask(GetAttributes(SHARE, 0, other.node))
            assert gone.value.errno == errno.ESTALE
        nursery.cancel_scope.cancel()


def is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


async def test_modes_are_the_guests_and_hidden_folders_are_empty(place: Path, folder: SharedFolder) -> None:
    hidden = place / "root" / "hidden"
    hidden.mkdir()
    (hidden / "secret").touch()
    kernel = Kernel()
    async with port(place) as opened, trio.open_nursery() as nursery:
        nursery.start_soon(guest_life, opened, kernel)
        async with serving(place, folder):
            await kernel.ask(Create(SHARE, kernel.unique(), ROOT, b"open", 0o666, os.O_EXCL))
            assert (place / "root" / "open").stat().st_mode & 0o777 == 0o666
            entry = await kernel.lookup(b"hidden")
            with pytest.raises(PermissionError):
                await kernel.lookup(b"secret", parent=entry.node)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("end", ["control", "signal"])
async def test_it_ends_in_order(place: Path, folder: SharedFolder, end: str) -> None:
    ours, theirs = control_pair()
    kernel = Kernel()
    async with port(place) as opened, trio.open_nursery() as nursery:
        nursery.start_soon(guest_life, opened, kernel)
        with theirs, process(place, theirs.fileno()) as server:
            theirs.close()
            async with host_agent(ours) as agent:
                await agent.serve(folder)
                await until(lambda: kernel.link)
                if end == "signal":
                    server.send_signal(signal.SIGTERM)
                    assert await trio.to_thread.run_sync(server.wait, SOON) == 0
            assert await trio.to_thread.run_sync(server.wait, SOON) == 0
        await until(lambda: kernel.link is None)
        nursery.cancel_scope.cancel()
    assert "Traceback" not in log_of(place)
    assert log_of(place).endswith("INFO the file server ends\n")
