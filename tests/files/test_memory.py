"""Large data on the mount, with memory that both sides have and without: the right bytes, whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.region import FILES
from tests.files import blocks
from tests.files.harness import Plane, eventually

SCRIPT = Path(__file__).resolve().parent / "blocks.py"
WRITERS = 3
MIB = 1 << 20


@pytest.fixture(params=[True, False], ids=["memory", "inline"])
def plane(request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(with_memory=request.param) as plane:
        yield plane


@pytest.fixture
def shared() -> Iterator[Plane]:
    with Plane() as plane:
        yield plane


def received(plane: Plane) -> tuple[int, int]:
    """How often the host and the guest have got something in memory."""
    host, guest = plane.server.use(), plane.agent.use()
    assert host is not None
    assert guest is not None
    return host.received, guest.received


def kill_server(plane: Plane) -> None:
    plane.restart_server()


def kill_agent(plane: Plane) -> None:
    plane.restart_agent()


def kill_both(plane: Plane) -> None:
    plane.server.kill()
    plane.agent.kill()
    plane.agent.start(ready=None)
    plane.start_server()
    plane.wait_mounted()


class Writers:
    """Processes that write and read blocks, and say what has returned."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._logs = plane.directory / "logs"

    def __enter__(self) -> Writers:
        self._logs.mkdir()
        self._running = [
            self._plane.start([sys.executable, "-B", str(SCRIPT), str(index), str(self._logs)])
            for index in range(WRITERS)
        ]
        eventually(
            "every writer has begun", lambda: all(self.counts(index)["read"] for index in range(WRITERS))
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for running in self._running:
            running.__exit__()

    def counts(self, index: int) -> Counter[str]:
        path = self._logs / str(index)
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line.split()[0] for line in lines)

    def done(self) -> int:
        return sum(self.counts(index).total() for index in range(WRITERS))

    def end(self) -> None:
        """Let them come to an end; nothing of theirs may have failed."""
        (self._logs / "stop").touch()
        for running in self._running:
            finished = running.wait(60)
            assert finished.status == 0, finished.errors[-3000:]


def check(plane: Plane, writers: Writers) -> None:
    """The host has exactly the blocks that the writers say they wrote."""
    appended = (plane.host / "appended").read_bytes()
    found = Counter(
        appended[start : start + blocks.APPENDED] for start in range(0, len(appended), blocks.APPENDED)
    )
    expected: Counter[bytes] = Counter()
    for index in range(WRITERS):
        count = writers.counts(index)["write"]
        content = bytearray()
        for number in range(count):
            data, place = blocks.block(str(index), number, blocks.size_of(number)), blocks.place_of(number)
            content += bytes(max(0, place + len(data) - len(content)))
            content[place : place + len(data)] = data
            expected[blocks.block(str(index), number, blocks.APPENDED)] += 1
        assert (plane.host / f"written{index}").read_bytes() == content
        assert (plane.host / f"mapped{index}").read_bytes() == blocks.block(str(index), count - 1)
    assert found == expected


@pytest.mark.parametrize("kill", [kill_server, kill_agent, kill_both])
def test_killed_with_large_blocks_in_flight(
    plane: Plane, kill: Callable[[Plane], None], pytestconfig: pytest.Config
) -> None:
    with Writers(plane) as writers:
        for _ in range(60 if pytestconfig.getoption("--long") else 4):
            before = writers.done()
            kill(plane)
            eventually("work goes on", lambda before=before: writers.done() > before + 6, 40)
            time.sleep(random.random() * 0.2)
        writers.end()
    check(plane, writers)
    assert plane.state().lost == 0
    if plane.with_memory:
        plane.wait_at_rest()


def test_large_data_of_many_at_a_time(plane: Plane) -> None:
    with Writers(plane) as writers:
        before = writers.done()
        eventually("much was done", lambda: writers.done() > before + 60, 60)
        writers.end()
    check(plane, writers)


COPY = """
import os
data = os.urandom(1 << 20)
for number in range(8):
    with open(f"file{number}", "wb", 0) as file: assert file.write(data) == 1 << 20
    with open(f"file{number}", "rb", 0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read(1 << 20) == data
"""


def test_data_goes_through_the_memory(shared: Plane) -> None:
    assert shared.memory is not None
    before = received(shared)
    shared.python(COPY)
    after = received(shared)
    assert after[0] >= before[0] + 8
    assert after[1] >= before[1] + 8
    content = (shared.host / "file7").read_bytes()[: 64 * 1024]
    assert content in shared.memory.guests_half()
    assert content in shared.memory.hosts_half()


def test_what_is_small_does_not(shared: Plane) -> None:
    before = received(shared)
    shared.sh("for i in $(seq 20); do echo small >file$i; cat file$i; done")
    assert received(shared) == before


def test_more_writers_than_there_are_slots_for(shared: Plane) -> None:
    """A stopped server takes nothing: what finds no slots waits in other memory, and all of it arrives."""
    script = """
import os, sys, threading, time
files = [os.open(f"file{number}", os.O_WRONLY | os.O_CREAT) for number in range(24)]
def write(number): assert os.write(files[number], bytes([number]) * (1 << 20)) == 1 << 20
threads = [threading.Thread(target=write, args=(number,)) for number in range(24)]
print("ready", flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

    def none_left() -> bool:
        use = shared.agent.use()
        return use is not None and use.mine.bit_count() == FILES.slots

    flag = shared.directory / "go"
    with shared.start([sys.executable, "-u", "-c", script, str(flag)]) as running:
        eventually("the files are there", lambda: running.said()[0] == "ready\n")
        os.kill(shared.server.pid, signal.SIGSTOP)
        try:
            flag.touch()
            eventually("no slots are left", none_left)
            time.sleep(0.2)
        finally:
            os.kill(shared.server.pid, signal.SIGCONT)
        finished = running.wait(30)
    assert finished.status == 0, finished.errors
    for number in range(24):
        assert (shared.host / f"file{number}").read_bytes() == bytes([number]) * MIB


def test_another_vm_begins_with_its_own_memory(shared: Plane) -> None:
    """Both sides gone, and memory that is empty again, as after a boot."""
    assert shared.memory is not None
    shared.python(COPY)
    shared.server.kill()
    shared.agent.kill()
    shared.memory.blank()
    shared.agent.start(ready=None)
    shared.start_server()
    shared.wait_mounted()
    before = received(shared)
    shared.python(COPY)
    assert received(shared)[0] >= before[0] + 8


def test_memory_that_is_another_is_not_used(shared: Plane) -> None:
    """A guest that offers what the host does not find: all goes on, inline."""
    assert shared.memory is not None
    shared.agent.kill()
    elsewhere = shared.directory / "elsewhere"
    with elsewhere.open("wb") as file:
        file.truncate(64 << 20)
    shared.agent._memory = type(shared.memory)(shared.memory.instance, elsewhere)
    shared.agent.start()
    shared.python(COPY)
    host, guest = shared.server.use(), shared.agent.use()
    assert host is not None
    assert guest is not None
    assert (host.active, guest.active) == (False, False)
    assert "the guest's memory is another than ours" in shared.server.log.read_text()
    shared.agent.kill()
    shared.agent._memory = shared.memory
    shared.agent.start()
    shared.python(COPY)
