"""Who is about to be killed: the masks of /proc/TID/status, made up and of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from guest_agent.fuse import callers
from guest_agent.fuse.callers import dies_by, is_dying, times_run

STATUS = """Name:\tcat
State:\tD (disk sleep)
SigQ:\t3/7826
SigPnd:\t{own:016x}
ShdPnd:\t{shared:016x}
SigBlk:\t{blocked:016x}
SigIgn:\t{ignored:016x}
SigCgt:\t{caught:016x}
CapInh:\t0000000000000000
"""


def bit(number: signal.Signals) -> int:
    return 1 << number - 1


def status(own: int = 0, shared: int = 0, blocked: int = 0, ignored: int = 0, caught: int = 0) -> bytes:
    return STATUS.format(own=own, shared=shared, blocked=blocked, ignored=ignored, caught=caught).encode()


def test_a_kill_is_seen_whoever_of_the_process_it_was_sent_to() -> None:
    assert dies_by(status(own=bit(signal.SIGKILL)))
    assert dies_by(status(shared=bit(signal.SIGKILL)))
    assert dies_by(status(own=bit(signal.SIGKILL) | bit(signal.SIGTERM), blocked=(1 << 64) - 1))


@pytest.mark.parametrize(
    "number",
    [signal.SIGALRM, signal.SIGCHLD, signal.SIGWINCH, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM],
)
def test_signals_that_end_nobody_are_none_of_ours(number: signal.Signals) -> None:
    """A SIGTERM that ends its process has a SIGKILL beside it; alone, a handler waits for it."""
    assert not dies_by(status(own=bit(number)))
    assert not dies_by(status(shared=bit(number)))


def test_a_core_dump_is_an_end_unless_the_process_sees_to_it() -> None:
    quit_ = bit(signal.SIGQUIT)
    assert dies_by(status(shared=quit_))
    assert not dies_by(status(shared=quit_, caught=quit_))
    assert not dies_by(status(shared=quit_, ignored=quit_))
    assert not dies_by(status(own=quit_, blocked=quit_))


def test_what_cannot_be_read_ends_nobody() -> None:
    assert not dies_by(b"Name:\tcat\n")
    assert not dies_by(b"")


def test_threads_that_are_there_gone_or_unknown() -> None:
    assert not is_dying(os.getpid())
    assert not is_dying(0)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(timeout=30)
    assert is_dying(child.pid)


def test_the_masks_of_a_real_process_are_read() -> None:
    """A signal that is blocked stays pending, as one does during a request; unblocked it would be the end."""
    code = (
        "import signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGQUIT])\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        child.send_signal(signal.SIGQUIT)
        pending = f"ShdPnd:\t{bit(signal.SIGQUIT):016x}\n"
        wait_until(lambda: pending in status_of(child.pid))
        assert not is_dying(child.pid)
        assert dies_by(
            status_of(child.pid)
            .replace(f"SigBlk:\t{bit(signal.SIGQUIT):016x}", f"SigBlk:\t{0:016x}")
            .encode()
        )
        child.kill()
        child.wait(timeout=30)


def test_a_thread_that_proc_hides_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may be mounted so that it shows nobody but oneself (hidepid)."""

    def hidden(path: str, mode: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(callers, "open", hidden, raising=False)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert not is_dying(child.pid)
    assert is_dying(child.pid)


def test_a_thread_that_slept_and_was_woken_is_told_from_one_that_sleeps() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        wait_until(lambda: "State:\tS" in status_of(child.pid))
        before = times_run(child.pid)
        assert before
        assert times_run(child.pid) == before
        child.stdin.write(b"x")
        child.stdin.flush()
        child.stdout.read(1)
        assert (times_run(child.pid) or 0) > before
        child.stdin.close()
        child.wait(timeout=30)
    assert times_run(child.pid) is None
    assert times_run(0) is None


def status_of(pid: int) -> str:
    with open(f"/proc/{pid}/status") as file:
        return file.read()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
