"""Docker on the machine: its socket is here, and a context that leads to it, which nobody is made to use."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import eventually
from tests.remote.machine import PYTHON, USER
from tests.remote.programs import DOCKER
from tests.remote.site import Site, site

SOCKET = "/run/docker.sock"


@pytest.fixture(scope="module")
def made() -> Iterator[Site]:
    with site(USER) as made:
        yield made


@pytest.fixture
def place(made: Site) -> Iterator[Site]:
    yield made
    made.user.agentctl("delete", "--data", "--yes", check=False, timeout=60)
    made.machine.sh(f"rm -f {SOCKET}")


def ping(path: Path) -> bytes:
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(path))
            client.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            answer = b""
            while data := client.recv(4096):
                answer += data
    except OSError:
        return b""
    return answer


def contexts(made: Site) -> list[str]:
    """Where the contexts lead to that are there."""
    found = made.user.docker_config.glob("contexts/meta/*/meta.json")
    return [json.loads(path.read_text())["Endpoints"]["docker"]["Host"] for path in found]


def test_dockers_socket_is_here_and_the_context_is_not_current(place: Site) -> None:
    with place.machine.start([PYTHON, "-c", DOCKER, SOCKET, "666"]):
        eventually(lambda: place.machine.sh(f"test -S {SOCKET} && echo there", status=None))
        place.user.attach()
        here = place.user.directory / "docker.sock"
        assert eventually(lambda: ping(here)).endswith(b"OK")
        eventually(lambda: contexts(place) == [f"unix://{here}"])
        settings = place.user.docker_config / "config.json"
        assert not settings.exists() or "currentContext" not in json.loads(settings.read_text())
        place.line.reset()
        assert eventually(lambda: ping(here)).endswith(b"OK")
        place.user.detach()
        assert ping(here) == b""
        place.user.agentctl("delete", "--data", "--yes")
        assert contexts(place) == []


def test_a_socket_that_is_not_for_this_account_is_said_with_what_helps(place: Site) -> None:
    with place.machine.start([PYTHON, "-c", DOCKER, SOCKET, "600"]):
        eventually(lambda: place.machine.sh(f"test -S {SOCKET} && echo there", status=None))
        done = place.user.attach()
        said = (done.stdout + done.stderr).decode()
        assert "docker" in said.lower(), said
        assert "usermod" in said or "group" in said, said
        assert place.user.status()["stage"] == "running"
