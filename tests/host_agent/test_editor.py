from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_agent import editor
from host_agent.errors import ExitCode, UserError


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs, at first an empty one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    return tmp_path


def program(path: Path, text: str = "exit 0") -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    os.chmod(path, 0o755)


def test_the_users_own_comes_first(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no editor") as caught:
        editor.command()
    assert "EDITOR" in caught.value.hint
    assert caught.value.exit_code is ExitCode.DEPENDENCY
    program(programs / "nano")
    assert editor.command() == [str(programs / "nano")]
    for name in ("vi", "one", "two"):
        program(programs / name)
    assert editor.command() == [str(programs / "vi")]
    monkeypatch.setenv("EDITOR", "one --wait 'a b'")
    assert editor.command() == ["one", "--wait", "a b"]
    monkeypatch.setenv("VISUAL", "two")
    assert editor.command() == ["two"]
    monkeypatch.setenv("VISUAL", "three")
    with pytest.raises(UserError, match=r"\$VISUAL is three, which is not there"):
        editor.command()


def test_it_is_given_the_file_and_its_failure_is_said(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs / "good", 'echo "$1-$2" > "$2"')
    program(programs / "bad", "exit 3")
    path = tmp_path / "a b.yaml"
    monkeypatch.setenv("EDITOR", "good -w")
    editor.edit(path)
    assert path.read_text() == f"-w-{path}\n"
    monkeypatch.setenv("EDITOR", "bad")
    with pytest.raises(UserError, match="bad ended with status 3"):
        editor.edit(path)
