"""Any number of instances side by side, each with its own everything."""

from __future__ import annotations

import json

import pytest

from host_agent import state
from host_agent.commands import status
from host_agent.errors import ExitCode
from host_agent.paths import Home
from host_agent.state import InstanceState
from protocol.api import InstanceStatus
from tests.host_agent.command_line import agentctl, said


def test_all_are_listed_each_as_it_is(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "RESTART_TIME", 0.1)
    assert "there is no instance yet; make one: agentctl up" in agentctl("list").stdout
    assert json.loads(agentctl("list", "--json").stdout) == []
    for name in ("default", "dev", "broken", "silent"):
        home.instance(name).ensure()
    state.save(home.instance("dev").state, InstanceState(failure="the VM panicked", hint="see"))
    home.instance("broken").config.write_text("{")
    (home.root / "instances" / "Not Ours").mkdir()
    (home.root / "instances" / "file").touch()
    with state.locked(home.instance("silent").lock):
        done = agentctl("list", "--json")
        table = agentctl("list").stdout
    listed = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(listed) == ["broken", "default", "dev", "silent"]
    assert all(set(row) == set(InstanceStatus.__slots__) for row in listed.values())
    assert {name: row["stage"] for name, row in listed.items()} == {
        "broken": "failed",
        "default": "stopped",
        "dev": "failed",
        "silent": "failed",
    }
    assert listed["dev"]["detail"] == "the VM panicked"
    assert listed["dev"]["docker_context"] == "agentctl-dev"
    assert listed["default"]["docker_context"] == "agentctl"
    assert "this is not YAML" in listed["broken"]["detail"]
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        [n, r["stage"]] for n, r in listed.items()
    ]
    assert "the VM panicked" in table
    assert done.returncode == 0


@pytest.mark.parametrize("words", [["status"], ["env"]])
def test_the_environment_names_an_instance_and_an_option_another(
    home: Home, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    assert "default" in agentctl(*words).stdout
    monkeypatch.setenv("AGENTCTL_INSTANCE", "dev")
    assert "dev" in agentctl(*words).stdout
    assert "web" in agentctl("--instance", "web", *words).stdout
    monkeypatch.setenv("AGENTCTL_INSTANCE", "No Name")
    assert agentctl(*words).returncode == ExitCode.USAGE


def test_hints_name_the_instance_unless_the_environment_does(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = agentctl("--instance", "dev", "ports")
    assert said(done) == [
        "error: instance dev is not running",
        "hint: start it: agentctl --instance dev up",
    ]
    monkeypatch.setenv("AGENTCTL_INSTANCE", "dev")
    assert said(agentctl("ports"))[1] == "hint: start it: agentctl up"


def test_what_never_was_is_not_started_again(home: Home) -> None:
    done = agentctl("--instance", "typo", "restart")
    assert said(done) == ["error: there is no instance typo", "hint: make it: agentctl --instance typo up"]
    assert done.returncode == ExitCode.NOT_RUNNING
    assert not home.instance("typo").directory.exists()


def test_settings_are_an_instances_own(home: Home) -> None:
    assert agentctl("--instance", "dev", "forward", "add", "8080:80").returncode == 0
    assert "8080:80" in agentctl("--instance", "dev", "forward", "list").stdout
    assert "8080:80" not in agentctl("forward", "list").stdout


def test_start_is_another_name_of_up(home: Home) -> None:
    assert agentctl("start", "--cpus", "0").stderr == agentctl("up", "--cpus", "0").stderr
