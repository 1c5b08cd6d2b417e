"""The keeper with a host agent of a few lines of Python, which notes down what happens to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host_agent import keeper, state
from host_agent.keeper import Keeper
from host_agent.paths import InstancePaths
from host_agent.state import InstanceState

REPOSITORY = Path(__file__).parents[2]

# Takes the place of host_agent.daemon. It notes each start, then does what its n-th line of `script` says:
# an exit status, `kill`, or `wait` for the file `go` and end with 0.
AGENT = """
import argparse, os, pathlib, select, signal, socket, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("directory", type=pathlib.Path)
parser.add_argument("--lock-fd", type=int)
parser.add_argument("--keeper-fd", type=int)
parser.add_argument("--store-fds")
arguments = parser.parse_args()
os.fstat(arguments.lock_fd)
directory = arguments.directory
with (directory / "starts").open("a") as starts:
    starts.write(f"{os.getpid()} {os.getppid()}\\n")
number = len((directory / "starts").read_text().splitlines())
script = (directory / "script").read_text().split()
action = script[min(number, len(script)) - 1]
head, tail = (socket.socket(fileno=int(word)) for word in arguments.store_fds.split(",")[2:])
head.setblocking(False)
try:
    (directory / "found").write_bytes(head.recv(100))
except BlockingIOError:
    pass
tail.send(b"from start %d" % number)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "wait":
    while not (directory / "go").exists():
        if select.select([arguments.keeper_fd], [], [], 0.02)[0]:
            (directory / "keeper-died").touch()
            time.sleep(60)
    sys.exit(0)
sys.exit(int(action))
"""


@pytest.fixture
def script(instance: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what each start of the agent does; the last goes on for all further ones."""
    stub = instance.directory / "stub"
    package = stub / "host_agent"
    package.mkdir(parents=True)
    # The rest of the package is the real one.
    (package / "__init__.py").write_text(f"__path__.append({str(REPOSITORY / 'host_agent')!r})\n")
    (package / "daemon.py").write_text(AGENT)
    # The keeper looks first where it was found itself, so the stub is put before that in each interpreter.
    (stub / "sitecustomize.py").write_text(f"import sys; sys.path.insert(0, {str(stub)!r})\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stub), str(REPOSITORY)]))
    monkeypatch.chdir(stub.parent)
    monkeypatch.setattr(keeper, "FIRST_DELAY", 0.0005)

    def write(*actions: str | int) -> None:
        (instance.directory / "script").write_text(" ".join(map(str, actions)))
        state.save(instance.state, InstanceState(wanted=True))

    return write


def starts(paths: InstancePaths) -> list[tuple[int, int]]:
    """The pid and the parent of every agent that was started."""
    try:
        lines = (paths.directory / "starts").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(int(pid), int(parent)) for pid, parent in map(str.split, lines)]


def until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def keep(paths: InstancePaths) -> int:
    """Be the keeper."""
    lock, store = state.try_lock(paths.lock), keeper.make_store()
    assert lock is not None
    try:
        return Keeper(paths, lock, store).run()
    finally:
        for descriptor in (lock, *store):
            os.close(descriptor)


def test_an_agent_that_ends_by_itself_is_not_started_again(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    script(0)
    assert keep(instance) == 0
    assert len(starts(instance)) == 1
    assert state.load(instance.state).agent_restarts == 0


@pytest.mark.parametrize("death", ["kill", 1])
def test_an_agent_that_dies_is_started_again_and_counted(
    instance: InstancePaths, script: Callable[..., None], death: str | int
) -> None:
    script(death, death, 0)
    assert keep(instance) == 0
    assert len(starts(instance)) == 3
    assert state.load(instance.state) == InstanceState(wanted=True, agent_restarts=2)


def test_an_agent_that_is_not_wanted_stays_dead(instance: InstancePaths, script: Callable[..., None]) -> None:
    script("kill")
    state.save(instance.state, InstanceState(wanted=False, failure="the VM ended"))
    assert keep(instance) == 0
    assert len(starts(instance)) == 1
    # What the agent wrote down before it died is not written over.
    assert state.load(instance.state) == InstanceState(wanted=False, failure="the VM ended")


def test_it_gives_up_on_an_agent_that_keeps_dying_and_says_so(
    instance: InstancePaths,
    script: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(keeper, "MAX_STARTS", 3)
    ended: list[Path] = []
    monkeypatch.setattr("host_agent.vm.kill_recorded", ended.append)
    script("kill")
    assert keep(instance) == 1
    assert len(starts(instance)) == 1 + 3
    left = state.load(instance.state)
    assert (left.wanted, left.agent_restarts) == (False, 3)
    assert left.failure == "the host agent died 3 times in 60 s"
    assert left.hint == "see: agentctl logs"
    assert ended == [instance.qemu_identity]
    assert "keeper: the host agent died 3 times in 60 s" in capfd.readouterr().err


def test_an_agent_finds_what_the_one_before_it_has_left(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    script("kill", "kill", 0)
    assert keep(instance) == 0
    assert (instance.directory / "found").read_bytes() == b"from start 2"


def test_descriptors_are_a_word_of_a_command_line() -> None:
    assert keeper.read(keeper.written([3, 14])) == [3, 14]
    assert keeper.read(keeper.written([])) == []


def test_deaths_long_ago_do_not_count(
    instance: InstancePaths, script: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "MAX_STARTS", 2)
    monkeypatch.setattr(keeper, "WINDOW", 0.0)
    script(*["kill"] * 5, 0)
    assert keep(instance) == 0
    assert len(starts(instance)) == 6


def test_the_delay_doubles(
    instance: InstancePaths, script: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(keeper, "FIRST_DELAY", 0.05)
    script(*["kill"] * 5, 0)
    keep(instance)
    # None before the first of them: one death may be anybody's.
    assert slept == pytest.approx([0.05, 0.1, 0.2, 0.4])


def spawned(paths: InstancePaths) -> None:
    """A keeper of its own, as `up` starts it."""
    lock = state.try_lock(paths.lock)
    assert lock is not None
    try:
        keeper.spawn(paths, lock)
    finally:
        os.close(lock)


def finish(paths: InstancePaths) -> None:
    """Let the agent end; nothing of it or its keeper is left."""
    (paths.directory / "go").touch()
    until(lambda: not state.is_locked(paths.lock))


def test_the_lock_is_held_as_long_as_either_lives(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    script("wait")
    spawned(instance)
    try:
        assert state.is_locked(instance.lock)
        until(lambda: len(starts(instance)) == 1)
        agent, watcher = starts(instance)[0]
        os.kill(agent, signal.SIGKILL)
        until(lambda: len(starts(instance)) == 2)
        assert state.is_locked(instance.lock)
        agent, parent = starts(instance)[1]
        assert parent == watcher
        os.kill(watcher, signal.SIGKILL)
        until((instance.directory / "keeper-died").exists)
        assert state.is_locked(instance.lock)
        os.kill(agent, signal.SIGKILL)
        until(lambda: not state.is_locked(instance.lock))
    finally:
        for pid in {pid for start in starts(instance) for pid in start}:
            kill(pid, instance)


def kill(pid: int, paths: InstancePaths) -> None:
    """End a process of this test, if it is one still."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if os.fsencode(paths.directory) in words:
        os.kill(pid, signal.SIGKILL)


def test_a_spawned_keeper_is_a_daemon_and_not_our_child(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    script("wait")
    spawned(instance)
    try:
        until(lambda: len(starts(instance)) == 1)
        _, watcher = starts(instance)[0]
        assert os.getsid(watcher) != os.getsid(0)
        with pytest.raises(ChildProcessError):
            os.waitpid(watcher, os.WNOHANG)
        # A ^C in the terminal of `up`, and the end of that terminal.
        os.kill(watcher, signal.SIGINT)
        os.kill(watcher, signal.SIGHUP)
        time.sleep(0.1)
        os.kill(watcher, 0)
    finally:
        finish(instance)
    assert len(starts(instance)) == 1


def test_a_running_agent_is_adopted_and_started_again_when_it_dies(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    """The keeper was killed; its agent starts another, which finds no child of its own."""
    script("wait")
    agent = subprocess.Popen(["sleep", "60"])
    reader, writer = os.pipe()
    lock = state.try_lock(instance.lock)
    assert lock is not None
    store = keeper.make_store()
    with socket.socket(fileno=os.dup(store[3])) as tail:
        tail.send(b"from the adopted one")
    keeper.spawn(instance, lock, adopt=agent.pid, alive=writer, store=store)
    for descriptor in (lock, writer, *store):
        os.close(descriptor)
    try:
        os.set_blocking(reader, False)
        # The adopted agent sees a living keeper: the pipe is neither readable nor at its end.
        time.sleep(0.3)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        assert starts(instance) == []
        agent.kill()
        agent.wait()
        until(lambda: len(starts(instance)) == 1)
        assert state.load(instance.state).agent_restarts == 1
        assert state.is_locked(instance.lock)
        until((instance.directory / "found").exists)
        until(lambda: (instance.directory / "found").read_bytes() == b"from the adopted one")
    finally:
        agent.kill()
        agent.wait()
        os.close(reader)
        finish(instance)


def test_an_adopted_agent_that_is_not_wanted_any_more_ends_the_keeper(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    script("wait")
    agent = subprocess.Popen(["sleep", "60"])
    lock = state.try_lock(instance.lock)
    assert lock is not None
    reader, writer = os.pipe()
    keeper.spawn(instance, lock, adopt=agent.pid, alive=writer)
    for descriptor in (lock, reader, writer):
        os.close(descriptor)
    state.save(instance.state, InstanceState(wanted=False))
    agent.kill()
    agent.wait()
    until(lambda: not state.is_locked(instance.lock))
    assert starts(instance) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")
def test_orphans_of_the_agent_are_reaped_by_the_keeper(
    instance: InstancePaths, script: Callable[..., None]
) -> None:
    """QEMU is the agent's child; when the agent dies first, its end must not leave a zombie behind."""
    script("wait")
    package = instance.directory / "stub/host_agent/daemon.py"
    package.write_text(
        "import subprocess\n"
        "from pathlib import Path\n"
        f"directory = Path({str(instance.directory)!r})\n"
        "if not (directory / 'orphan').exists():\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    (directory / 'orphan').write_text(str(child.pid))\n"
        "    import os; os.kill(os.getpid(), 9)\n" + AGENT
    )
    spawned(instance)
    try:
        until(lambda: len(starts(instance)) == 1)
        orphan = int((instance.directory / "orphan").read_text())
        _, watcher = starts(instance)[0]
        parent = Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1]
        assert int(parent) == watcher
        os.kill(orphan, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{orphan}").exists())
    finally:
        finish(instance)
