"""What ``up`` arranges on this machine, and ``delete`` undoes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_agent import docker_sock, host_side, ssh_agent
from host_agent.autostart import Autostart
from host_agent.docker_sock import DockerSock, Place
from host_agent.paths import InstancePaths
from tests.host_agent.guest_values import PLAIN, config

ALL = config({"ssh_agent": True, "autostart": True, "docker_sock": True})


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config"), "SSH_AUTH_SOCK": "/a.sock"}


@pytest.fixture(autouse=True)
def usual(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place than this machine's own for the socket."""
    place = folder / "docker.sock"
    monkeypatch.setattr(host_side, "DockerSock", lambda paths: DockerSock(paths, place))
    return place


def test_all_is_arranged_and_undone(
    instance: InstancePaths, environment: dict[str, str], usual: Path
) -> None:
    unit, sock = Autostart.of(instance, environment), DockerSock(instance, usual)
    for _ in range(2):
        assert host_side.arrange(instance, ALL, environment) == ()
        assert (unit.is_on(), sock.look(), os.readlink(instance.ssh_agent)) == (True, Place.OURS, "/a.sock")
    assert host_side.arrange(instance, PLAIN, environment) == ()
    assert (unit.is_on(), sock.look(), os.path.lexists(instance.ssh_agent)) == (False, Place.FREE, False)
    host_side.arrange(instance, ALL, environment)
    assert host_side.undo(instance, environment) == ()
    assert (unit.is_on(), sock.look()) == (False, Place.FREE)
    assert host_side.undo(instance, environment) == ()


def test_what_is_somebody_elses_is_a_warning(
    instance: InstancePaths, environment: dict[str, str], usual: Path
) -> None:
    usual.write_text("")
    unit = Autostart.of(instance, environment).unit
    unit.parent.mkdir(parents=True)
    unit.write_text("[Unit]\n")
    of_unit, of_sock = host_side.arrange(instance, ALL, environment)
    assert "was not made by agentctl" in of_unit
    assert "left alone (remove it yourself" in of_sock
    (left,) = host_side.undo(instance, environment)
    assert left == of_unit
    assert (usual.read_text(), unit.read_text()) == ("", "[Unit]\n")


def test_a_login_without_an_agent_is_told(
    instance: InstancePaths, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config({"ssh_agent": True})
    del environment["SSH_AUTH_SOCK"]
    (warning,) = host_side.arrange(instance, wanted, environment)
    assert "SSH_AUTH_SOCK is not set" in warning

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ssh_agent, "follow", full)
    (warning,) = host_side.arrange(instance, wanted, environment)
    assert warning == "your SSH agent does not come into the VM: No space left on device"


def test_the_usual_place_is_where_every_program_looks() -> None:
    assert Path("/var/run/docker.sock") == docker_sock.USUAL
