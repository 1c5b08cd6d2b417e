"""The words of ``agentctl cp``; what it copies is tested in test_copying."""

from __future__ import annotations

import pytest

from host_agent.errors import ExitCode
from host_agent.paths import Home
from tests.host_agent.command_line import agentctl, said


@pytest.mark.parametrize(
    "words",
    [
        ["a", "b"],
        ["guest:a", "guest:b"],
        ["a", "guest:b", "guest:c"],
        ["guest:a", "b", "c"],
        ["-r", "a", "/b"],
    ],
)
def test_one_side_is_the_vm_and_the_other_is_not(home: Home, words: list[str]) -> None:
    done = agentctl("cp", *words)
    assert said(done)[0] == "error: all of SRC are to be on one side, and DST on the other"
    assert "guest:/etc/hosts" in said(done)[1]
    assert done.returncode == ExitCode.USAGE


@pytest.mark.parametrize("words", [["a", "guest:"], ["-r", "guest:a", "guest:b", "."]])
def test_it_needs_a_vm_that_runs(home: Home, words: list[str]) -> None:
    done = agentctl("cp", *words)
    assert said(done)[0] == "error: instance default is not running"
    assert done.returncode == ExitCode.NOT_RUNNING


def test_a_destination_is_needed(home: Home) -> None:
    done = agentctl("cp", "guest:a")
    assert done.returncode == ExitCode.USAGE
    assert "Missing argument" in done.stderr


def test_an_instance_is_named_by_its_paths(home: Home) -> None:
    home.instance("dev").ensure()
    done = agentctl("cp", "dev:/etc/hosts", ".")
    assert said(done) == ["error: instance dev is not running", "hint: start it: agentctl --instance dev up"]
    assert done.returncode == ExitCode.NOT_RUNNING
    done = agentctl("--instance", "box", "cp", "dev:/etc/hosts", ".")
    assert said(done)[0] == "error: dev: is one instance, and --instance says box"
    assert done.returncode == ExitCode.USAGE


def test_a_name_that_no_instance_has_is_told(home: Home) -> None:
    home.instance("dev").ensure()
    done = agentctl("cp", "dve:/etc/hosts", ".")
    assert said(done) == ["error: there is no instance dve, and no file dve:/etc/hosts", "hint: there is dev"]
