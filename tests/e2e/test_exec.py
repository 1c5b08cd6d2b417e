"""A command in the guest is like one here: status, streams, signals, terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from tests.e2e.harness import Instance, eventually

pytestmark = pytest.mark.vm


def test_exit_status_and_separate_streams(vm: Instance) -> None:
    done = vm.agentctl("exec", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_a_command_that_does_not_exist_is_127(vm: Instance) -> None:
    assert vm.agentctl("exec", "no-such-command", check=False).returncode == 127


def test_stdin_goes_through_whole_and_ends(vm: Instance) -> None:
    noise = os.urandom(3_000_000)
    assert vm.agentctl("exec", "cat", input=noise).stdout == noise


def test_the_default_user_is_like_ours_at_home_elsewhere(vm: Instance) -> None:
    who = vm.agentctl("exec", "sh", "-c", "id -un; id -u; pwd", cwd="/")
    name, uid, home = who.stdout.decode().split()
    assert int(uid) == os.geteuid()
    assert home == f"/home/{name}.guest"
    assert vm.agentctl("exec", "sudo", "-n", "id", "-u").stdout == b"0\n"


def test_a_command_starts_in_the_folder_it_is_called_in_if_that_is_shared(vm: Instance) -> None:
    home = os.path.expanduser("~")
    assert vm.agentctl("exec", "pwd", cwd=home).stdout.decode() == f"{home}\n"


def test_options_of_exec(vm: Instance) -> None:
    done = vm.agentctl(
        "exec", "-u", "root", "-w", "/usr", "-e", "GREETING=hello there", "sh", "-c", "pwd; echo $GREETING"
    )
    assert done.stdout == b"/usr\nhello there\n"


def test_an_unknown_user_is_one_sentence(vm: Instance) -> None:
    done = vm.agentctl("exec", "-u", "nobody-here", "true", check=False)
    assert done.returncode == 8
    assert done.stderr.count(b"\n") <= 2
    assert b"nobody-here" in done.stderr


def test_a_signal_reaches_the_process(vm: Instance) -> None:
    script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.2; done"
    with vm.popen("exec", "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"caught\n"
    assert process.returncode == 5


def test_a_killed_client_takes_its_process_along(vm: Instance) -> None:
    with vm.popen("exec", "-u", "root", "sleep", "8765", stdin=subprocess.DEVNULL) as process:
        eventually(lambda: vm.guest("pgrep -x -f 'sleep 8765' || true").strip())
        process.kill()
    eventually(lambda: not vm.guest("pgrep -x -f 'sleep 8765' || true").strip())


def _until(descriptor: int, text: bytes, timeout: float = 60) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout
    while text not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
        assert ready, seen
        seen += os.read(descriptor, 4096)
    return seen


def test_a_shell_has_a_terminal_of_our_size_that_follows_ours(vm: Instance) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "host_agent", "shell"], vm.environment)
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        # Split in the middle, so that the echo of what we type is not mistaken for the answer.
        os.write(terminal, b"stty size; echo do''ne\n")
        assert b"33 99" in _until(terminal, b"done\r\n")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 111, 0, 0))
        time.sleep(0.5)
        os.write(terminal, b"stty size; tty; exit 9\n")
        seen = _until(terminal, b"/dev/pts/")
        assert b"44 111" in seen
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 9
    finally:
        os.close(terminal)
