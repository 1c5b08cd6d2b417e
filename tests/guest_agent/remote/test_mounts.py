"""Mounts of an agent that is reached over connections that come and go, in a mount namespace of their own."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio

from protocol import codec, files
from protocol.files import MAX_FILES_PAYLOAD, MountReport, MountReports, MountShares, MountStage, Share
from protocol.link import Link, Service
from protocol.messages import Call
from tests.guest_agent.remote.conftest import PATIENCE, Connection, Machine
from tests.guest_agent.remote.test_connect import output_of
from tests.guest_agent.test_files import Folder, Host


@pytest.fixture
def namespace() -> Iterator[tuple[str, ...]]:
    """What to put before a command, to run it in the mount namespace."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounts in a namespace need root and /dev/fuse")
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 600"],
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            pytest.skip("a mount namespace is not permitted here")
        yield "nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"
        holder.kill()


@pytest.fixture
async def machine(tmp_path: Path, namespace: tuple[str, ...]) -> AsyncIterator[Machine]:
    home = tmp_path / "home"
    home.mkdir()
    machine = Machine(home, namespace)
    try:
        yield machine
    finally:
        with trio.CancelScope(shield=True):
            await machine.aclose()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    root = tmp_path / "host"
    root.mkdir()
    (root / "f").write_text("of the host\n")
    return Folder(root)


@asynccontextmanager
async def serving(connection: Connection, folder: Folder, path: Path) -> AsyncIterator[Link]:
    """A session in which ``folder`` is mounted at ``path``."""
    host = Host({1: folder}, cast(trio.SocketListener, None))
    links: list[Link] = []

    def answer(call: Call) -> None:
        links[0].answer(call.id, *host.perform(call))

    service = Service()
    service.on_call(answer)
    async with connection.session(service, max_payload=MAX_FILES_PAYLOAD, max_backlog=1 << 28) as link:
        links.append(link)
        with trio.fail_after(PATIENCE):
            reports: MountReports = await link.request(MountShares([Share(1, str(path))]))
        assert reports.reports == [MountReport(1, MountStage.MOUNTED)]
        yield link


async def there(machine: Machine, script: str) -> tuple[int, str]:
    """A script in the namespace: its exit status and what it writes."""
    command = [*machine.prefix, "timeout", "--signal=KILL", "40", "sh", "-c", script]
    done = await trio.run_process(
        command, capture_stdout=True, stderr=subprocess.STDOUT, check=False, cwd="/"
    )
    return done.returncode, done.stdout.decode()


async def mounted(machine: Machine) -> list[str]:
    _, said = await there(machine, "findmnt -rno TARGET -t fuse.agentctl || true")
    return [path for path in said.split() if path.startswith(str(machine.home))]


async def test_a_mount_outlives_the_connection_and_ends_with_the_session(
    machine: Machine, folder: Folder
) -> None:
    place = machine.home / "a"
    connection = await machine.connect(plane="files")
    async with serving(connection, folder, place):
        assert await there(machine, f"cat {place}/f") == (0, "of the host\n")
        _, before = await there(machine, f"stat -c %d {place}")
    await connection.aclose()
    assert await connection.ended() == 0
    assert await mounted(machine) == [str(place)]
    (folder.root / "g").touch()
    async with trio.open_nursery() as nursery:
        seen: list[tuple[int, str]] = []

        async def look() -> None:  # while the host is away; it waits for it
            seen.append(await there(machine, f"ls {place}; stat -c %d {place}"))

        nursery.start_soon(look)
        again = await machine.connect(plane="files")
        async with serving(again, folder, place):
            with trio.fail_after(PATIENCE):
                while not seen:
                    await trio.sleep(0.02)
    assert seen == [(0, f"f\ng\n{before}")]
    await machine.end()
    assert await mounted(machine) == []


async def test_after_the_time_of_grace_no_mount_is_left(machine: Machine, folder: Folder) -> None:
    connection = await machine.connect(plane="files", grace="0.2")
    async with serving(connection, folder, machine.home / "a"):
        agent = machine.agent(plane="files")
    await connection.aclose()
    await machine.is_over(agent)
    assert await mounted(machine) == []


async def test_what_a_killed_agent_had_mounted_is_removed_and_nothing_else(
    machine: Machine, folder: Folder
) -> None:
    connection = await machine.connect("one", "files")
    async with serving(connection, folder, machine.home / "a"):
        pass
    other = await machine.connect("two", "files")
    async with serving(other, folder, machine.home / "b"):
        pass
    await other.aclose()  # so whoever looks at its mount waits
    agent = machine.agent("one", "files")
    agent.signal(signal.SIGKILL)
    await machine.is_over(agent)
    status, said = await there(machine, f"ls {machine.home}/a")
    assert status != 0
    assert "not connected" in said
    await machine.end("one")
    assert await mounted(machine) == [f"{machine.home}/b"]


async def test_a_killed_agents_successor_mounts_anew(machine: Machine, folder: Folder) -> None:
    place = machine.home / "a"
    connection = await machine.connect(plane="files")
    async with serving(connection, folder, place):
        pass
    machine.agent(plane="files").signal(signal.SIGKILL)
    await connection.hangs_up()
    again = await machine.connect(plane="files")
    async with serving(again, folder, place):
        assert await there(machine, f"cat {place}/f") == (0, "of the host\n")
        assert await mounted(machine) == [str(place)]


# --- writes that are answered ahead --------------------------------------------------------------------------

WRITING = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY)
for number in range(20):
    os.pwrite(file, b"%4d" % number, 4 * number)
print("written", flush=True)
open(sys.argv[2], "x").close()
"""


class Roomy(Folder):
    """Lets the guest answer for writes, and takes those only some time after the program has gone on: when there is
    ``gone_on``."""

    def __init__(self, root: Path, gone_on: Path) -> None:
        super().__init__(root)
        self.gone_on = gone_on
        self.late: list[Call] = []
        self.taken = 0

    def Write(self, call: files.Write, payload: bytes) -> tuple[object, bytes]:
        written, _ = super().Write(call, payload)
        return dataclasses.replace(cast(files.Written, written), room=1 << 20), b""

    async def take(self, answer: Callable[[Call], None]) -> None:
        while True:
            while not (self.late and self.gone_on.exists()):
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            while self.late:
                answer(self.late.pop(0))
                self.taken += 1


async def test_what_a_program_says_is_heard_after_what_it_has_written(
    machine: Machine, folder: Folder, tmp_path: Path
) -> None:
    place, said = machine.home / "a", machine.place(plane="control").log
    roomy = Roomy(folder.root, tmp_path / "gone on")
    host = Host({1: roomy}, cast(trio.SocketListener, None))
    service, links = Service(), list[Link]()

    def answer(call: Call) -> None:
        links[0].answer(call.id, *host.perform(call))

    def on_call(call: Call) -> None:
        message = codec.decode(files.CALLS[call.op], call.args)
        if isinstance(message, files.Write) and message.ahead:
            roomy.late.append(call)
        else:
            answer(call)

    service.on_call(on_call)
    connection, control = await machine.connect(plane="files"), await machine.connect()
    async with (
        connection.session(service, max_payload=MAX_FILES_PAYLOAD, max_backlog=1 << 28) as link,
        control.session() as commands,
        trio.open_nursery() as nursery,
    ):
        links.append(link)
        await link.request(MountShares([Share(1, str(place))]))
        nursery.start_soon(roomy.take, answer)
        with trio.fail_after(PATIENCE):
            while True:
                vain, roomy.taken = given_up(said), 0
                roomy.gone_on.unlink(missing_ok=True)
                words = ["python3", "-c", WRITING, str(place / "f"), str(roomy.gone_on)]
                assert await output_of(commands, *words) == b"written\n"
                # On a machine that stands still for a second the link goes on without; or no write follows another soon.
                if given_up(said) == vain and (roomy.taken or roomy.late):
                    break
                while roomy.late:
                    await trio.sleep(0.01)
        assert not roomy.late
        assert (folder.root / "f").read_text() == "".join(f"{number:4}" for number in range(20))
        nursery.cancel_scope.cancel()


def given_up(log: Path) -> int:
    return log.read_text().count("outlet.held_in_vain")
