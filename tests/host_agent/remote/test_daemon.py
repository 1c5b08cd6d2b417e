"""The host agent of an attached machine, with the real agents over there and a shell in the place of SSH."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree

import pytest
import trio

from host_agent import state
from host_agent.client import connected
from host_agent.configuration import config as configuration
from host_agent.errors import ExitCode, UserError
from host_agent.guest_link import GuestLink
from host_agent.instance_agent import Inherited
from host_agent.paths import InstancePaths
from host_agent.remote import answers, record
from host_agent.remote.daemon import AttachedAgent
from host_agent.remote.record import Attached
from host_agent.state import InstanceState
from protocol import execio
from protocol.api import Exec, GetDisk, GetStatus, InstanceStatus, LinkState, PortRule, Stage, StopInstance
from protocol.capabilities import Capabilities, Docker, Problem
from protocol.errors import LinkError, RemoteFailure
from protocol.link import Link
from tests.host_agent.remote.shell_way import PYTHONPATH, ShellWay

SESSION = "default-0123"

#: Python there and here, on a machine that has other work.
PATIENCE = 60.0


@pytest.fixture
def way() -> Iterator[ShellWay]:
    folder = Path(tempfile.mkdtemp(prefix="ac-"))
    found = ShellWay(folder)
    yield found
    found.end(SESSION)  # of a test that has failed; a moment, and nothing, after all others
    rmtree(folder, ignore_errors=True)


@pytest.fixture
def attached(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> InstancePaths:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)  # for the file server, as its keeper does
    record.save(instance, Attached("me@machine", SESSION))
    # Its ports are ours, and must not be taken from whoever else listens here.
    asked = configuration.load(instance, configuration.Host.measure())
    everything = PortRule(guest_ip="0.0.0.0", guest_port=1, ports=65535, ignore=True)
    configuration.save(instance, replace(asked, rules=(everything,)))
    state.save(instance.state, InstanceState(wanted=True, started_at=7.0))
    return instance


@dataclass
class Running:
    agent: AttachedAgent
    paths: InstancePaths
    over: trio.Event

    async def status(self) -> InstanceStatus:
        async with connected(self.paths) as link:
            return await link.request(GetStatus())

    async def until(self, seen: Callable[[InstanceStatus], bool]) -> InstanceStatus:
        with trio.fail_after(PATIENCE):
            while not seen(status := await self.status()):
                await trio.sleep(0.05)
        return status

    async def until_ready(self) -> InstanceStatus:
        return await self.until(lambda status: status.stage is Stage.RUNNING and status.guest_connected)

    async def stop(self, *, force: bool = False) -> None:
        with trio.fail_after(PATIENCE):
            async with connected(self.paths) as link:
                await link.request(StopInstance(force), timeout=PATIENCE)
            await self.over.wait()


@asynccontextmanager
async def running(paths: InstancePaths, way: ShellWay, given: int | None = None) -> AsyncIterator[Running]:
    """A host agent with its lock and its keeper's pipe; at the end it is stopped, by force if it must be."""
    lock = state.try_lock(paths.lock)
    assert lock is not None
    reader, writer = os.pipe()
    agent = AttachedAgent(paths.home, paths, Inherited(lock, reader, (), given), way.opened, way.install)
    served = Running(agent, paths, trio.Event())

    async def live() -> None:
        await agent.run(reader)
        served.over.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            with trio.fail_after(PATIENCE):
                # One that fails at once is over before anybody has looked.
                while not (served.over.is_set() or paths.agent_socket.exists()):
                    await trio.sleep(0.01)
            yield served
            if not served.over.is_set():
                await served.stop(force=True)
    finally:
        for descriptor in (lock, reader, writer):
            os.close(descriptor)


async def said_by(link: Link, *argv: str) -> bytes:
    """What a command over there writes."""
    said, decoder = b"", execio.Decoder()
    async with await link.open(Exec([*argv])) as stream:
        await stream.send_all(execio.encode(execio.StdinEof()))
        while data := await stream.receive_some():
            for packet in decoder.receive_data(bytes(data)):
                if isinstance(packet, execio.Stdout):
                    said += packet.data
    return said


def daemons(way: ShellWay) -> list[Path]:
    """What the agents over there have as long as they live."""
    return sorted((way.home / ".cache/agentctl/run").glob("*/*.sock"))


async def until_both_run(way: ShellWay) -> None:
    """The files agent may come up after the instance has."""
    with trio.fail_after(PATIENCE):
        while len(daemons(way)) < 2:
            await trio.sleep(0.05)


async def test_a_machine_is_attached_and_let_go_of(attached: InstancePaths, way: ShellWay) -> None:
    async with running(attached, way) as served:
        status = await served.until_ready()
        assert status.attached is not None
        assert (status.attached.address, status.attached.link) == ("me@machine", LinkState.CONNECTED)
        assert status.attached.python
        assert status.attached.user
        assert (status.qemu_pid, status.cpus, status.docker_socket, status.hint) == (0, 0, "", "")
        async with connected(attached) as link:
            assert await said_by(link, "echo", "there") == b"there\n"
            with pytest.raises(RemoteFailure, match="no disk"):
                await link.request(GetDisk())
        await until_both_run(way)
        assert (record.load(attached) or Attached("", "")).program.endswith("guest_agent.remote")
        await served.stop()
    assert daemons(way) == []
    left = {path.name for path in attached.directory.iterdir()}
    assert left.isdisjoint({"agent.sock", "control.sock", "files.sock", "running.json", "agent.json"})
    ended = state.load(attached.state)
    assert (ended.wanted, ended.failure) == (False, "")


async def test_a_connection_that_is_lost_is_said_and_comes_back(
    attached: InstancePaths, way: ShellWay
) -> None:
    async with running(attached, way) as served:
        first = await served.until_ready()
        way.lose("it does not answer")
        status = await served.until(lambda status: not status.guest_connected)
        assert status.stage is Stage.RUNNING
        assert status.attached is not None
        assert (status.attached.link, status.attached.reason) == (LinkState.LOST, "it does not answer")
        assert "me@machine is not reached: it does not answer" in status.detail
        assert "agentctl detach default" in status.hint
        way.now(LinkState.LOST, "another host key", final=True)
        assert "agentctl attach default" in (await served.status()).hint
        way.now(LinkState.CONNECTED)
        status = await served.until_ready()
        assert status.agent_sessions > first.agent_sessions
        assert status.hint == ""
        async with connected(attached) as link:
            assert await said_by(link, "echo", "again") == b"again\n"


async def test_a_machine_that_cannot_be_reached_is_a_failure_with_its_reason(
    attached: InstancePaths, way: ShellWay
) -> None:
    way.refuses = UserError("machine does not answer", "try: ssh machine", ExitCode.GUEST)
    async with running(attached, way) as served:
        with trio.fail_after(PATIENCE):
            await served.over.wait()
    left = state.load(attached.state)
    assert (left.wanted, left.failure, left.hint) == (False, "machine does not answer", "try: ssh machine")
    assert left.failure_code == ExitCode.GUEST
    assert way.commands == []


async def test_the_successor_of_a_killed_agent_goes_on_trying(attached: InstancePaths, way: ShellWay) -> None:
    state.save(attached.state, InstanceState(wanted=True, agent_restarts=1))
    way.refuses = UserError("no route to host")
    async with running(attached, way) as served:
        await served.until(lambda status: status.attached is not None and status.attached.reason != "")
        assert not served.over.is_set()
        way.now(LinkState.CONNECTED)
        await served.until_ready()


async def test_a_successor_does_not_go_on_where_that_is_of_no_use(
    attached: InstancePaths, way: ShellWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(attached.state, InstanceState(wanted=True, agent_restarts=1))

    async def refused() -> None:
        way.now(LinkState.LOST, "another host key", final=True)
        raise UserError("another host key")

    monkeypatch.setattr(way, "connect", refused)
    async with running(attached, way) as served:
        with trio.fail_after(PATIENCE):
            await served.over.wait()
    assert state.load(attached.state).failure == "another host key"


async def test_nor_where_it_turns_out_to_be_of_no_use_later(attached: InstancePaths, way: ShellWay) -> None:
    state.save(attached.state, InstanceState(wanted=True, agent_restarts=1))
    way.refuses = UserError("no route to host")
    async with running(attached, way) as served:
        await served.until(lambda status: status.attached is not None and status.attached.reason != "")
        way.now(LinkState.LOST, "another host key", final=True)
        with trio.fail_after(PATIENCE):
            await served.over.wait()
    assert state.load(attached.state).failure == "another host key"


async def test_a_start_that_fails_leaves_nothing_running_there(
    attached: InstancePaths, way: ShellWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what would have been kept."""

    async def unheard(self: GuestLink, patience: float) -> None:
        await until_both_run(way)
        raise LinkError("no answer")

    record.save(attached, replace(record.load(attached) or Attached("", ""), keep=True))
    monkeypatch.setattr(GuestLink, "wait", unheard)
    async with running(attached, way) as served:
        with trio.fail_after(PATIENCE):
            await served.over.wait()
    assert "does not answer: no answer" in state.load(attached.state).failure
    assert daemons(way) == []


async def test_what_is_to_be_kept_runs_on_unless_it_is_forced(attached: InstancePaths, way: ShellWay) -> None:
    record.save(attached, replace(record.load(attached) or Attached("", ""), keep=True))
    async with running(attached, way) as served:
        status = await served.until_ready()
        assert status.attached is not None
        assert status.attached.keep
        await until_both_run(way)
        await served.stop()
    assert len(daemons(way)) == 2
    assert any("--grace inf" in command for command in way.commands)
    state.save(attached.state, InstanceState(wanted=True))
    async with running(attached, way) as served:
        await served.until_ready()
        await served.stop(force=True)
    assert daemons(way) == []


async def test_what_the_machine_has_and_what_it_lacks(
    attached: InstancePaths, way: ShellWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker there has a context, which is not made the current one; what lacks is a warning with its fix. And who
    connects is given what was answered at the terminal, which is nowhere on the disk."""
    socket = way.home / "docker.sock"
    lacks = Problem("folders cannot be mounted", "apt-get install fuse3")
    given = answers.keep({"Passphrase of the key k": "secret"})
    assert given is not None

    def has(found: Capabilities) -> Capabilities:
        return replace(found, docker=Docker(str(socket)), problems=(lacks,))

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"I am docker")

    monkeypatch.setattr(way, "has", has)
    async with trio.open_nursery() as nursery:
        with trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(socket))
            listening.listen(4)
            nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listening)])
            async with running(attached, way, given) as served:
                status = await served.until_ready()
                assert status.warnings == ["folders cannot be mounted (apt-get install fuse3)"]
                assert status.docker_socket == str(attached.docker_socket)
                with trio.fail_after(PATIENCE):
                    async with await trio.open_unix_socket(status.docker_socket) as client:
                        assert await client.receive_some() == b"I am docker"
                folder = Path(os.environ["DOCKER_CONFIG"])
                (metadata,) = (folder / "contexts/meta").glob("*/meta.json")
                assert json.loads(metadata.read_text())["Name"] == status.docker_context == "agentctl"
                assert not (folder / "config.json").exists()
            nursery.cancel_scope.cancel()
    assert way.answers == {"Passphrase of the key k": "secret"}
    assert answers.read(given) == way.answers, "and so is the one after it"
    os.close(given)
    files = [path for path in attached.directory.iterdir() if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in files)


async def test_its_configuration_begins_without_folders(attached: InstancePaths) -> None:
    host = configuration.Host.measure()
    attached.config.unlink()
    attached.home.template.write_text("mounts: [/srv]\n")
    asked = configuration.load(attached, host)
    assert asked.mounts == ()
    configuration.save(attached, asked)
    text = attached.config.read_text()
    assert "mounts:" in text
    assert "cpus:" not in text
    assert configuration.load(attached, host) == replace(
        asked, identity=configuration.load(attached, host).identity
    )
    await trio.lowlevel.checkpoint()
