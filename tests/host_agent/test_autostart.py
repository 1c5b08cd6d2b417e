from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from host_agent import autostart
from host_agent.autostart import MARK, Autostart, command_line, lingers, quoted, unit_text
from host_agent.errors import UserError
from host_agent.paths import Home, InstancePaths

ENVIRONMENT = {"AGENTCTL_HOME": "/srv/my VMs", "PATH": "/usr/bin:/bin", "LS_COLORS": "no"}


@pytest.fixture
def unit(instance: InstancePaths, tmp_path: Path) -> Autostart:
    return Autostart(instance, tmp_path / "config")


def test_on_and_off_leave_nothing(unit: Autostart) -> None:
    assert not unit.is_on()
    assert unit.turn_on(ENVIRONMENT)
    assert unit.is_on()
    assert os.path.samefile(unit.wanted, unit.unit)
    assert not unit.turn_on(ENVIRONMENT)
    assert unit.turn_off(ENVIRONMENT)
    assert not unit.is_on()
    assert not unit.turn_off(ENVIRONMENT)
    assert [path for path in unit.configuration.rglob("*") if not path.is_dir()] == []


def test_another_environment_is_another_unit(unit: Autostart) -> None:
    unit.turn_on(ENVIRONMENT)
    assert unit.turn_on({"PATH": "/bin"})
    assert "my VMs" not in unit.unit.read_text()


def test_one_that_was_disabled_by_hand_is_off_and_can_be_on_again(unit: Autostart) -> None:
    unit.turn_on(ENVIRONMENT)
    unit.wanted.unlink()
    assert not unit.is_on()
    assert unit.turn_on(ENVIRONMENT)
    assert unit.is_on()


def test_somebody_elses_unit_is_left_alone(unit: Autostart) -> None:
    unit.unit.parent.mkdir(parents=True)
    unit.unit.write_text("[Service]\nExecStart=/bin/true\n")
    for change in (unit.turn_on, unit.turn_off):
        with pytest.raises(UserError, match="was not made by agentctl"):
            change(ENVIRONMENT)
    assert unit.unit.read_text().startswith("[Service]")
    assert not unit.is_on()


def test_a_folder_that_cannot_be_written_is_said(unit: Autostart) -> None:
    unit.configuration.write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        unit.turn_on(ENVIRONMENT)


def test_without_systemd_it_is_refused(unit: Autostart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autostart.sys, "platform", "darwin")
    with pytest.raises(UserError, match="does not have"):
        unit.turn_on(ENVIRONMENT)


def test_the_unit_says_who_made_it_and_starts_its_instance() -> None:
    text = unit_text("dev", ENVIRONMENT, "/opt/v 1/bin/python")
    assert text.startswith(f"{MARK}\n[Unit]\n")
    assert 'ExecStart="/opt/v 1/bin/python" -m host_agent --instance dev up\n' in text
    assert 'ExecStop="/opt/v 1/bin/python" -m host_agent --instance dev stop\n' in text
    assert 'Environment="AGENTCTL_HOME=/srv/my VMs"\nEnvironment=PATH=/usr/bin:/bin\n' in text
    assert "LS_COLORS" not in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_understands_it(unit: Autostart, tmp_path: Path) -> None:
    odd = {**ENVIRONMENT, "DOCKER_CONFIG": '/a "b" 100% $HOME \\c'}
    unit.turn_on(odd)
    done = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "verify", str(unit.unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert unit.unit.name not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("word", "in_unit"),
    [("/usr/bin/python3", "/usr/bin/python3"), ("a b", '"a b"'), ('"\\', '"\\"\\\\"'), ("100%", "100%%")],
)
def test_words_are_quoted(word: str, in_unit: str) -> None:
    assert quoted(word) == in_unit


def test_no_variable_is_expanded() -> None:
    assert command_line(["/$HOME/x", "up"]) == "/$$HOME/x up"


def test_where_it_is(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = Home.usual().instance()
    name = "systemd/user/agentctl-default.service"
    for configured in ("", "relative"):
        assert Autostart.of(usual, {"XDG_CONFIG_HOME": configured}).unit == tmp_path / ".config" / name
    assert Autostart.of(usual, {"XDG_CONFIG_HOME": "/c"}).unit == Path("/c") / name
    other = Autostart.of(instance, {"XDG_CONFIG_HOME": "/c"}).unit
    assert re.fullmatch(r"agentctl-default-[0-9a-f]{8}\.service", other.name)


def test_a_manager_that_runs_is_told(
    unit: Autostart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$*" >>"$(dirname "$0")/told"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    unit.turn_on(runtime)
    assert not (program.parent / "told").exists()
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd" / "private").write_text("")
    unit.turn_off(runtime)
    unit.turn_on(runtime)
    assert (program.parent / "told").read_text() == "--user daemon-reload\n" * 2
    program.unlink()
    monkeypatch.setenv("PATH", str(program.parent))
    assert unit.turn_off(runtime)


def test_whose_systemd_starts_with_the_machine(tmp_path: Path) -> None:
    assert not lingers("jo", tmp_path)
    (tmp_path / "jo").write_text("")
    assert lingers("jo", tmp_path)
