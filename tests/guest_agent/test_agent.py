"""The real agent, in a process of its own, over a unix socket that stands in for the port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock as Clock

from guest_agent import agent
from guest_agent.__main__ import CONTROL_PORT, main
from guest_agent.agent import Agent
from guest_agent.fdstore import notify
from protocol import execio
from protocol.api import DialTcp, Exec, GetGuestInfo, GetOwners, Listener, Listeners
from protocol.build import digest
from protocol.errors import LinkError
from protocol.link import Hello, Link, Role, SerialChannel, Service

REPOSITORY = Path(__file__).parents[2]
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Host:
    """The host's side: the socket's owner, and what it knows of the guest's listeners."""

    def __init__(self, listener: trio.SocketListener, agent: trio.Process) -> None:
        self._listener = listener
        self.agent = agent
        self.known: set[Listener] = set()
        self.fulls = 0
        self._news = trio.Event()

    async def _learn(self, notice: Listeners) -> None:
        self.fulls += notice.full
        self.known = (set() if notice.full else self.known - set(notice.removed)) | set(notice.added)
        self._news.set()
        self._news = trio.Event()

    async def sees(self, port: int, listening: bool) -> None:
        with trio.fail_after(10):
            while (port in {listener.port for listener in self.known}) != listening:
                await self._news.wait()

    async def accept(self) -> SerialChannel:
        with trio.fail_after(20):
            return SerialChannel(await self._listener.accept())

    @asynccontextmanager
    async def session(self, channel: SerialChannel) -> AsyncIterator[Link]:
        service = Service()
        service.on_notice(Listeners, self._learn)
        with trio.fail_after(20):
            stream = await channel.establish()
        link = Link(stream, Role.HOST, service, Hello(name="host", digest=digest()))
        async with trio.open_nursery() as nursery:
            await nursery.start(link.run)
            yield link
            await link.goodbye("the session is over")


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    path = tmp_path / "control.sock"
    # The notify socket, too: the agent has its transport when it says that it waits.
    with socket.socket(socket.AF_UNIX) as bound, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        bound.bind(str(path))
        bound.listen()
        bound.setblocking(False)
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        process = await trio.lowlevel.open_process(
            [sys.executable, "-W", "error", "-m", "guest_agent", "--connect-unix", str(path)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        try:
            state = await trio.to_thread.run_sync(manager.recv, 100)
            assert state == b"STATUS=waiting for the host"
            yield Host(listener, process)
        finally:
            with trio.CancelScope(shield=True):
                process.terminate()
                with trio.move_on_after(10):
                    await process.wait()
                process.kill()
                assert process.stderr is not None
                log = b"".join([bytes(part) async for part in process.stderr])
                await process.stderr.aclose()
                await process.wait()
        assert process.returncode == 0, log.decode()
        assert b"Traceback" not in log, log.decode()


async def test_a_whole_session(host: Host) -> None:
    channel = await host.accept()
    async with host.session(channel) as link:
        assert link.peer.name == "guest"
        assert link.peer.digest == digest()
        assert link.peer.boot_id == BOOT_ID
        assert {"dial", "exec", "ports"} <= set(link.peer.capabilities)

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            await host.sees(port, listening=True)
            stream = await link.open(DialTcp("127.0.0.1", port))
            served, _ = server.accept()
            served.sendall(b"hello")
            served.close()
            assert b"".join([data async for data in stream]) == b"hello"
            await stream.aclose()
        await host.sees(port, listening=False)

        info = await link.request(GetGuestInfo())
        assert info.port_detection in ("tracefs", "polling")
        assert info.port_dumps >= 2

        with socket.create_server(("127.0.0.1", 0)) as server:
            owners = (await link.request(GetOwners())).owners
            (owner,) = [each for each in owners if each.port == server.getsockname()[1]]
            assert owner.process == Path("/proc/self/comm").read_text().strip()  # noqa: ASYNC240

        async with await link.open(Exec(["sh", "-c", "echo $0 $1", "a", "b c"])) as stream:
            packets = execio.Decoder().receive_data(b"".join([data async for data in stream]))
            assert packets == [execio.Stdout(b"a b c\n"), execio.Exit(0)]
    await channel.aclose()


async def test_sessions_follow_each_other_and_each_is_told_everything(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        channel = await host.accept()
        for number in range(1, 4):
            async with host.session(channel):
                await host.sees(port, listening=True)
                assert host.fulls == number
            host.known.clear()
        # The transport itself goes, in the middle of a session, and comes back.
        async with host.session(channel):
            await host.sees(port, listening=True)
        await channel.aclose()
        host.known.clear()
        channel = await host.accept()
        async with host.session(channel):
            await host.sees(port, listening=True)
    await channel.aclose()
    assert host.fulls == 5


async def test_a_host_that_is_killed_mid_session_is_forgotten(host: Host) -> None:
    channel = await host.accept()
    stream = await channel.establish()
    link = Link(stream, Role.HOST, Service(), Hello(name="host"))
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        process = await link.open(Exec(["sh", "-c", "echo $$; exec sleep 60"]))
        packets = execio.Decoder().receive_data(await process.receive_some())
        assert isinstance(packets[0], execio.Stdout)
        pid = int(packets[0].data)
        nursery.cancel_scope.cancel()
    async with host.session(channel) as successor:
        assert (await successor.request(GetGuestInfo())).cpus >= 1
        with trio.fail_after(10):
            while Path(f"/proc/{pid}").exists():  # noqa: ASYNC240
                await trio.sleep(0.02)
    await channel.aclose()


async def test_noise_on_the_line_does_not_end_the_agent(host: Host) -> None:
    channel = await host.accept()
    await channel.transport.send_all(os.urandom(300_000))
    async with host.session(channel) as link:
        assert link.peer.name == "guest"
    await channel.aclose()


async def test_it_ends_on_a_signal_while_nobody_is_connected(host: Host) -> None:
    host.agent.send_signal(signal.SIGTERM)
    with trio.fail_after(10):
        assert await host.agent.wait() == 0


async def test_a_transport_that_cannot_be_opened_is_tried_again(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    attempts: list[float] = []

    async def fail() -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        attempts.append(trio.current_time())
        raise PermissionError(13, "not yours")

    with trio.move_on_after(10):
        await Agent(nursery).serve(fail)
    assert len(attempts) == pytest.approx(10 / agent.PAUSE, abs=1)


@pytest.mark.parametrize(("prepared", "ready_at"), [(2, 5.0), (1, agent.READY_AFTER), (0, agent.READY_AFTER)])
async def test_docker_is_let_go_ahead_once_it_is_prepared_or_nobody_comes(
    autojump_clock: Clock,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    prepared: int,
    ready_at: float,
) -> None:
    said: list[tuple[float, str]] = []
    monkeypatch.setattr(agent.fdstore, "notify", lambda state: said.append((trio.current_time(), state)))
    started = trio.current_time()
    tested = Agent(nursery)
    nursery.start_soon(tested.report_readiness)
    await trio.sleep(5)
    assert said == []
    for event in tested._prepared[:prepared]:
        event.set()
    await trio.sleep(agent.READY_AFTER)
    assert said == [(started + ready_at, "READY=1")]


def test_a_manager_that_is_not_there_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


def test_a_manager_in_the_abstract_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # autobind: an abstract name
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + manager.getsockname()[1:].decode())
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 2
    said = capsys.readouterr().err
    assert "usage: python3 -m guest_agent [PORT" in said
    assert f"(default: {CONTROL_PORT})" in said


def test_nothing_heavy_is_imported_on_the_way_to_readiness() -> None:
    program = (
        "import sys, guest_agent.__main__\n"
        "heavy = {'pyroute2', 'asyncio', 'argparse', 'psutil', 'sqlite3', 'http'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, timeout=60)


async def test_a_host_of_another_version_is_not_answered_in_a_hurry(
    autojump_clock: Clock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says hello, is refused, and begins again at once; the agent must not spin with it."""
    ours, theirs = trio.testing.memory_stream_pair()
    sessions = 0

    async def stranger() -> None:
        nonlocal sessions
        channel = SerialChannel(theirs)
        while True:
            link = Link(await channel.establish(), Role.HOST, Service(), Hello(major=99, name="stranger"))
            sessions += 1
            with suppress(LinkError):
                await link.run()

    async def transport() -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    nursery.start_soon(stranger)
    with trio.move_on_after(20):
        await Agent(nursery).serve(transport)
    assert 2 <= sessions <= 20 / agent.PAUSE + 2
    nursery.cancel_scope.cancel()
