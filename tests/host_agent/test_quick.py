"""`status` is asked by prompts and scripts: what it imports decides how long it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import trio

from host_agent import state
from host_agent.cli import PLACES, cli
from host_agent.paths import Home, InstancePaths
from tests.host_agent.stand_in import Agent, running

#: What else it needs takes 0.1 s; trio and the link 0.1 s more, what starts an instance as much again.
ALLOWED = {"click", "rich", "msgpack"}

#: Only to tell of one that does not run: its configuration is read.
AT_REST = {"psutil", "yaml", "ruamel"}

SLOW = {
    "host_agent.client",
    "host_agent.up",
    "host_agent.daemon",
    "host_agent.commands.lifecycle",
    "protocol.link",
}


def imported(*words: str) -> set[str]:
    """The modules that a command imports, but for those that this Python imports whatever it is to do."""
    return _imports("-m", "host_agent", *words) - _imports("-c", "")


def _imports(*words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 10
    return {line.rpartition("|")[2].strip() for line in lines[1:]}  # the first is a heading


def foreign(modules: set[str]) -> set[str]:
    """The packages that are neither ours nor Python's."""
    roots = {module.partition(".")[0] for module in modules}
    ours = {"host_agent", "protocol", "provision"}
    python = {"org"}  # what `copy` looks for, in Jython
    return {root for root in roots - ours - python - sys.stdlib_module_names if not root.startswith("_")}


@pytest.mark.parametrize("words", [["status"], ["status", "--json"]])
async def test_the_status_of_an_instance_that_runs_imports_nothing_slow(
    instance: InstancePaths, words: list[str]
) -> None:
    lock = state.try_lock(instance.lock)
    assert lock is not None
    with trio.fail_after(60):
        async with running(instance, Agent()):
            modules = await trio.to_thread.run_sync(lambda: imported(*words))
    os.close(lock)
    assert "host_agent.asking" in modules
    assert foreign(modules) <= (ALLOWED - {"rich"} if "--json" in words else ALLOWED)
    assert not modules & {*SLOW, "host_agent.configuration.config", "host_agent.rules"}


def test_the_status_of_one_that_does_not_run_imports_little_more(home: Home) -> None:
    modules = imported("status")
    assert "host_agent.at_rest" in modules
    assert foreign(modules) <= ALLOWED | AT_REST
    assert not modules & SLOW


def test_every_command_is_where_it_is_said_to_be() -> None:
    context = click.Context(cli)
    for name in PLACES:
        command = cli.get_command(context, name)
        assert command is not None, name
        assert command.name == name
    assert cli.list_commands(context) == sorted(PLACES)
    assert cli.get_command(context, "fly") is None
