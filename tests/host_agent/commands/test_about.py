"""Which program this is, and what a shell knows of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from host_agent.cli import PLACES
from host_agent.errors import ExitCode
from host_agent.paths import Home
from protocol import build
from provision import recipe
from tests.host_agent.command_line import REPOSITORY, agentctl
from tests.host_agent.test_json_documents import examples, shape

BASH = shutil.which("bash")


def test_the_version_is_told_also_where_nothing_is_installed(home: Home) -> None:
    told = json.loads(agentctl("version", "--json").stdout)
    assert shape(told) == shape(examples("version")[0])
    assert (told["build"], told["image"]) == (build.digest(), recipe.load().digest)
    assert told["home"] == str(home.root)
    shown = dict(line.split(maxsplit=1) for line in agentctl("version").stdout.splitlines())
    assert {name: value.strip() for name, value in shown.items()} == told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(home: Home, shell: str) -> None:
    done = agentctl("completion", shell)
    assert done.returncode == 0
    assert f"_AGENTCTL_COMPLETE={shell}_complete" in done.stdout
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=done.stdout, text=True, check=True, timeout=20)


def test_another_shell_is_refused(home: Home) -> None:
    done = agentctl("completion", "tcsh")
    assert done.returncode == ExitCode.USAGE
    assert "'tcsh' is not one of" in done.stderr


#: What was typed, and what is offered then.
COMPLETIONS = {
    "li": "list",
    "--instance dev": "dev dev-2",
    "--instance dev st": "start status stop",
    "logs --component cons": "console",
    "cp gu": "guest:",
    "ssh-": "ssh-config",
}


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_bash_completes(home: Home, tmp_path: Path) -> None:
    for name in ("default", "dev", "dev-2"):
        home.instance(name).ensure()
    program = tmp_path / "agentctl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m host_agent "$@"\n')
    program.chmod(0o755)
    script = """
        compopt() { :; }
        source <(agentctl completion bash)
        for typed; do
            COMP_WORDS=(agentctl $typed) COMPREPLY=()
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _agentctl_completion agentctl
            echo "${COMPREPLY[*]}"
        done
    """
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert BASH is not None
    command = [BASH, "--norc", "-c", script, "bash", *COMPLETIONS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert dict(zip(COMPLETIONS, done.stdout.splitlines(), strict=True)) == COMPLETIONS
    assert done.stderr == ""


def test_all_commands_are_shown_but_those_for_programs(home: Home) -> None:
    shown = agentctl("--help").stdout
    assert "ssh-config" in shown
    assert "ssh-proxy" not in shown
    assert {"completion", "version", "list", "restart", "cp", "image", "prune"} <= set(PLACES)
