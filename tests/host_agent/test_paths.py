from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from host_agent.errors import ExitCode, UserError
from host_agent.paths import MAX_SOCKET_PATH, Home, InstancePaths, private_directory


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_below_the_home_is_private(home: Home) -> None:
    paths = home.instance()
    paths.ensure()
    for directory in (
        home.root,
        home.images,
        home.cache,
        home.tools,
        paths.directory.parent,
        paths.directory,
    ):
        assert mode(directory) == 0o700
    assert all(path.parent == paths.directory for path in paths.sockets())


def test_the_home_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTCTL_HOME", "here")
    assert Home.find().root == tmp_path / "here"


@pytest.mark.parametrize("value", [None, ""])
def test_the_home_is_the_users_else(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    if value is None:
        monkeypatch.delenv("AGENTCTL_HOME", raising=False)
    else:
        monkeypatch.setenv("AGENTCTL_HOME", value)
    assert Home.find().root == Path("/home/someone/.agentctl")


def test_a_folder_that_others_could_enter_is_closed_to_them(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir(mode=0o755)
    private_directory(directory)
    assert mode(directory) == 0o700


def test_a_name_too_long_for_a_socket_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    paths = InstancePaths(tmp_path / ("x" * MAX_SOCKET_PATH))
    with pytest.raises(UserError, match="too long for sockets") as caught:
        paths.ensure()
    assert caught.value.exit_code is ExitCode.USAGE
    assert "AGENTCTL_HOME" in caught.value.hint
    assert not paths.directory.exists()


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match=r"cannot use .*: ") as caught:
        private_directory(path / "below")
    assert "AGENTCTL_HOME" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, 12345, -1)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 12345\)"):
        private_directory(directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root owns /")
def test_a_folder_of_the_system_is_refused() -> None:
    with pytest.raises(UserError, match=r"belongs to another user \(uid 0\)"):
        private_directory(Path("/usr"))
