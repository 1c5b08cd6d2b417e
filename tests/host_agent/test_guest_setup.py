"""What a session's guest is told to run, with a link that a test scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from host_agent import ssh_agent
from host_agent.guest_settings import GuestSettings
from host_agent.guest_setup import ATTEMPTS, LATER, GuestSetup
from host_agent.host_network import HostNetwork
from host_agent.network_settings import NetworkSettings
from protocol.api import (
    ArchitecturesUsed,
    DockerSettingsUsed,
    Effect,
    HostNetworkUsed,
    SocketForward,
    UseArchitectures,
    UseDockerSettings,
)
from protocol.errors import ErrorCode, LinkError, RpcError
from protocol.link import Link
from tests.host_agent.guest_values import from_json

SETTINGS: dict[str, Any] = {"docker": {"debug": True}, "environment": {"A": "1"}}


class Guest:
    """Answers as it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.docker: DockerSettingsUsed | Exception = DockerSettingsUsed()
        self.settings: list[str] = []
        self.variables: list[dict[str, str]] = []
        self.foreign: ArchitecturesUsed | Exception = ArchitecturesUsed()
        self.architectures: list[list[str]] = []

    async def request(self, message: Any, *, timeout: float) -> object:
        await trio.lowlevel.checkpoint()
        if isinstance(message, UseArchitectures):
            self.architectures.append(message.names)
            if isinstance(self.foreign, Exception):
                raise self.foreign
            return self.foreign
        if not isinstance(message, UseDockerSettings):
            self.variables.append(message.environment)
            return HostNetworkUsed()
        self.settings.append(message.settings)
        if isinstance(self.docker, Exception):
            raise self.docker
        return self.docker


class Setup:
    """The setup under test, with what it told the user."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.said: list[tuple[str, str]] = []
        self.sockets: list[Sequence[SocketForward]] = []
        self.guest = Guest()
        self.network = HostNetwork(NetworkSettings(certificates=()), "vm", self._say, {})
        self.link = folder / "ssh-agent.sock"
        self.setup = GuestSetup(from_json(values), self.link, self.network, self._say)

    def _say(self, kind: str, message: str) -> None:
        self.said.append((kind, message))

    async def _use(self, sockets: Sequence[SocketForward]) -> None:
        await trio.lowlevel.checkpoint()
        self.sockets.append(sockets)

    async def begins(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.setup.run)
        self.setup.link_up(cast(Link, self.guest))
        await trio.testing.wait_all_tasks_blocked()

    async def change(self, values: dict[str, Any], *, there: bool = True) -> list[str]:
        return await self.setup.change(
            from_json(values), cast(Link, self.guest) if there else None, self._use
        )

    async def uses_architectures(self) -> None:
        async def session() -> Link:
            await trio.lowlevel.checkpoint()
            return cast(Link, self.guest)

        await self.setup.use_architectures(session)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, SETTINGS)


async def test_each_sessions_guest_is_told(nursery: trio.Nursery, setup: Setup) -> None:
    await setup.begins(nursery)
    setup.setup.link_up(cast(Link, setup.guest))
    await trio.testing.wait_all_tasks_blocked()
    assert setup.guest.settings == ['{"debug": true}'] * 2
    assert (setup.said, setup.setup.problems) == ([], [])
    assert setup.network.own == {"A": "1"}


async def test_without_settings_the_guest_is_told_so_since_docker_waits_for_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    setup = Setup(tmp_path, {})
    await setup.begins(nursery)
    assert setup.guest.settings == ["{}"]
    assert (setup.network.own, setup.setup.sockets) == ({}, [])


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (DockerSettingsUsed(problem="Docker says no", details="a\n  b\n"), "Docker says no: a; b"),
        (DockerSettingsUsed(problem="Docker says no"), "Docker says no"),
        (RpcError(ErrorCode.INTERNAL, "no space"), "Docker's settings are not used: no space"),
    ],
)
async def test_what_docker_does_not_take_is_said_and_kept(
    nursery: trio.Nursery, setup: Setup, answer: DockerSettingsUsed | Exception, problem: str
) -> None:
    setup.guest.docker = answer
    await setup.begins(nursery)
    assert setup.said == [("docker-settings", problem)]
    assert setup.setup.problems == [problem]
    setup.guest.docker = DockerSettingsUsed()
    await setup.change({})
    assert setup.setup.problems == []


@pytest.mark.parametrize("error", [LinkError("gone"), ValueError("a bug")])
async def test_a_session_that_ends_and_a_bug_leave_the_rest_alone(
    nursery: trio.Nursery, setup: Setup, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    setup.guest.docker = error
    await setup.begins(nursery)
    assert setup.said == []
    assert ("not told" in caplog.text) == isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("effect", "note"),
    [(Effect.NONE, None), (Effect.RELOADED, "containers run on"), (Effect.RESTARTED, "was restarted")],
)
async def test_a_change_of_dockers(setup: Setup, effect: Effect, note: str | None) -> None:
    setup.guest.docker = DockerSettingsUsed(effect)
    notes = await setup.change({**SETTINGS, "docker": {"debug": False}})
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
    assert setup.guest.variables == []


async def test_a_change_of_variables(setup: Setup) -> None:
    notes = await setup.change({**SETTINGS, "environment": {"B": "2"}})
    assert setup.guest.variables == [{"B": "2"}]
    assert setup.guest.settings == []
    assert "new shells" in notes[0]


async def test_an_agent_comes_and_goes(setup: Setup) -> None:
    await setup.change({**SETTINGS, "ssh_agent": True})
    await setup.change(SETTINGS)
    assert setup.sockets == [[ssh_agent.forward(setup.link)], []]
    own = {"A": "1", "SSH_AUTH_SOCK": ssh_agent.GUEST_SOCKET}
    assert setup.guest.variables == [own, {"A": "1"}]
    await setup.change({"ssh_agent": True, "environment": {"SSH_AUTH_SOCK": "/mine"}})
    assert setup.network.own == {"SSH_AUTH_SOCK": "/mine"}


async def test_scripts_wait_for_the_next_start(setup: Setup) -> None:
    (note,) = await setup.change({**SETTINGS, "provision": ["true"]})
    assert "next start" in note
    assert await setup.change({**SETTINGS, "provision": ["true"]}) == []


@pytest.mark.parametrize("error", [None, LinkError("gone")])
async def test_a_guest_that_is_not_there_is_told_when_it_is(
    nursery: trio.Nursery, setup: Setup, error: Exception | None
) -> None:
    if error is not None:
        setup.guest.docker = error
    assert await setup.change({}, there=error is not None) == [LATER]
    setup.guest.docker = DockerSettingsUsed()
    await setup.begins(nursery)
    assert setup.guest.settings[-1] == "{}"
    assert from_json({}) == GuestSettings()


async def test_without_foreign_programs_nobody_asks_for_them(setup: Setup) -> None:
    await setup.uses_architectures()
    assert (setup.guest.architectures, setup.said) == ([], [])


@pytest.mark.parametrize(
    ("answer", "asked", "problem"),
    [
        (ArchitecturesUsed(), 1, None),
        (ArchitecturesUsed(["no network"]), 1, "no network"),
        (RpcError(ErrorCode.TIMEOUT, "too slow"), 1, "other architectures: too slow"),
        (LinkError("gone"), ATTEMPTS, "cut off"),
    ],
)
async def test_foreign_programs_are_asked_for_and_what_cannot_be_is_kept(
    tmp_path: Path, answer: ArchitecturesUsed | Exception, asked: int, problem: str | None
) -> None:
    setup = Setup(tmp_path, {"architectures": ["arm64", "riscv64"]})
    setup.guest.foreign = answer
    await setup.uses_architectures()
    assert setup.guest.architectures == [["arm64", "riscv64"]] * asked
    assert len(setup.setup.problems) == (problem is not None)
    assert problem is None or problem in setup.setup.problems[0]
    setup.guest.foreign = ArchitecturesUsed()
    assert await setup.change({"architectures": ["arm64"]}) == []
    assert setup.guest.architectures[-1] == ["arm64"]
    assert setup.setup.problems == []
