"""Ending what cannot end itself: orphans, agents that hang, and what the dead left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from host_agent import docker_context, ending, state
from host_agent.client import hello
from host_agent.commands import lifecycle
from host_agent.docker_context import Activation
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from host_agent.state import InstanceState
from host_agent.unix_listening import listen_unix
from protocol.api import Done, StopInstance
from protocol.errors import LinkError
from protocol.link import Link, Service
from protocol.session import Role


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The docker CLI's folder, our context current in it."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text('{"currentContext": "agentctl"}')
    return tmp_path / "docker"


@pytest.fixture
def sleeper(instance: InstancePaths) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the instance's lock and listens to nothing but SIGKILL: an agent that hangs."""
    script = (
        "import fcntl, os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, instance.lock], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def leave_behind(instance: InstancePaths) -> None:
    state.save(instance.state, InstanceState(wanted=True, previous_context="mine", failure="x"))
    for path in (instance.agent_socket, instance.docker_socket):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    instance.root_overlay.touch()
    instance.data_disk.write_bytes(b"precious")


def assert_tidy(instance: InstancePaths, docker: Path) -> None:
    assert not any(path.is_socket() for path in instance.directory.iterdir())
    assert not instance.root_overlay.exists()
    assert instance.data_disk.read_bytes() == b"precious"
    assert docker_context.current(docker) != "agentctl"
    left = state.load(instance.state)
    assert (left.wanted, left.stopping, left.failure, left.previous_context) == (False, False, "", None)


async def test_what_the_dead_left_is_removed_and_the_context_restored(
    instance: InstancePaths, docker: Path
) -> None:
    leave_behind(instance)
    assert await ending.end_orphan(instance) is False
    assert_tidy(instance, docker)


async def test_a_context_that_is_not_ours_any_more_is_left_alone(
    instance: InstancePaths, docker: Path
) -> None:
    leave_behind(instance)
    (docker / "config.json").write_text('{"currentContext": "theirs"}')
    await ending.end_orphan(instance)
    assert json.loads((docker / "config.json").read_text()) == {"currentContext": "theirs"}


async def test_nothing_is_touched_while_somebody_holds_the_lock(
    instance: InstancePaths, docker: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    leave_behind(instance)
    assert await ending.end_orphan(instance) is False
    assert instance.agent_socket.is_socket()
    assert state.load(instance.state).wanted


async def test_an_agent_that_hangs_is_ended_by_force(
    instance: InstancePaths, docker: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    leave_behind(instance)
    identity = ProcessIdentity.of(sleeper.pid)
    assert identity is not None
    identity.write(instance.agent_identity)
    await ending.end_by_force(instance)
    assert sleeper.wait(timeout=5) == -signal.SIGKILL
    assert_tidy(instance, docker)


async def test_an_instance_that_never_was_is_not_made(instance: InstancePaths) -> None:
    os.rmdir(instance.directory)
    assert await ending.end_orphan(instance) is False
    assert not instance.directory.exists()


def test_the_context_of_before_is_what_comes_back(instance: InstancePaths, docker: Path) -> None:
    """The activation that is remembered across a crash names what was current before ours."""
    activation = docker_context.activate(docker, "agentctl", Activation("agentctl", "mine", active=True))
    assert activation.previous == "mine"


async def test_who_was_told_that_it_stopped_waits_until_it_is_gone(
    instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last steps of agent and keeper take long, which have nothing left to do."""
    monkeypatch.setattr(lifecycle, "RESTART_TIME", 0.1)
    monkeypatch.setattr(ending, "RESTART_TIME", 0.1)
    lock = state.try_lock(instance.lock)
    assert lock is not None
    stopped = trio.Event()

    async def stop(_: StopInstance) -> Done:
        await trio.lowlevel.checkpoint()
        stopped.set()
        return Done()

    async def agent(transport: trio.abc.Stream) -> None:
        service = Service()
        service.on_request(StopInstance, stop)
        with suppress(LinkError):
            await Link(transport, Role.SERVER, service, hello("agentctl-host")).run()

    async def end_slowly() -> None:
        await stopped.wait()
        await trio.sleep(1)
        os.close(lock)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, agent, [listen_unix(instance.agent_socket)])
            nursery.start_soon(end_slowly)
            assert await lifecycle.stop_instance(instance, False)
            assert not state.is_locked(instance.lock)
            nursery.cancel_scope.cancel()
