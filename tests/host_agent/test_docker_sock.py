from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from host_agent import docker_sock
from host_agent.docker_sock import DockerSock, Place
from host_agent.errors import UserError
from host_agent.paths import InstancePaths


@pytest.fixture
def sock(instance: InstancePaths, folder: Path) -> DockerSock:
    return DockerSock(instance, folder / "docker.sock")


def test_a_free_place_is_linked_and_unlinked(sock: DockerSock) -> None:
    assert (sock.look(), sock.describe()) == (Place.FREE, f"there is no {sock.place}")
    assert sock.link()
    assert os.readlink(sock.place) == str(sock.paths.docker_socket)
    assert (sock.look(), sock.describe()) == (Place.OURS, f"{sock.place} leads to instance default")
    assert not sock.link()
    assert sock.unlink()
    assert not sock.unlink()
    assert not os.path.lexists(sock.place)


@pytest.mark.parametrize("what", ["socket", "file", "link", "dangling"])
def test_what_is_somebody_elses_is_left_alone(sock: DockerSock, what: str) -> None:
    match what:
        case "socket":
            with socket.socket(socket.AF_UNIX) as dockerd:
                dockerd.bind(str(sock.place))
        case "file":
            sock.place.write_text("")
        case "link":
            sock.place.symlink_to(sock.place.parent)
        case "dangling":
            sock.place.symlink_to("/home/other/.agentctl/instances/default/docker.sock")
    before = os.lstat(sock.place)
    assert sock.look() is Place.FOREIGN
    with pytest.raises(UserError, match="left alone") as caught:
        sock.link()
    said = {"socket": "another Docker", "file": "is no socket", "link": "leads to", "dangling": "/home/other"}
    assert said[what] in caught.value.message
    assert not sock.unlink()
    assert os.lstat(sock.place) == before


def refused(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_what_needs_root_is_said_exactly(sock: DockerSock, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(docker_sock.os, "symlink", refused)
        with pytest.raises(UserError, match="cannot be made by you: Permission denied") as caught:
            sock.link()
    assert sock.link_command() in caught.value.hint
    assert sock.boot_command() in caught.value.hint
    # What it says does what it should, for who is root or need not be.
    run(sock.link_command())
    assert sock.look() is Place.OURS
    with monkeypatch.context() as patch:
        patch.setattr(docker_sock.os, "unlink", refused)
        with pytest.raises(UserError, match="cannot be removed by you") as caught:
            sock.unlink()
    assert sock.unlink_command() in caught.value.hint


def test_the_command_overwrites_nothing(sock: DockerSock) -> None:
    sock.place.mkdir()
    with pytest.raises(subprocess.CalledProcessError):
        run(sock.link_command())
    assert list(sock.place.iterdir()) == []


def run(command: str) -> None:
    sudo, *argv = shlex.split(command)
    assert sudo == "sudo"
    subprocess.run(argv, check=True, capture_output=True)


def test_the_line_for_each_boot_is_one(sock: DockerSock) -> None:
    line = shlex.split(sock.boot_command())[1]
    assert line.split() == ["L", str(sock.place), "-", "-", "-", "-", str(sock.paths.docker_socket)]


def test_whoever_is_faster_is_seen(sock: DockerSock, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.symlink

    def faster(target: str, place: Path) -> None:
        monkeypatch.undo()
        make("/elsewhere", place)
        make(target, place)

    monkeypatch.setattr(docker_sock.os, "symlink", faster)
    with pytest.raises(UserError, match="leads to /elsewhere"):
        sock.link()
