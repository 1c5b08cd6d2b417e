"""Either process is killed with work in flight: what returned is there, once, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.files.harness import Folder, Plane, eventually

WORKER = Path(__file__).resolve().parent / "worker.py"
WORKERS = 3


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Plane() as plane:
        yield plane


class Workers:
    """Processes that write, append, create, rename and remove, and say what has returned."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._logs = plane.directory / "logs"

    def __enter__(self) -> Workers:
        self._logs.mkdir()
        self._running = [
            self._plane.start([sys.executable, "-B", str(WORKER), str(index), str(self._logs)])
            for index in range(WORKERS)
        ]
        eventually("every worker has begun", lambda: all(self.log(index) for index in range(WORKERS)))
        return self

    def __exit__(self, *exception: object) -> None:
        for running in self._running:
            running.__exit__()

    def log(self, index: int) -> list[str]:
        path = self._logs / str(index)
        return path.read_text().splitlines() if path.exists() else []

    def done(self) -> int:
        return sum(len(self.log(index)) for index in range(WORKERS))

    def end(self) -> list[list[str]]:
        """Let them come to an end; nothing of theirs may have failed."""
        (self._logs / "stop").touch()
        for running in self._running:
            finished = running.wait(60)
            assert finished.status == 0, finished.errors[-3000:]
        return [self.log(index) for index in range(WORKERS)]


def check(plane: Plane, logs: list[list[str]]) -> None:
    """The host has exactly what the workers say they did."""
    appended = (plane.host / "appended").read_text().splitlines()
    expected = [line.split(" ", 1)[1] for log in logs for line in log if line.startswith("append ")]
    assert Counter(appended) == Counter(expected)
    for index, log in enumerate(logs):
        own = plane.host / str(index)
        counts = Counter(line.split()[0] for line in log)
        assert (
            min(counts[kind] for kind in ("append", "write", "create", "rename", "mkdir", "unlink", "link"))
            > 0
        )
        written = (own / "written").read_bytes()
        assert written == b"".join(b"%-15d\n" % number for number in range(counts["write"]))
        names = {path.name for path in own.iterdir()}
        kept = {f"created{number}" for number in range(counts["create"])} - {
            f"created{line.split()[1]}" for line in log if line.startswith("unlink ")
        }
        made = {f"directory{number}" for number in range(counts["mkdir"])}
        linked = {f"linked{number}" for number in range(counts["link"])}
        assert names == {"written", f"renamed{counts['rename']}"} | kept | made | linked
        for name in kept:
            assert (own / name).read_text() == f"{index} {name}" * 100
        assert (own / "written").stat().st_nlink == 1 + len(linked)


def kill_server(plane: Plane) -> None:
    plane.server.kill()
    time.sleep(random.random() * 0.1)
    plane.start_server()


def kill_agent(plane: Plane) -> None:
    plane.agent.kill()
    time.sleep(random.random() * 0.1)
    plane.agent.start()


def kill_both(plane: Plane) -> None:
    plane.server.kill()
    plane.agent.kill()
    plane.agent.start(ready=None)
    plane.start_server()
    plane.wait_mounted()


@pytest.mark.parametrize("kill", [kill_server, kill_agent, kill_both])
def test_killed_with_work_in_flight(
    plane: Plane, kill: Callable[[Plane], None], pytestconfig: pytest.Config
) -> None:
    with Workers(plane) as workers:
        for _ in range(60 if pytestconfig.getoption("--long") else 5):
            before = workers.done()
            kill(plane)
            eventually("work goes on", lambda before=before: workers.done() > before + 10, 40)
            time.sleep(random.random() * 0.3)
        logs = workers.end()
    check(plane, logs)
    assert plane.sh("cat appended | wc -l").strip() == str(
        sum(line.startswith("append ") for log in logs for line in log)
    )
    assert plane.state().lost == 0


@pytest.mark.parametrize("kill", [kill_server, kill_agent])
def test_what_is_open_stays_open(plane: Plane, kill: Callable[[Plane], None]) -> None:
    """Unlinked and renamed-over files, one that may not be opened again, a directory stream, a mapping, a current directory."""
    script = """
import mmap, os, sys
def step():
    print("ready", flush=True)
    while not os.path.exists(sys.argv[1]): os.stat("/").st_ino and __import__("time").sleep(0.01)
os.mkdir("cwd"); os.mkdir("list")
for i in range(500): os.close(os.open(f"list/{i}", os.O_CREAT | os.O_WRONLY))
def make(name, data):
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o644); os.write(fd, data); return fd
unlinked, renamed, read_only, mapped = (make(n, n.encode()) for n in ("unlinked", "renamed", "read_only", "mapped"))
anonymous = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600); os.write(anonymous, b"anonymous")
os.unlink("unlinked"); os.close(make("other", b"other")); os.rename("other", "renamed"); os.fchmod(read_only, 0o444)
os.ftruncate(mapped, 8192); view = mmap.mmap(mapped, 8192); view[0:5] = b"early"
listing = os.scandir("list"); first = [next(listing).name for _ in range(10)]
os.chdir("cwd")
step()
os.pwrite(read_only, b"READ", 0)
view[4096:4100] = b"late"; view.flush()
rest = [entry.name for entry in listing]
os.chdir("."); open("here", "w").write("x")
print(os.pread(read_only, 100, 0).decode(), len(set(first) | set(rest)), len(first + rest))
for fd in (renamed, unlinked, anonymous):
    try: print(os.pwrite(fd, b"AGAIN", 0), os.fstat(fd).st_nlink, os.pread(fd, 100, 0).decode())
    except OSError as error: print(error.strerror)
"""
    flag = plane.directory / "go"
    with plane.start([sys.executable, "-u", "-c", script, str(flag)]) as running:
        eventually("everything is open", lambda: running.said()[0] == "ready\n")
        kill(plane)
        flag.touch()
        finished = running.wait(40)
    assert finished.status == 0, finished.errors
    _, kept, *nameless = finished.output.splitlines()
    assert kept == "READ_only 500 500"
    assert nameless == ["5 0 AGAINed", "5 0 AGAINked", "5 0 AGAINmous"]
    assert plane.state().lost == 0
    eventually("nothing of it is kept any more", lambda: not len(plane.server.store), 10)
    assert (plane.host / "mapped").read_bytes()[4096:4100] == b"late"
    assert (plane.host / "cwd/here").read_text() == "x"
    assert (plane.host / "renamed").read_text() == "other"


def test_a_server_that_is_killed_again_and_again_while_nobody_looks(plane: Plane) -> None:
    for number in range(4):
        plane.sh(f"echo {number} >>log; cat log | wc -l")
        plane.restart_server()
    assert (plane.host / "log").read_text() == "0\n1\n2\n3\n"


def test_an_agent_that_ends_in_order_takes_its_mounts_along(plane: Plane) -> None:
    plane.sh("echo x >file")
    plane.agent.kill(signal.SIGTERM)
    assert plane.namespace.mounts() == []
    assert plane.agent.store.names() == []
    plane.agent.start()
    assert plane.sh("cat file") == "x\n"


def not_landed(plane: Plane) -> int:
    """How many writes have been answered that are not on the host."""
    answered, landed = struct.unpack("=QQ", plane.agent.fence.read_bytes()[:16])
    return answered - landed


def test_ended_in_good_order_it_loses_nothing_that_it_answered_for(plane: Plane) -> None:
    """What follows a write at once is answered before the host has it; no successor would know whose it is."""
    said = plane.directory / "said"
    script = f"""
import os
said = os.open({str(said)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
file = os.open("appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
number = 0
try:
    while True:
        os.write(file, b"%d\\n" % number)
        os.write(said, b"%d\\n" % number)
        number += 1
except OSError:
    pass
"""
    with plane.start([sys.executable, "-c", script]) as running:
        eventually("it has begun", lambda: said.exists() and said.stat().st_size > 2000)
        os.kill(plane.server.pid, signal.SIGSTOP)
        eventually("something was answered that the host has not", lambda: not_landed(plane) > 1)
        os.kill(plane.agent.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(plane.server.pid, signal.SIGCONT)
        plane.agent.kill(signal.SIGTERM)
        assert running.wait(60).status == 0
    appended, answered = (plane.host / "appended").read_bytes(), said.read_bytes()
    assert appended.startswith(answered)
    assert appended.count(b"\n") <= answered.count(b"\n") + 1


# --- locks that reach the host ---------------------------------------------------------------------

HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
getattr(fcntl, sys.argv[2])(fd, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[3] == "try" else 0))
print("held", flush=True)
time.sleep(0 if sys.argv[3] == "try" else 600)
"""


@pytest.fixture
def locking() -> Iterator[Plane]:
    with Plane(Folder(host_locks=True)) as plane:
        (plane.host / "file").write_text("content")
        yield plane


def holds_on_host(plane: Plane, call: str) -> bool:
    argv = [sys.executable, "-c", HOLD, str(plane.host / "file"), call, "try"]
    return subprocess.run(argv, capture_output=True, timeout=30).returncode == 0


def holds_in_guest(plane: Plane, call: str) -> bool:
    return plane.run([sys.executable, "-c", HOLD, "file", call, "try"], status=None).status == 0


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_the_holder_is_killed(locking: Plane, call: str) -> None:
    assert holds_on_host(locking, call)
    with locking.start([sys.executable, "-c", HOLD, "file", call, "hold"]) as holder:
        eventually("the guest holds it", lambda: holder.said()[0] == "held\n")
        assert not holds_on_host(locking, call)
        assert not holds_in_guest(locking, call)
        holder.kill()
        eventually("the host gets it", lambda: holds_on_host(locking, call), 10)
    argv = [sys.executable, "-c", HOLD, str(locking.host / "file"), call, "hold"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as on_host:
        assert on_host.stdout is not None
        assert on_host.stdout.readline() == b"held\n"
        assert not holds_in_guest(locking, call)
        with locking.start([sys.executable, "-c", HOLD, "file", call, "hold"]) as waiter:
            time.sleep(0.5)
            assert waiter.said()[0] == ""
            on_host.kill()
            eventually("the waiter gets it", lambda: waiter.said()[0] == "held\n", 10)
            assert not holds_on_host(locking, call)
    eventually("nobody holds it", lambda: holds_on_host(locking, call), 10)


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_nobody_gets_a_lock_while_there_is_no_server(locking: Plane, call: str) -> None:
    with locking.start([sys.executable, "-c", HOLD, "file", call, "hold"]) as holder:
        eventually("the guest holds it", lambda: holder.said()[0] == "held\n")
        for _ in range(2):
            locking.server.kill()
            assert not holds_on_host(locking, call)
            locking.start_server()
            locking.wait_mounted()
            assert not holds_on_host(locking, call)
    eventually("it is free", lambda: holds_on_host(locking, call), 10)
    assert locking.state().lost == 0
    assert len(locking.server.store) == 0


@pytest.mark.parametrize("call", ["flock", "lockf"])
@pytest.mark.parametrize("kill", [kill_server, kill_agent])
def test_a_lock_outlives_the_servers(locking: Plane, call: str, kill: Callable[[Plane], None]) -> None:
    with locking.start([sys.executable, "-c", HOLD, "file", call, "hold"]) as holder:
        eventually("the guest holds it", lambda: holder.said()[0] == "held\n")
        kill(locking)
        assert not holds_in_guest(locking, call)
        assert not holds_on_host(locking, call)
    eventually("it is free", lambda: holds_on_host(locking, call), 10)
    assert locking.state().lost == 0


OPEN_FILE_LOCK = """
import fcntl, os, struct, time
fd = os.open("file", os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kill", [kill_server, kill_agent, kill_both])
def test_a_lock_of_an_open_file_goes_with_it(locking: Plane, kill: Callable[[Plane], None]) -> None:
    """Also if those who knew whose it is were killed meanwhile."""
    with locking.start([sys.executable, "-c", OPEN_FILE_LOCK]) as holder:
        eventually("the guest holds it", lambda: holder.said()[0] == "held\n")
        kill(locking)
        assert not holds_on_host(locking, "lockf")
        holder.kill()
        eventually("it is free", lambda: holds_on_host(locking, "lockf"), 10)
    assert locking.state().lost == 0


def test_locks_are_the_guests_own_elsewhere(plane: Plane) -> None:
    (plane.host / "file").write_text("content")
    with plane.start([sys.executable, "-c", HOLD, "file", "flock", "hold"]) as holder:
        eventually("the guest holds it", lambda: holder.said()[0] == "held\n")
        assert not holds_in_guest(plane, "flock")
        assert holds_on_host(plane, "flock")


def test_nothing_is_left_open_on_the_host(plane: Plane) -> None:
    """A file that the guest has closed is closed on the host soon: who waits for that there need not wait long."""
    plane.sh("printf '#!/bin/sh\\n' >file; chmod 755 file")

    def writers() -> list[str]:
        found = []
        for fd in Path(f"/proc/{plane.server.pid}/fdinfo").iterdir():
            try:
                flags = int(fd.read_text().splitlines()[1].split()[1], 8)
                if flags & os.O_ACCMODE and os.readlink(f"/proc/{plane.server.pid}/fd/{fd.name}") == str(
                    plane.host / "file"
                ):
                    found.append(fd.name)
            except FileNotFoundError:
                continue
        return found

    eventually("no writer is open", lambda: not writers(), 5)
    assert subprocess.run([str(plane.host / "file")], capture_output=True, timeout=10).returncode in (
        0,
        126,
        127,
    )
