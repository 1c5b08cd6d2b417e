"""The whole way of a connection, with real processes: found or started, handed over, lost, replaced, over."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from guest_agent.remote.rundir import Process, RunDir
from protocol import execio, packedfile
from protocol.api import Exec, GetGuestInfo, GetGuestUsage, Shutdown
from protocol.build import digest
from protocol.errors import ErrorCode, RpcError
from protocol.link import Hello, Link, Role, Service
from tests.guest_agent.remote.conftest import PATIENCE, Connection, Machine


async def output_of(link: Link, *argv: str, stdin: bytes = b"") -> bytes:
    """What a process there writes, which must end well."""
    async with await link.open(Exec(list(argv))) as stream, trio.open_nursery() as nursery:

        async def feed() -> None:
            for start in range(0, len(stdin), execio.MAX_DATA):
                await stream.send_all(execio.encode(execio.Stdin(stdin[start : start + execio.MAX_DATA])))
            await stream.send_all(execio.encode(execio.StdinEof()))

        nursery.start_soon(feed)
        decoder, said = execio.Decoder(), b""
        with trio.fail_after(PATIENCE):
            async for data in stream:
                for packet in decoder.receive_data(data):
                    if isinstance(packet, execio.Stdout):
                        said += packet.data
                    else:
                        assert packet == execio.Exit(0)
    return said


def memory_of(process: Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()


async def works(connection: Connection) -> None:
    async with connection.session() as link:
        assert (await link.request(GetGuestInfo())).cpus >= 1


async def test_a_machine_that_is_no_vm_is_used_and_not_configured(machine: Machine) -> None:
    connection = await machine.connect()
    async with connection.session() as link:
        copies = {"packed-copies"} if packedfile.is_there() else set()
        assert set(link.peer.capabilities) == {"dial", "exec", "ports"} | copies
        assert link.peer.digest == digest()
        assert link.peer.bulk is None
        assert await output_of(link, "id", "-u") == f"{os.geteuid()}\n".encode()
        info = await link.request(GetGuestInfo())
        assert info.data_total >= info.data_free > 0
        assert (await link.request(GetGuestUsage())).data_total > 0
        with pytest.raises(RpcError) as refused:
            await link.request(Shutdown())
        assert refused.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("pipes", [False, True])
async def test_whatever_stdio_is_all_of_it_gets_through(machine: Machine, pipes: bool) -> None:
    content = os.urandom(3_000_000)
    connection = await machine.connect(pipes=pipes)
    async with connection.session() as link:
        assert await output_of(link, "cat", stdin=content) == content
    await connection.aclose()
    assert await connection.ended() == 0


async def test_what_was_answered_ahead_both_agents_see_in_memory_that_goes_with_the_session(
    machine: Machine,
) -> None:
    for plane in ("control", "files"):
        connection = await machine.connect(plane=plane)
        async with connection.session():
            pass
    fence = RunDir.of("one", machine.home).fence
    for plane in ("control", "files"):
        assert str(fence) in memory_of(machine.agent(plane=plane))
    assert RunDir.of("two", machine.home).fence != fence
    await machine.end()
    assert not fence.exists()


@pytest.mark.parametrize("pipes", [False, True])
async def test_the_agent_outlives_its_connections(machine: Machine, pipes: bool) -> None:
    agents = set()
    for _ in range(3):
        connection = await machine.connect(pipes=pipes)
        await works(connection)
        agents.add(machine.agent())
        await connection.aclose()
        assert await connection.ended() == 0
    (agent,) = agents
    assert os.getsid(agent.pid) == agent.pid
    assert os.readlink(f"/proc/{agent.pid}/cwd") == "/"


@pytest.mark.parametrize("pipes", [False, True])
async def test_who_connects_again_is_served_and_the_one_before_hung_up_on(
    machine: Machine, pipes: bool
) -> None:
    first = await machine.connect(pipes=pipes)
    await works(first)
    agent = machine.agent()
    second = await machine.connect(pipes=pipes)
    await works(second)
    await first.hangs_up()
    assert await first.ended() == 0
    await works(second)
    assert machine.agent() == agent


@pytest.mark.parametrize("pipes", [False, True])
async def test_one_that_does_not_read_any_more_is_replaced_too(machine: Machine, pipes: bool) -> None:
    """As it is with a connection whose other end has no network any more: what was said fills all there is to fill."""
    first = await machine.connect(pipes=pipes)
    with trio.fail_after(PATIENCE):
        link = Link(await first.channel.establish(), Role.HOST, Service(), Hello(digest=digest()))
        async with trio.open_nursery() as nursery:
            await nursery.start(link.run)
            for _ in range(16):
                await link.open(Exec(["cat", "/dev/zero"]))
            nursery.cancel_scope.cancel()
    second = await machine.connect(pipes=pipes)
    await works(second)
    await first.hangs_up()
    assert await first.ended() == 0


@pytest.mark.parametrize("pipes", [False, True])
async def test_nothing_is_started_for_who_has_left_already(machine: Machine, pipes: bool) -> None:
    rundir = RunDir.of("one", machine.home)
    rundir.make()
    starting = rundir.plane("control").take_lock()  # as another connector that is about to start the agent
    assert starting is not None
    connection = await machine.connect(pipes=pipes)
    await connection.aclose()
    assert await connection.ended() == 0
    os.close(starting)
    assert rundir.plane("control").holder() is None


@pytest.mark.parametrize("pipes", [False, True])
async def test_a_connector_that_is_killed_takes_its_connection_along(machine: Machine, pipes: bool) -> None:
    connection = await machine.connect(pipes=pipes)
    await works(connection)
    agent = machine.agent()
    connection.process.kill()
    await connection.hangs_up()
    again = await machine.connect(pipes=pipes)
    await works(again)
    assert machine.agent() == agent


async def test_the_agent_has_nothing_of_the_connection_but_what_it_was_handed(machine: Machine) -> None:
    connection = await machine.connect()
    await works(connection)
    await connection.aclose()
    assert await connection.ended() == 0
    assert connection.process.stderr is not None
    with trio.fail_after(PATIENCE):  # else sshd would wait for it
        assert b"".join([bytes(part) async for part in connection.process.stderr]) == b""
    await works(await machine.connect())


async def test_noise_ends_neither_agent_nor_connection(machine: Machine) -> None:
    connection = await machine.connect()
    await connection.transport.send_all(os.urandom(300_000))
    await works(connection)


async def test_an_agent_that_is_killed_is_replaced(machine: Machine) -> None:
    connection = await machine.connect()
    await works(connection)
    before = machine.agent()
    assert before.signal(signal.SIGKILL)
    await connection.hangs_up()
    assert await connection.ended() == 0
    await works(await machine.connect())
    assert machine.agent() != before


async def test_many_who_come_at_once_find_one_agent(machine: Machine) -> None:
    connections = [await machine.connect() for _ in range(5)]
    ended = 0
    async with trio.open_nursery() as nursery:

        async def wait(connection: Connection) -> None:
            nonlocal ended
            assert await connection.process.wait() == 0
            ended += 1
            if ended == len(connections) - 1:
                nursery.cancel_scope.cancel()

        nursery.cancel_scope.deadline = trio.current_time() + PATIENCE
        for connection in connections:
            nursery.start_soon(wait, connection)
    assert ended == len(connections) - 1
    (left,) = [connection for connection in connections if connection.process.returncode is None]
    await works(left)


async def test_after_the_time_of_grace_nothing_runs(machine: Machine) -> None:
    connection = await machine.connect(grace="0.3")
    await works(connection)
    agent = machine.agent()
    await connection.aclose()
    await machine.is_over(agent)
    await works(await machine.connect())
    assert machine.agent() != agent


async def test_who_is_connected_is_not_in_the_time_of_grace(machine: Machine) -> None:
    connection = await machine.connect(grace="0")
    async with connection.session() as link:
        agent = machine.agent()
        for _ in range(20):
            assert (await link.request(GetGuestInfo())).cpus >= 1
            await trio.sleep(0.02)
    assert machine.agent() == agent


async def test_processes_end_with_their_connection(machine: Machine) -> None:
    connection = await machine.connect(grace="0.1")
    async with connection.session() as link:
        async with await link.open(Exec(["sh", "-c", "echo $$; exec sleep 1000"])) as stream:
            (packet,) = execio.Decoder().receive_data(await stream.receive_some())
            assert isinstance(packet, execio.Stdout)
            process = Path(f"/proc/{int(packet.data)}")
            await connection.aclose()
            with trio.fail_after(PATIENCE):
                while process.exists():  # noqa: ASYNC240
                    await trio.sleep(0.02)


async def test_sessions_side_by_side_know_nothing_of_each_other(machine: Machine) -> None:
    one, two = await machine.connect("one"), await machine.connect("two")
    await works(one)
    await works(two)
    assert machine.agent("one") != machine.agent("two")
    await machine.end("one")
    await one.hangs_up()
    await works(two)


async def test_an_agent_of_another_build_makes_room(machine: Machine, tmp_path: Path) -> None:
    before = await machine.connect()
    await works(before)
    agent = machine.agent()
    machine.other_build(tmp_path / "other")
    connection = await machine.connect()
    async with connection.session() as link:
        assert link.peer.digest != digest()
    await machine.is_over(agent)
    assert await before.ended() == 0


async def test_an_unpacked_archive_is_run_as_such(machine: Machine, tmp_path: Path) -> None:
    """By its own first module, which knows where to look for the others, and with nothing that is installed."""
    machine.other_build(tmp_path / "unpacked")
    libraries = str(Path(trio.__file__).parents[1])
    (machine.root / "__main__.py").write_text(
        f"import sys; sys.path.append({libraries!r})\n"
        "from guest_agent.remote.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    await works(await machine.connect())
    command = Path(f"/proc/{machine.agent().pid}/cmdline").read_bytes().split(b"\0")  # noqa: ASYNC240
    assert command[1:6] == [b"-IS", b"-X", b"utf8", bytes(machine.root), b"daemon"]


async def test_a_home_with_a_long_path(machine: Machine, tmp_path: Path) -> None:
    machine.home = tmp_path / ("long" * 50)
    machine.home.mkdir()
    await works(await machine.connect())


# --- what cannot be ----------------------------------------------------------------------------------------


async def fails(connection: Connection) -> str:
    """What it says."""
    assert await connection.ended() == 3
    assert connection.process.stderr is not None
    said = b"".join([bytes(part) async for part in connection.process.stderr]).decode()
    assert said.count("\n") == 1, said
    return said


async def test_a_home_that_cannot_be_used(machine: Machine) -> None:
    (machine.home / ".cache").write_text("in the way")
    assert "cannot be made: Not a directory" in await fails(await machine.connect())


async def test_a_session_that_cannot_be(machine: Machine) -> None:
    assert "'../x' cannot be the name of a session" in await fails(await machine.connect("../x"))
    machine.sessions.clear()


async def test_an_agent_that_does_not_start_says_why(machine: Machine, tmp_path: Path) -> None:
    machine.other_build(tmp_path / "other")
    (machine.root / "guest_agent" / "agent.py").write_text("raise RuntimeError('a broken agent')")
    said = await fails(await machine.connect())
    assert "ends as soon as it is started: RuntimeError: a broken agent" in said


async def test_stdio_that_leads_nowhere_is_let_go(machine: Machine) -> None:
    await works(await machine.connect())
    with open(os.devnull, "r+b") as nothing:  # noqa: ASYNC230
        with trio.fail_after(PATIENCE):
            done = await trio.run_process(
                machine.command("connect", "control", "one"),
                stdin=nothing,
                stdout=nothing,
                check=False,
                env=machine.environment,
            )
    assert done.returncode == 0
    await works(await machine.connect())


async def test_a_full_disk_is_said_to_be_full(machine: Machine) -> None:
    if os.geteuid() != 0:
        pytest.skip("a filesystem of one's own needs root")
    namespace = ["unshare", "--mount", "--propagation", "private"]
    if (await trio.run_process([*namespace, "true"], check=False, capture_stderr=True)).returncode:
        pytest.skip("a mount namespace is not permitted here")
    prefix = [*namespace, "sh", "-c"]
    script = f'mount -t tmpfs -o size=64k,nr_inodes=100 t {machine.home} && cat /dev/zero >{machine.home}/f 2>&-; exec "$@"'
    machine.prefix = (*prefix, script, "sh")
    connection = await machine.connect()
    machine.sessions.clear()  # its home is gone with it
    assert "No space left on device" in (said := await fails(connection)) or "is full" in said
