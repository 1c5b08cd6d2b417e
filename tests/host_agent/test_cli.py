"""The command line as a user meets it: an answer, or a sentence with a hint, and an exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any

import click
import pytest

from host_agent import cli as module
from host_agent import state
from host_agent.cli import PLACES, cli
from host_agent.configuration import config
from host_agent.configuration.config import GIB, Host
from host_agent.errors import ExitCode
from host_agent.paths import Home, InstancePaths
from host_agent.state import InstanceState
from protocol.api import InstanceStatus
from tests.host_agent.command_line import REPOSITORY, Done, agentctl, process, said


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


COMMANDS = sorted(name for name in PLACES if not command(name).hidden)


def test_all_commands_are_there() -> None:
    wanted = {"up", "status", "ports", "mounts", "exec", "shell", "logs", "env", "stop", "delete"}
    wanted |= {"forward", "open", "tunnel", "doctor", "watch", "top"}
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


def test_without_a_command_of_its_own_a_group_explains_itself_as_it_is_written(home: Home) -> None:
    done = agentctl("forward")
    shown = done.stdout + done.stderr  # which of them is click's to say, and has changed in 8.2
    assert shown.startswith("Usage: agentctl forward [OPTIONS] COMMAND")
    assert "\n  add " in shown


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
        (
            ["up", "--privileged-offset", "80"],
            "the privileged offset is 80; it can be 0 (none) or 1023 to 64512",
        ),
        (["forward", "add", "web"], "'web' is no forward: 'web' is not a port"),
        (["forward", "add", "--static", "22"], "guest_port has 22 in it, which is the VM's own SSH server"),
        (["forward", "add", "--static", "/a:/b"], "--ignore, --static and --guest-ip are for ports"),
        (["forward", "add", "--guest-ip", "x", "80"], "guest_ip is 'x', which is not a numeric address"),
        (["open", "0"], "0 is not in the range"),
        (["up", "--mount", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["up", "--mount", "/tmp:elsewhere"], "'elsewhere' is neither a place in the VM"),
        (["forward", "add"], "Missing argument"),
        (["forward", "add", "5432:/run/db"], "'5432' is not an absolute path of a socket"),
        (["forward", "add", "--reverse", "x:/run/db"], "'x' is neither a socket's absolute path nor a port"),
        (["tunnel", "--port", "0"], "0 is not in the range"),
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
    instance.config.write_text("cpus:\n")
    for command in ("up", "status"):
        done = agentctl(command)
        assert f"{instance.config} line 1: cpus is empty" in said(done)[0]
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
        ["ports", "--watch"],
        ["open", "80"],
        ["tunnel"],
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


def forwards() -> dict[str, Any]:
    done = agentctl("forward", "list", "--json")
    assert done.returncode == 0, done
    listed: dict[str, Any] = json.loads(done.stdout)
    return listed


def test_forwards_are_for_the_next_start_where_nothing_runs(home: Home) -> None:
    assert forwards() == {"rules": [], "lan": False, "privileged_offset": 0, "sockets": []}
    assert not home.instance().directory.exists(), "asking makes nothing"
    assert "8080:80" in agentctl("forward", "add", "8080:80", "/run/h:/run/g").stdout
    assert agentctl("forward", "add", "--reverse", "5432:/run/db").returncode == 0
    kept = config.load(home.instance(), Host.measure())
    assert [(rule.host_port, rule.guest_port) for rule in kept.rules] == [(8080, 80)]
    assert [forward.guest for forward in kept.sockets] == ["/run/g", "/run/db"]
    (rule,) = forwards()["rules"]
    assert (rule["guest_port"], rule["host_port"]) == (80, 8080)
    assert {(row["state"], row["reason"]) for row in forwards()["sockets"]} == {
        ("pending", "the VM does not run")
    }
    refused = agentctl("forward", "add", "/run/h:81")
    assert (refused.returncode, "cannot both be at /run/h" in refused.stderr) == (2, True)
    assert agentctl("forward", "rm", "8080:80", "/run/h:/run/g").returncode == 0
    assert agentctl("forward", "rm", "--reverse", "localhost:5432:/run/db").returncode == 0
    assert forwards()["rules"] == forwards()["sockets"] == []


@pytest.mark.parametrize("words", [["8080:80"], ["/h:/g"]])
def test_what_was_not_added_cannot_be_removed(home: Home, words: list[str]) -> None:
    done = agentctl("forward", "rm", *words)
    assert said(done)[1] == "hint: see: agentctl forward list"
    assert done.returncode != 0


def test_one_forward_that_cannot_be_leaves_the_others_out_as_well(home: Home) -> None:
    assert agentctl("forward", "add", "/run/h:/run/g").returncode == 0
    assert agentctl("forward", "add", "8080:80", "/run/h:/run/other").returncode == ExitCode.USAGE
    assert forwards()["rules"] == []
    assert len(forwards()["sockets"]) == 1


def test_a_forward_waits_for_who_is_just_starting_the_instance(instance: InstancePaths) -> None:
    with state.locked(instance.up_lock) as ours:
        assert ours
        adding = subprocess.Popen(
            [sys.executable, "-m", "host_agent", "forward", "add", "8080:80"], cwd=REPOSITORY
        )
        with pytest.raises(subprocess.TimeoutExpired):
            adding.wait(1.5)
        assert not instance.config.exists()
    assert adding.wait(20) == 0
    assert len(forwards()["rules"]) == 1


def test_the_doctor_is_json_that_scripts_can_rely_on(home: Home) -> None:
    done = agentctl("doctor", "--json")
    told = json.loads(done.stdout)
    assert list(told) == ["findings", "exit_code"]
    assert all(list(row) == ["topic", "level", "message", "fix", "exit_code"] for row in told["findings"])
    assert {row["level"] for row in told["findings"]} <= {"ok", "advice", "problem"}
    assert done.returncode == told["exit_code"]
    assert done.stderr == ""
    assert not home.instance().directory.exists(), "asking makes nothing"


def test_the_doctor_ends_with_what_up_would_end_with(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home.root))
    done = agentctl("doctor")
    assert done.returncode == ExitCode.DEPENDENCY
    assert "is missing" in done.stdout
    assert "fix: install it: sudo apt-get install qemu-system-" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("not work")


def test_logs_before_the_first_start(home: Home) -> None:
    done = agentctl("logs")
    assert said(done)[0] == "error: there are no logs yet"
    assert done.returncode == ExitCode.NOT_RUNNING


def test_logs_are_shown_without_a_running_instance(instance: InstancePaths) -> None:
    instance.console_log.write_text("one\ntwo\n")
    done = agentctl("logs", "--component", "console", "-n", "1")
    assert (done.stdout, done.returncode) == ("two\n", 0)


def test_logs_that_go_on_end_with_an_interrupt_and_no_word(instance: InstancePaths) -> None:
    instance.console_log.write_text("one\n")
    with subprocess.Popen(
        [sys.executable, "-m", "host_agent", "logs", "--follow", "--component", "console"],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    ) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert follower.stdout.readline() == "one\n"
        follower.send_signal(signal.SIGINT)
        assert (follower.wait(30), follower.stderr.read()) == (130, "")


def test_stopping_what_does_not_run_is_no_error(home: Home) -> None:
    done = agentctl("stop")
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (0, "", "not running")
    assert not home.instance().state.exists()


def test_the_status_of_an_instance_that_ends_while_it_is_asked(instance: InstancePaths) -> None:
    """Its host agent hangs up, and a moment later its keeper is gone, too."""
    lock = state.try_lock(instance.lock)
    assert lock is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(instance.agent_socket))
        listener.listen()
        listener.settimeout(10)

        def end() -> None:
            with suppress(TimeoutError):
                for _ in range(2):
                    listener.accept()[0].close()
            os.close(lock)

        ending = threading.Thread(target=end)
        ending.start()
        done = agentctl("status", "--json")
        ending.join()
    assert (done.returncode, done.stderr) == (ExitCode.NOT_RUNNING, "")
    assert json.loads(done.stdout)["stage"] == "stopped"


def test_the_status_of_a_stopped_instance_is_json_that_scripts_can_rely_on(instance: InstancePaths) -> None:
    chosen = config.load(instance, Host.measure())
    config.save(instance, chosen)
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
        "disk_state": "",
        "disk_allocated": 0,
        "host_free": 0,
        "warnings": [],
        "runtime": "docker",
        "containerd_socket": "",
        "attached": None,
        "control": None,
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


def test_env_of_containerd_is_for_its_clients(home: Home) -> None:
    paths = home.instance()
    paths.ensure()
    paths.config.write_text("runtime: containerd\n")
    assert json.loads(agentctl("env", "--json").stdout) == {
        "CONTAINERD_ADDRESS": str(paths.containerd_socket)
    }
    status = json.loads(agentctl("status", "--json").stdout)
    told = [status[key] for key in ("runtime", "docker_socket", "docker_context", "containerd_socket")]
    assert told == ["containerd", "", "", str(paths.containerd_socket)]


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


def test_a_name_that_leads_elsewhere_is_refused(home: Home) -> None:
    for name in ("../../etc", "", "a/b", "-x", "Dev", "a" * 33):
        done = agentctl("--instance", name, "status")
        assert done.returncode == ExitCode.USAGE, name
        assert f"{name!r} is not a name" in done.stderr
    assert agentctl("--instance", "dev-2", "status", "--json").returncode == ExitCode.NOT_RUNNING


def test_a_bug_is_a_sentence_too_and_a_traceback_on_request(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by [zero]")

    monkeypatch.setattr(module, "check_name", lambda name: broken())
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
