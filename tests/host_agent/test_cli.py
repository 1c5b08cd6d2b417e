"""The command line as a user meets it: an answer, or a sentence with a hint, and an exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from host_agent import cli as module
from host_agent import config, state
from host_agent.cli import cli
from host_agent.config import GIB, Host
from host_agent.errors import ExitCode
from host_agent.paths import Home, InstancePaths
from host_agent.state import InstanceState
from protocol.api import InstanceStatus

REPOSITORY = Path(__file__).parents[2]
COMMANDS = sorted(cli.commands)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def agentctl(*words: str) -> Done:
    """Run the command line; it never lets an exception out, whatever happens."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "argv", ["agentctl", *words])
        for name, stream in (("stdin", nothing), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            module.main()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Done(int(ended.value.code or 0), *texts)


def process(*words: str, **options: object) -> Done:
    """The same in a process of its own; it never shows a traceback."""
    settings: dict[str, object] = {"stdin": subprocess.DEVNULL, "capture_output": True, **options}
    done = subprocess.run(
        [sys.executable, "-m", "host_agent", *words],
        cwd=REPOSITORY,
        text=True,
        timeout=30,
        check=False,
        **settings,  # type: ignore[call-overload]
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout or "", done.stderr)


def said(done: Done) -> list[str]:
    """The sentence and the hint."""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: "), lines
    assert len(lines) <= 2, lines
    assert all(line.startswith("hint: ") for line in lines[1:]), lines
    return lines


def test_all_commands_are_there() -> None:
    wanted = {"up", "status", "ports", "mounts", "exec", "shell", "logs", "env", "stop", "delete"}
    assert wanted <= set(COMMANDS)


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(
    command: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main([*command, option], prog_name="agentctl", standalone_mode=False)
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: agentctl")
    assert len(shown.splitlines()) >= 5


def test_without_a_command_the_commands_are_shown(home: Home) -> None:
    done = process()
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert all(command in done.stdout for command in COMMANDS)


def test_the_version_is_told_where_it_is_installed(home: Home) -> None:
    try:
        version = metadata.version("agentctl")
    except metadata.PackageNotFoundError:
        pytest.skip("agentctl is not installed here")
    assert agentctl("--version").stdout == f"agentctl, version {version}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["up", "--memory", "lots"], "'lots' is not a size; write it like 4GiB or 512MiB"),
        (["up", "--disk", "-4"], "'-4' is not a size"),
        (["up", "--memory", "9" * 400], "is more than any machine has"),
        (["up", "--cpus", "two"], "'two' is not a valid integer"),
        (["up", "--accel", "warp"], "'warp' is not one of"),
        (["fly"], "No such command 'fly'"),
        (["ports", "--bogus"], "No such option"),
        (["exec"], "Missing argument"),
        (["exec", "-e", "NOVALUE", "ls"], "'NOVALUE' is not NAME=VALUE"),
        (["exec", "-e", "=x", "ls"], "'=x' is not NAME=VALUE"),
        (["exec", "--tty", "ls"], "--tty was asked for, and stdin is not a terminal"),
        (["logs", "-n", "-5"], "-5 is not in the range"),
        (["delete"], "this would remove the instance (its data disk stays)"),
        (["up", "--mount", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["up", "--mount", "/tmp:elsewhere"], "'elsewhere' is neither a place in the VM"),
        (["up", "--mount", "/tmp:/etc"], "/etc cannot be a mount: /etc is the VM's own"),
    ],
)
def test_wrong_words_are_refused(instance: InstancePaths, words: list[str], sentence: str) -> None:
    done = agentctl(*words)
    assert sentence in said(done)[0]
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        (["--cpus", "0"], "a VM needs at least 1 cpu; asked for 0", "--cpus 1 to"),
        (["--cpus", "100000"], f"this machine has {os.cpu_count()} cpus; asked for 100000", "--cpus 1 to"),
        (["--memory", "4000t"], "and needs some itself; asked for 4000 TiB", "--memory 512MiB to"),
        (["--memory", "1m"], "a VM needs at least 512 MiB of memory; asked for 1 MiB", "--memory 512MiB to"),
        (["--disk", "1"], "the disk needs at least 2 GiB; asked for 1 GiB", "--disk 2GiB or more"),
    ],
)
def test_what_the_host_cannot_give_is_refused_before_anything_starts(
    home: Home, words: list[str], sentence: str, hint: str
) -> None:
    done = agentctl("up", *words)
    lines = said(done)
    assert sentence in lines[0]
    assert lines[1].startswith(f"hint: {hint}")
    assert done.returncode == ExitCode.RESOURCES
    assert not home.instance().config.exists()
    assert not state.is_locked(home.instance().lock)


def test_a_damaged_configuration_is_named(instance: InstancePaths) -> None:
    instance.config.write_text('{"cpus": ')
    for command in ("up", "status"):
        done = agentctl(command)
        assert f"{instance.config} is damaged" in said(done)[0]
        assert done.returncode == ExitCode.USAGE


def test_a_smaller_disk_is_refused(instance: InstancePaths) -> None:
    with instance.data_disk.open("wb") as disk:
        disk.truncate(5 * GIB)
    done = agentctl("up", "--disk", "4", "--memory", "512m")
    assert said(done)[0] == "error: the disk has 5 GiB and never shrinks; asked for 4 GiB"
    assert done.returncode == ExitCode.RESOURCES
    assert instance.data_disk.stat().st_size == 5 * GIB


@pytest.mark.parametrize("started_before", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        ["ports"],
        ["ports", "--json"],
        ["mounts"],
        ["mounts", "--json"],
        ["exec", "ls"],
        ["shell"],
        ["logs", "--component", "docker"],
    ],
)
def test_what_needs_a_running_instance_says_so(home: Home, words: list[str], started_before: bool) -> None:
    if started_before:
        home.instance().ensure()
        home.instance().lock.touch()  # of a process that a power cut ended
        home.instance().agent_socket.touch()
    done = (process if started_before and words == ["ports"] else agentctl)(*words)
    assert said(done) == ["error: instance default is not running", "hint: start it: agentctl up"]
    assert done.returncode == ExitCode.NOT_RUNNING
    assert done.stdout == ""


def test_logs_before_the_first_start(home: Home) -> None:
    done = agentctl("logs")
    assert said(done)[0] == "error: there is no agent.log yet"
    assert done.returncode == ExitCode.NOT_RUNNING


def test_logs_are_shown_without_a_running_instance(instance: InstancePaths) -> None:
    instance.console_log.write_text("one\ntwo\n")
    done = agentctl("logs", "--component", "console", "-n", "1")
    assert (done.stdout, done.returncode) == ("two\n", 0)


def test_stopping_what_does_not_run_is_no_error(home: Home) -> None:
    done = agentctl("stop")
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (0, "", "not running")
    assert not home.instance().state.exists()


def test_the_status_of_a_stopped_instance_is_json_that_scripts_can_rely_on(instance: InstancePaths) -> None:
    chosen = config.load(instance.config, Host.measure())
    config.save(instance.config, chosen)
    done = agentctl("status", "--json")
    assert done.returncode == ExitCode.NOT_RUNNING
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert list(told) == list(InstanceStatus.__slots__)
    digest = told.pop("host_digest")
    assert len(digest) == 16
    assert told == {
        "name": "default",
        "stage": "stopped",
        "detail": "start it: agentctl up",
        "hint": "",
        "accelerator": "auto",
        "cpus": chosen.cpus,
        "memory": chosen.memory,
        "disk": chosen.disk,
        "image": "",
        "qemu_pid": 0,
        "agent_pid": 0,
        "started_at": 0.0,
        "restarts": 0,
        "guest_connected": False,
        "guest_digest": "",
        "docker_socket": str(instance.docker_socket),
        "docker_context": "agentctl",
        "guest": None,
        "agent_sessions": 0,
        "agent_restarts": 0,
        "accelerator_reason": "",
        "mounts": 0,
        "mounts_working": 0,
        "file_server_pid": 0,
        "file_server_restarts": 0,
        "bulk_memory": 0,
        "bulk_reason": "",
    }
    assert agentctl("status", "--json").stdout == done.stdout


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (InstanceState(), "default  stopped  start it: agentctl up"),
        (
            InstanceState(failure="the VM [bold]panicked\x1b[2J", hint="see"),
            r"default  failed  the VM [bold]panicked\x1b[2J",
        ),
        (InstanceState(wanted=True), "default  failed  the host agent was killed"),
    ],
)
def test_how_the_last_run_ended(instance: InstancePaths, left: InstanceState, words: str) -> None:
    state.save(instance.state, left)
    done = agentctl("status")
    assert done.stdout.splitlines()[0] == words
    assert done.returncode == ExitCode.NOT_RUNNING


def test_env_is_for_a_shell(home: Home) -> None:
    done = agentctl("env")
    assert done.returncode == 0
    assert f"export DOCKER_HOST=unix://{home.instance().docker_socket}\n" in done.stdout
    assert json.loads(agentctl("env", "--json").stdout)["DOCKER_HOST"].endswith("/docker.sock")


# --- delete ----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(instance: InstancePaths) -> InstancePaths:
    state.save(instance.state, InstanceState())
    instance.data_disk.write_bytes(b"precious")
    return instance


def test_delete_keeps_the_data_disk(stopped: InstancePaths) -> None:
    done = agentctl("delete", "--yes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "removed\n")
    assert list(stopped.directory.iterdir()) == [stopped.data_disk]
    assert stopped.data_disk.read_bytes() == b"precious"


def test_delete_takes_the_data_disk_when_it_is_told_to(stopped: InstancePaths) -> None:
    assert agentctl("delete", "--data", "-y").returncode == 0
    assert not stopped.directory.exists()
    done = agentctl("delete", "--yes")
    assert (done.returncode, done.stderr) == (0, "there is no such instance\n")


def test_delete_does_not_guess_when_nobody_can_be_asked(stopped: InstancePaths) -> None:
    done = agentctl("delete", "--data")
    assert said(done)[1] == "hint: say so with --yes"
    assert stopped.data_disk.exists()


def test_delete_while_another_command_is_at_work(stopped: InstancePaths) -> None:
    with state.locked(stopped.up_lock):
        done = agentctl("delete", "--data", "--yes")
    assert done.returncode == ExitCode.BUSY
    assert said(done) == [
        "error: instance default is just being started by another command",
        "hint: interrupt that one, or wait for it",
    ]
    assert stopped.data_disk.read_bytes() == b"precious"


# --- odd surroundings ------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_standard_stream_is_an_empty_one(home: Home, closed: int) -> None:
    command = f"exec {sys.executable} -m host_agent exec ls {closed}>&-"
    ran = subprocess.run(
        ["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    done = Done(ran.returncode, ran.stdout, ran.stderr)
    assert "Traceback" not in done.stderr
    assert done.returncode == ExitCode.NOT_RUNNING
    assert done.stdout == ""
    if closed != 2:
        assert said(done)[0] == "error: instance default is not running"


def test_a_reader_that_went_away_is_no_error_worth_words(home: Home) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = process("status", "--json", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == ""


def test_a_home_that_cannot_be_is_a_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTCTL_HOME", "/proc/nothing")
    done = agentctl("up")
    assert said(done)[0].startswith("error: cannot use /proc/nothing: ")
    assert said(done)[1] == "hint: set AGENTCTL_HOME to a folder that you can write to"


def test_a_home_with_a_name_too_long_is_a_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTCTL_HOME", str(home.root / ("x" * 90)))
    done = agentctl("up")
    assert "too long for sockets" in said(done)[0]
    assert done.returncode == ExitCode.USAGE


def test_a_bug_is_a_sentence_too_and_a_traceback_on_request(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by [zero]")

    monkeypatch.setattr(module, "_instance", broken)
    monkeypatch.setattr(sys, "argv", ["agentctl", "status"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == ExitCode.GENERAL
    assert capsys.readouterr().err == (
        "error: unexpected ZeroDivisionError: by [zero]\n"
        "hint: set AGENTCTL_DEBUG=1 to see where, and report it\n"
    )
    monkeypatch.setenv("AGENTCTL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        module.main()
