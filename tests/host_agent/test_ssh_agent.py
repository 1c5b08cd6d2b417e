from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from host_agent import ssh_agent
from host_agent.ssh_agent import NOWHERE, follow, follow_if_wanted, forget, forward
from protocol.api import SocketForward


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "ssh-agent.sock"


def agent(tmp_path: Path, name: str) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / name))
    return str(tmp_path / name)


def test_the_newest_login_is_followed(link: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert follow(link, {"SSH_AUTH_SOCK": agent(tmp_path, name)}) == ""
        assert os.readlink(link) == str(tmp_path / name)
    assert follow(link, {"SSH_AUTH_SOCK": str(tmp_path / "b")}) == ""
    assert follow(link, {}) == ""  # a login without one
    assert os.readlink(link) == str(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", link.name]


@pytest.mark.parametrize("environment", [{}, {"SSH_AUTH_SOCK": ""}, {"SSH_AUTH_SOCK": "relative"}])
def test_none_is_said_and_found_later(link: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    assert "SSH_AUTH_SOCK is not set" in follow(link, environment)
    assert os.readlink(link) == NOWHERE
    follow_if_wanted(link, {"SSH_AUTH_SOCK": agent(tmp_path, "a")})
    assert link.exists()


def test_one_that_has_gone_is_found_when_it_is_back(link: Path) -> None:
    for _ in range(2):
        assert follow(link, {"SSH_AUTH_SOCK": "/gone.sock"}) == ""
        assert os.readlink(link) == "/gone.sock"


def test_a_link_never_leads_to_itself(link: Path) -> None:
    assert "not set" in follow(link, {"SSH_AUTH_SOCK": str(link)})
    assert os.readlink(link) == NOWHERE


def test_it_is_not_made_where_nobody_wants_it(link: Path, tmp_path: Path) -> None:
    follow_if_wanted(link, {"SSH_AUTH_SOCK": agent(tmp_path, "a")})
    assert not os.path.lexists(link)
    follow(link, {})
    for _ in range(2):
        forget(link)
    assert not os.path.lexists(link)


def test_a_folder_that_cannot_be_written_is_no_matter_of_a_shells(
    link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(link, {})

    def full(link: Path, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ssh_agent, "_point", full)
    follow_if_wanted(link, {"SSH_AUTH_SOCK": "/a"})


def test_where_it_is_in_the_vm(link: Path) -> None:
    assert forward(link) == SocketForward("/run/host-services/ssh-auth.sock", str(link), reverse=True)
