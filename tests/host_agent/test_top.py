"""How busy an instance is, looked at through its host agent's socket, and shown on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from host_agent import groups, state, top
from host_agent.errors import ExitCode, UserError
from host_agent.instance_load import Load
from host_agent.paths import InstancePaths
from protocol.api import MountState, Usage
from tests.host_agent.stand_in import HOME, STATUS, WEB, Agent, running
from tests.host_agent.test_instance_load import GUEST

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "host_agent", "top"]


@pytest.fixture
def lock(instance: InstancePaths) -> int:
    """Held as its keeper and its agent would."""
    descriptor = state.try_lock(instance.lock)
    assert descriptor is not None
    return descriptor


def busy() -> Agent:
    """One whose guest worked for two seconds in between, and whose processes are this one."""
    status = replace(STATUS, qemu_pid=os.getpid(), agent_pid=os.getpid(), file_server_pid=0)
    later = replace(GUEST, time=GUEST.time + 4, cpu_busy=GUEST.cpu_busy + 2)
    return Agent(status=status, usage=[Usage(0, 0, GUEST), Usage(1000, 0, later)])


async def test_once_is_two_looks(instance: InstancePaths) -> None:
    instance.data_disk.write_bytes(b"x" * 8192)
    agent = busy()
    with trio.fail_after(20):
        async with running(instance, agent):
            started = time.monotonic()
            load = await top.once(instance, 0.2)
            assert time.monotonic() - started >= 0.2
    assert load.guest is not None
    assert load.guest.cpu_busy == 0.5
    assert load.received > 0
    assert {each.name: each.pid for each in load.processes} == {
        "qemu": os.getpid(),
        "host-agent": os.getpid(),
    }
    assert all(each.memory > 1 << 20 for each in load.processes)
    assert load.disk_allocated >= 8192
    assert load.disk_free > 0
    assert [each.path for each in load.mounts] == [HOME.spec.guest_path]
    assert [(row.process, row.container) for row in load.ports] == [("nginx", "web")]


async def test_who_listens_is_asked_for_when_a_port_is_new_and_not_too_often(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, loads = busy(), list[Load]()
    enough = trio.CancelScope()

    def tell(load: Load) -> None:
        loads.append(load)
        if len(loads) == 3:
            agent.rows = [WEB, replace(WEB, guest_port=81, host_port=81)]
        if len(loads) == 5:
            monkeypatch.setattr(top, "OWNERS_AGAIN", 0.0)
            agent.rows = [*agent.rows, replace(WEB, guest_port=82, host_port=82)]
        if len(loads) == 7:
            enough.cancel()

    with trio.fail_after(20):
        async with running(instance, agent):
            with enough:
                await top.follow(instance, 0.01, tell)
    assert agent.owners_asked == 2
    assert [[row.container for row in load.ports] for load in loads[::3]] == [
        ["web"],
        ["web", ""],
        ["web"] * 3,
    ]


async def test_a_host_agent_that_is_killed_is_waited_for_until_the_instance_has_ended(
    instance: InstancePaths, lock: int
) -> None:
    loads: list[Load] = []
    news = trio.Event()

    def tell(load: Load) -> None:
        loads.append(load)
        news.set()

    with trio.fail_after(20):
        with pytest.raises(UserError) as caught, groups.collapsed():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: top.follow(instance, 0.01, tell, at_once=True))
                for _ in range(2):
                    async with running(instance, busy()):
                        news = trio.Event()
                        await news.wait()
                os.close(lock)
    assert loads[0].interval == 0.0
    assert caught.value.exit_code == ExitCode.NOT_RUNNING


async def test_the_command_prints_one_document_or_a_line_each_interval(
    instance: InstancePaths, lock: int
) -> None:
    async def output(*words: str) -> str:
        done = await trio.run_process([*COMMAND, *words], capture_stdout=True, cwd=REPOSITORY)
        return done.stdout.decode()

    with trio.fail_after(60):
        async with running(instance, busy()):
            load = json.loads(await output("--once", "--json", "--interval", "0.1"))
            assert (load["name"], load["stage"], load["guest"]["cpus"]) == ("default", "running", 2)
            assert load["mounts"][0]["state"] == MountState.MOUNTED
            assert "localhost:8080" in await output("--interval", "0.1")  # not a terminal
            async with trio.open_nursery() as nursery:
                process = await nursery.start(
                    lambda task_status: trio.run_process(
                        [*COMMAND, "--json", "--interval", "0.1"],
                        stdout=subprocess.PIPE,
                        cwd=REPOSITORY,
                        check=False,
                        task_status=task_status,
                    )
                )
                told = b""
                while told.count(b"\n") < 3:
                    told += await process.stdout.receive_some()
                process.terminate()
    assert [json.loads(line)["name"] for line in told.splitlines()[:3]] == ["default"] * 3
    os.close(lock)


@pytest.mark.parametrize("key", [b"q", b"\x03"])
async def test_on_a_terminal_it_lives_until_a_key_and_leaves_it_as_it_was(
    instance: InstancePaths, lock: int, key: bytes
) -> None:
    main, secondary = pty.openpty()
    before = termios.tcgetattr(secondary)
    termios.tcsetwinsize(secondary, (40, 120))

    def read_until(condition: Callable[[bytes], bool]) -> bytes:
        seen = b""
        while not condition(seen):
            seen += os.read(main, 65536)
        return seen

    with trio.fail_after(60):
        async with running(instance, busy()):
            process = await trio.lowlevel.open_process(
                [*COMMAND, "--interval", "0.1"],
                stdin=secondary,
                stdout=secondary,
                stderr=secondary,
                cwd=REPOSITORY,
                start_new_session=True,
                preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal
                env={**os.environ, "TERM": "xterm"},
            )
            shown = await trio.to_thread.run_sync(read_until, lambda seen: seen.count(b"load 0.50") > 2)
            os.write(main, key)
            assert await process.wait() == 0
            shown += await trio.to_thread.run_sync(read_until, lambda seen: b"\x1b[?1049l" in seen)
    assert b"\x1b[?1049h" in shown
    assert b"q ends" in shown
    assert b"error" not in shown
    assert termios.tcgetattr(secondary) == before
    for descriptor in (main, secondary, lock):
        os.close(descriptor)


async def test_an_agent_that_does_not_know_what_it_uses(instance: InstancePaths) -> None:
    with trio.fail_after(20):
        async with running(instance, busy()) as server:
            register = server._register
            server._register = lambda service, link, nursery: (  # type: ignore[method-assign]
                register(service, link, nursery),
                service._requests.pop("usage"),
            )[0]
            with pytest.raises(UserError, match="of an older agentctl"):
                await top.once(instance, 0.1)
