"""Instances that start by themselves, and the socket where every program looks for Docker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from host_agent import autostart, docker_sock
from host_agent.autostart import Autostart
from host_agent.configuration import config
from host_agent.docker_sock import DockerSock
from host_agent.errors import ExitCode
from host_agent.paths import Home
from tests.host_agent.command_line import agentctl, said


@pytest.fixture(autouse=True)
def machine(home: Home, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Places of its own; where the socket is to be."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    place = folder / "docker.sock"
    monkeypatch.setattr(docker_sock, "DockerSock", lambda paths: DockerSock(paths, place))
    return place


def kept(home: Home, name: str = "default") -> config.InstanceConfig:
    return config.load(home.instance(name), config.Host.measure())


def test_autostart_is_kept_shown_and_undone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Autostart.of(home.instance("dev"))
    assert agentctl("--instance", "dev", "autostart", "status").stdout == "off\n"
    monkeypatch.setattr(autostart, "LINGER", Path("/nonexistent"))
    done = agentctl("--instance", "dev", "autostart", "on")
    assert (done.returncode, unit.is_on(), kept(home, "dev").autostart) == (0, True, True)
    assert "starts when you log in" in done.stderr
    status = json.loads(agentctl("--instance", "dev", "autostart", "status", "--json").stdout)
    assert (status["on"], status["unit"]) == (True, str(unit.unit))
    assert "--instance dev up" in unit.unit.read_text()
    assert agentctl("--instance", "dev", "autostart", "off").returncode == 0
    assert (unit.is_on(), kept(home, "dev").autostart) == (False, False)


def test_a_unit_of_the_users_own_is_left_alone(home: Home) -> None:
    unit = Autostart.of(home.instance()).unit
    unit.parent.mkdir(parents=True)
    unit.write_text("[Unit]\n")
    done = agentctl("autostart", "on")
    assert done.returncode == ExitCode.USAGE
    assert "was not made by agentctl" in done.stderr
    assert unit.read_text() == "[Unit]\n"


def test_the_socket_is_linked_shown_and_unlinked(home: Home, machine: Path) -> None:
    assert agentctl("docker-sock", "status").stdout == f"there is no {machine}\n"
    assert agentctl("docker-sock", "on").returncode == 0
    assert os.readlink(machine) == str(home.instance().docker_socket)
    assert kept(home).docker_sock
    status = json.loads(agentctl("docker-sock", "status", "--json").stdout)
    assert (status["state"], status["path"]) == ("linked", str(machine))
    assert agentctl("docker-sock", "off").returncode == 0
    assert not os.path.lexists(machine)
    assert not kept(home).docker_sock


def test_what_the_user_may_not_do_is_said_and_the_wish_is_kept(
    home: Home, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(docker_sock.os, "symlink", refused)
    done = agentctl("docker-sock", "on")
    assert done.returncode == ExitCode.GENERAL
    assert f"sudo ln -sT {home.instance().docker_socket} {machine}" in " ".join(said(done))
    assert kept(home).docker_sock


def test_a_deleted_instance_leaves_neither(
    home: Home, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_agent.host_side.DockerSock", lambda paths: DockerSock(paths, machine))
    agentctl("autostart", "on")
    agentctl("docker-sock", "on")
    assert agentctl("delete", "--yes").returncode == 0
    assert not os.path.lexists(machine)
    assert not Autostart.of(home.instance()).is_on()
