"""Process identity: told apart by birth, waited for, and never mistaken for a successor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

from host_agent.process import ProcessIdentity, describe_exit


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def identity_of(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    identity = ProcessIdentity.of(process.pid)
    assert identity is not None
    return identity


def test_the_same_process_is_the_same_identity(sleeper: subprocess.Popen[bytes]) -> None:
    assert identity_of(sleeper) == identity_of(sleeper)
    assert identity_of(sleeper).alive()
    assert identity_of(sleeper) != ProcessIdentity.of(os.getpid())


def test_a_name_with_parentheses_does_not_confuse_it() -> None:
    script = "import ctypes; ctypes.CDLL(None).prctl(15, b') S (x y', 0, 0, 0); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        before = identity_of(process)
        assert before.alive()
        process.communicate(b"\n")
    assert not before.alive()


def test_a_zombie_has_ended(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.alive()
    assert ProcessIdentity.of(sleeper.pid) is None
    assert not identity.send_signal(signal.SIGKILL)
    assert ProcessIdentity.of_child(sleeper.pid) == identity


def test_a_pid_nobody_has_is_no_process(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper)
    sleeper.kill()
    sleeper.wait()
    assert ProcessIdentity.of(sleeper.pid) is None
    assert not identity.send_signal(signal.SIGTERM)


def test_the_successor_of_a_pid_is_not_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    predecessor = ProcessIdentity(sleeper.pid, "another boot:1")
    assert not predecessor.alive()
    assert not predecessor.send_signal(signal.SIGKILL)
    assert sleeper.poll() is None


def test_a_signal_reaches_the_process(sleeper: subprocess.Popen[bytes]) -> None:
    assert identity_of(sleeper).send_signal(signal.SIGTERM)
    assert sleeper.wait() == -signal.SIGTERM


async def test_wait_returns_at_the_end_and_not_before(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper)
    with trio.move_on_after(0.05) as early:
        await identity.wait()
    assert early.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(identity.wait)
        sleeper.kill()
    assert not identity.alive()
    await identity.wait()


async def test_wait_does_not_wait_for_a_successor(sleeper: subprocess.Popen[bytes]) -> None:
    with trio.fail_after(5):
        await ProcessIdentity(sleeper.pid, "another boot:1").wait()


@pytest.mark.parametrize(
    ("status", "words", "clause"),
    [
        (0, "", "QEMU ended normally"),
        (1, "no such disk", "QEMU exited with status 1: no such disk"),
        (-9, "", "QEMU was killed by signal 9 (SIGKILL)"),
        (-42, "", "QEMU was killed by signal 42 (42)"),
        (None, "", "QEMU ended"),
    ],
)
def test_describe_exit(status: int | None, words: str, clause: str) -> None:
    assert describe_exit("QEMU", status, words) == clause
