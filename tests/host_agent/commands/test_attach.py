"""``attach`` and ``detach`` as they are typed; the machine is a shell of this one, or is not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from host_agent import ending, starting, state
from host_agent.commands import attach as commands
from host_agent.configuration import config as configuration
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from host_agent.remote import record
from host_agent.remote.attach import Ways
from host_agent.remote.record import Attached
from protocol.api import Attachment, InstanceStatus, LinkState, MountSpec
from tests.host_agent.command_line import Done, agentctl, said
from tests.host_agent.remote.shell_way import ShellWay
from tests.host_agent.stand_in import STATUS, Agent, running


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShellWay]:
    folder = Path(tempfile.mkdtemp(prefix="ac-"))
    found = ShellWay(folder)
    monkeypatch.setattr(commands, "_ways", lambda: Ways(found.opened, found.install))
    yield found
    shutil.rmtree(folder, ignore_errors=True)


def reached(address: str = "me@machine") -> InstanceStatus:
    machine = Attachment(address, LinkState.CONNECTED, user="me", python="3.11.2", mounting="fusermount3")
    return replace(
        STATUS, qemu_pid=0, cpus=0, docker_socket="", docker_context="", attached=machine, runtime=""
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[InstancePaths]:
    """The instances that were started; that is all that happens to them."""
    found: list[InstancePaths] = []

    def start(paths: InstancePaths, *_: object, **__: object) -> InstanceStatus:
        found.append(paths)
        return replace(reached(), name=paths.name)

    monkeypatch.setattr(starting, "start", start)
    return found


def attach_as(home: Home, name: str, address: str = "me@machine") -> InstancePaths:
    """An instance that was attached before."""
    paths = home.instance(name)
    paths.ensure()
    record.save(paths, Attached(address, f"{name}-0123", home="/home/me"))
    return paths


def test_a_machine_becomes_an_instance_that_is_called_like_its_host(
    home: Home, way: ShellWay, started: list[InstancePaths], tmp_path: Path
) -> None:
    done = agentctl(
        "attach", "me@Build.Example.com", "--mount", f"{tmp_path}:/srv/src:ro", "--forward", "8080:80"
    )
    assert done.returncode == 0, done.stderr
    assert "connecting to me@Build.Example.com" in done.stderr
    (paths,) = started
    assert paths.name == "build-example-com"
    found = record.load(paths)
    assert found is not None
    assert (found.address, found.keep) == ("me@Build.Example.com", False)
    asked = configuration.load(paths, configuration.Host.measure())
    assert asked.mounts == (MountSpec(str(tmp_path), "/srv/src", read_only=True),)
    assert [(rule.guest_port, rule.host_port) for rule in asked.rules] == [(80, 8080)]
    assert "machine" in done.stdout
    assert json.loads(agentctl("list", "--json").stdout)[0]["attached"]["address"] == "me@Build.Example.com"


def test_it_is_attached_again_by_its_name_with_all_it_had(
    home: Home, way: ShellWay, started: list[InstancePaths], tmp_path: Path
) -> None:
    agentctl("attach", "me@machine", "--name", "box", "--keep", "--mount", f"{tmp_path}:/srv/a")
    more = tmp_path / "more"
    more.mkdir()
    for words in (["attach", "box"], ["attach", "me@machine"], ["--instance", "box", "up"]):
        assert agentctl(*words, "--mount", f"{more}:/srv/b").returncode == 0
    assert agentctl("--instance", "box", "attach", "box").returncode == 0
    assert [paths.name for paths in started] == ["box"] * 5
    found = record.load(home.instance("box"))
    assert found is not None
    assert found.keep
    asked = configuration.load(home.instance("box"), configuration.Host.measure())
    assert [spec.guest_path for spec in asked.mounts] == ["/srv/a", "/srv/b"]


def test_a_folder_of_the_home_is_in_the_home_there(
    home: Home, way: ShellWay, started: list[InstancePaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "src").mkdir()
    assert agentctl("attach", "machine", "--mount", "~/src", "--mount", "~/src:~/elsewhere").returncode == 0
    asked = configuration.load(home.instance("machine"), configuration.Host.measure())
    assert [spec.guest_path for spec in asked.mounts] == [f"{way.home}/src", f"{way.home}/elsewhere"]
    hidden = agentctl("attach", "machine", "--mount", "~")
    assert hidden.returncode == ExitCode.USAGE
    assert "it would hide your home" in said(hidden)[0]


def test_a_machine_that_is_not_reached_leaves_nothing(home: Home, way: ShellWay) -> None:
    way.refuses = UserError("machine does not answer", "try it with: ssh machine", ExitCode.GUEST)
    done = agentctl("attach", "machine")
    assert done.stderr.splitlines()[-2:] == [
        "error: machine does not answer",
        "hint: try it with: ssh machine",
    ]
    assert done.returncode == ExitCode.GUEST
    assert not home.instance("machine").directory.exists()
    assert json.loads(agentctl("list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a b"], "is not a machine's address"),
        (["me@host:port"], "is not a port"),
        (["host", "--name", "No Name"], "is not a name for an instance"),
        (["host", "--mount", "/nowhere/at/all"], "/nowhere/at/all"),
        (["host", "--mount", "/tmp:/etc"], "/etc"),
        (["host", "--forward", "nonsense"], "nonsense"),
        (["taken", "--name", "vm"], "instance vm is a VM"),
        (["me@other", "--name", "box"], "instance box is attached to me@machine"),
    ],
)
def test_mistakes_are_told_before_anything_is_connected(
    home: Home, way: ShellWay, words: list[str], message: str
) -> None:
    home.instance("vm").ensure()
    home.instance("vm").config.write_text("cpus: 1\n")
    attach_as(home, "box")
    done = agentctl("attach", *words)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert message in said(done)[0]
    assert way.commands == []
    assert not home.instance("host").directory.exists()


@asynccontextmanager
async def attached_now(paths: InstancePaths, agent: Agent) -> AsyncIterator[None]:
    lock = state.try_lock(paths.lock)
    assert lock is not None
    try:
        with trio.fail_after(60):
            async with running(paths, agent):
                yield
    finally:
        os.close(lock)


async def typed(*words: str) -> Done:
    return await trio.to_thread.run_sync(agentctl, *words)


async def test_one_that_runs_is_shown_as_what_it_is(home: Home, way: ShellWay) -> None:
    paths = attach_as(home, "box")
    lacking = replace(reached(), name="box", warnings=["folders cannot be mounted (apt-get install fuse3)"])
    async with attached_now(paths, Agent(status=lacking)):
        page, table = await typed("--instance", "box", "status"), await typed("list")
        again = await typed("attach", "box")
        diagnosis = await typed("--instance", "box", "doctor", "--json")
    assert "me@machine" in page.stdout
    assert "connected, for" in page.stdout
    assert "apt-get install fuse3" in page.stderr
    assert "qemu" not in page.stdout
    assert table.stdout.split()[:3] == ["NAME", "STATE", "MACHINE"]
    assert again.returncode == 0
    assert way.commands == [], "nothing is connected anew"
    topics = {finding["topic"] for finding in json.loads(diagnosis.stdout)["findings"]}
    assert {"machine", "ssh"} <= topics
    assert "qemu" not in topics


async def test_a_connection_that_is_lost_says_why_and_since_when(home: Home) -> None:
    paths = attach_as(home, "box")
    lost = Attachment("me@machine", LinkState.LOST, 1.0, "it does not answer", "ssh me@machine", 7)
    agent = Agent(status=replace(reached(), name="box", attached=lost, detail="gone", hint="wait"))
    async with attached_now(paths, agent):
        page = await typed("--instance", "box", "status")
        found = await typed("--instance", "box", "doctor")
    assert "lost, for" in page.stdout
    assert "7 attempts" in page.stdout
    assert "me@machine is not reached: it does not answer" in found.stdout
    assert found.returncode == ExitCode.GUEST


@pytest.mark.parametrize("keep", [False, True])
async def test_one_that_has_lost_its_machine_makes_room_and_leaves_what_is_kept(
    home: Home, way: ShellWay, started: list[InstancePaths], monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    paths = attach_as(home, "box")
    record.save(paths, Attached("me@machine", "box-0123", keep=keep))
    forced = []

    async def abandon(_: InstancePaths, force: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        forced.append(force)

    async def free(*_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    monkeypatch.setattr(starting, "abandon", abandon)
    monkeypatch.setattr(ending, "lock_is_free", free)
    lost = Attachment("me@machine", LinkState.LOST, 1.0, "it does not answer")
    async with attached_now(paths, Agent(status=replace(reached(), name="box", attached=lost))):
        done = await typed("attach", "box")
    assert done.returncode == 0, done.stderr
    assert forced == [not keep]
    assert started == [paths]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk"], "no disk of agentctl's"),
        (["ssh-config"], "a machine that ssh reaches itself"),
        (["up", "--cpus", "2"], "of the flags it has only --mount"),
        (["logs", "--component", "docker"], "there is no log of docker"),
    ],
)
def test_what_only_a_vm_has_is_refused_in_a_sentence(home: Home, words: list[str], message: str) -> None:
    attach_as(home, "box")
    done = agentctl("--instance", "box", *words)
    assert done.returncode == ExitCode.USAGE
    assert message in said(done)[0]


def test_detach_says_what_it_is_not_about(home: Home) -> None:
    assert said(agentctl("detach"))[0] == "error: no machine is attached"
    home.instance("vm").ensure()
    assert said(agentctl("detach", "vm"))[0] == "error: instance vm is a VM"
    assert said(agentctl("detach", "typo"))[0] == "error: no machine is attached as typo"
    attach_as(home, "box")
    for name in ("box", "me@machine"):
        done = agentctl("detach", name)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "not attached")
    for each in ("one", "two"):
        attach_as(home, each)
    with state.locked(home.instance("one").lock), state.locked(home.instance("two").lock):
        assert "several machines are attached: one, two" in said(agentctl("detach"))[0]


def test_at_rest_it_is_stopped_and_can_be_forgotten(home: Home) -> None:
    paths = attach_as(home, "box")
    done = agentctl("--instance", "box", "status")
    assert done.returncode == ExitCode.NOT_RUNNING
    assert "attach it: agentctl attach box" in done.stdout
    assert agentctl("--instance", "box", "config", "set", "ports.lan=true").returncode == 0
    assert agentctl("--instance", "box", "delete", "--yes").returncode == 0
    assert not paths.directory.exists()


def test_folders_are_added_and_taken_away_while_it_does_not_run(home: Home, tmp_path: Path) -> None:
    paths = attach_as(home, "box")
    mounts = ("--instance", "box", "mounts")
    assert agentctl(*mounts, "add", f"{tmp_path}:~/here", f"{tmp_path}:/srv/there:ro").returncode == 0
    asked = configuration.load(paths, configuration.Host.measure()).mounts
    assert [spec.guest_path for spec in asked] == ["/home/me/here", "/srv/there"]
    assert agentctl(*mounts, "rm", "~/here").returncode == 0
    asked = configuration.load(paths, configuration.Host.measure()).mounts
    assert [spec.guest_path for spec in asked] == ["/srv/there"]
    assert said(agentctl(*mounts, "rm", "/nowhere"))[0] == "error: /nowhere is not a mount"
