from __future__ import annotations

import os
import signal
import subprocess

from tests.bench import processes


def test_a_process_ends_with_its_group() -> None:
    """The pipe has ended when nobody of the group has its other end any more."""
    reader, writer = os.pipe()
    script = "sleep 1000 & echo; wait"
    process = processes.spawn(["sh", "-c", script], stdout=subprocess.PIPE, pass_fds=[writer])
    os.close(writer)
    assert process.stdout is not None
    process.stdout.readline()
    processes.end(process)
    assert process.returncode == -signal.SIGTERM
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_one_that_does_not_hear_is_killed() -> None:
    script = "trap '' TERM; echo; while :; do sleep 1000; done"
    process = processes.spawn(["sh", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    processes.end(process, patience=0.2)
    assert process.returncode == -signal.SIGKILL


def test_one_that_has_ended_already_is_no_error() -> None:
    process = processes.spawn(["true"])
    process.wait(20)
    processes.end(process)
    assert process.returncode == 0
