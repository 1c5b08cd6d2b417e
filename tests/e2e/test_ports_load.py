"""Load on the ports of a real VM: what it leaves behind, what silence costs, and the limit.

``tests/ports/test_load.py`` does the same at full size without a VM. Here everything runs on an emulated CPU, perhaps,
where a connection takes 10 ms; so there are 2,000 short ones here, or with ``--long`` 10,000.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host_agent.forwards import MAX_FORWARDS
from tests.e2e.harness import Instance, eventually, is_refused
from tests.ports.harness import SERVER, Programs
from tests.ports.load import Usage, concurrently, cpu_seconds, one_after_another

pytestmark = pytest.mark.vm

FIRST = 21_000
"""Below what either kernel gives to clients."""
SLACK = 12 << 20
"""Bytes by which an agent may have grown by all that: what allocators keep."""

IDLE_THREADS = 2
"""That trio keeps for 10 s when they have nothing to do, which is what asking the agents leaves."""

GUEST_USAGE = """
echo $(ls /proc/$p/fd | wc -l) $(ls /proc/$p/task | wc -l) $(awk '/^VmRSS/ {print $2}' /proc/$p/status)
"""
# The share of a core that a process uses for some seconds (as ``cpu_seconds``).
CPU_SHARE = """
import sys, time
pid, seconds = int(sys.argv[1]), float(sys.argv[2])
used = lambda: time.clock_gettime((~pid << 3) | 2)
before = used()
time.sleep(seconds)
print((used() - before) / seconds)
"""

# Listens on a port and closes it again for as long as its input is open; says when it has begun.
INSIDE = """
import select, socket, sys, time
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    socket.create_server(("0.0.0.0", 81)).close()
"""


@contextmanager
def programs(vm: Instance) -> Iterator[Programs]:
    """What the tests let listen in the VM; nothing at first."""
    pipe = subprocess.PIPE
    command = ["exec", "-u", "root", "python3", "-c", Path(SERVER).read_text()]
    with vm.popen(*command, stdin=pipe, stdout=pipe) as process:
        yield Programs(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def guest_agent(vm: Instance) -> int:
    """Its pid. (systemctl binds a socket, so it makes the agent look what listens.)"""
    return int(vm.guest("systemctl show -p MainPID --value agentctl-agent.service"))


def guest_usage(vm: Instance, pid: int) -> Usage:
    """Of the guest's agent, which has a session of ours at that moment."""
    descriptors, threads, memory = map(int, vm.guest(f"p={pid}{GUEST_USAGE}").split())
    return Usage(descriptors, threads, memory * 1024)


def host_usage(vm: Instance) -> Usage:
    return Usage.of(vm.status()["agent_pid"])


def dumps(vm: Instance) -> int:
    count: int = vm.status()["guest"]["port_dumps"]
    return count


def descriptors(vm: Instance, pid: int) -> tuple[int, int]:
    return host_usage(vm).descriptors, guest_usage(vm, pid).descriptors


def settled(vm: Instance) -> int:
    """How often the guest's agent has asked, once it does not ask any more."""
    last = -1

    def same() -> bool:
        nonlocal last
        before, last = last, dumps(vm)
        return before == last

    eventually(same, interval=1.5)
    return last


def test_load_leaves_nothing_behind(vm: Instance, guest_agent: int, request: pytest.FixtureRequest) -> None:
    short = 10_000 if request.config.getoption("--long") else 2000
    with programs(vm) as listening:
        listening.listen(FIRST)
        eventually(lambda: not is_refused(FIRST))
        before = descriptors(vm, guest_agent)
        concurrently(FIRST, 1000)  # what is allocated once is there now
        eventually(lambda: descriptors(vm, guest_agent) == before, interval=1)
        host, guest = host_usage(vm), guest_usage(vm, guest_agent)
        asked = settled(vm)
        concurrently(FIRST, 200)
        one_after_another(FIRST, short)
        assert dumps(vm) == asked, "connections are no reason to ask what listens"
        eventually(lambda: descriptors(vm, guest_agent) == before, interval=1)
        host_after, guest_after = host_usage(vm), guest_usage(vm, guest_agent)
        assert host_after.threads <= host.threads + IDLE_THREADS
        assert guest_after.threads <= guest.threads + IDLE_THREADS
        grown = (host_after.memory - host.memory, guest_after.memory - guest.memory)
        print(f"grown by 200 more connections at once and {short} short ones: {grown} bytes (host, guest)")
        assert max(grown) < SLACK, grown


def test_silence_costs_nothing_and_nobody_asks(
    vm: Instance, guest_agent: int, request: pytest.FixtureRequest
) -> None:
    seconds = 60.0 if request.config.getoption("--long") else 10.0
    with programs(vm) as listening:
        listening.listen(FIRST, 50)
        eventually(lambda: not is_refused(FIRST + 49))
        asked = settled(vm)
        pid = vm.status()["agent_pid"]
        started, host = time.monotonic(), cpu_seconds(pid)
        measured = ["exec", "-u", "root", "python3", "-c", CPU_SHARE, str(guest_agent), str(seconds)]
        guest = float(vm.agentctl(*measured).stdout)
        host = (cpu_seconds(pid) - host) / (time.monotonic() - started)
        print(f"idle with 50 listeners: host agent {host:.3%}, guest agent {guest:.3%} of a core")
        assert dumps(vm) == asked
        listening.close(FIRST, 50)
        eventually(lambda: is_refused(FIRST + 49))


def test_what_listens_within_containers_is_not_asked_for(vm: Instance, image: str) -> None:
    name = vm.docker("run", "-d", image)
    try:
        pid = vm.docker("inspect", "-f", "{{.State.Pid}}", name)
        asked = settled(vm)
        command = ["exec", "-u", "root", "nsenter", "-t", pid, "-n", "python3", "-c", INSIDE]
        with vm.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as inside:
            assert inside.stdout is not None
            assert inside.stdin is not None
            assert inside.stdout.readline() == b"begun\n"
            time.sleep(5)
            assert dumps(vm) == asked
            inside.stdin.close()
    finally:
        vm.docker("rm", "-f", name)


def test_more_listeners_than_are_forwarded(vm: Instance) -> None:
    """The limit is said, in the rows and as an event, and everything else goes on."""
    held = host_usage(vm).descriptors
    with programs(vm) as listening:
        listening.listen(FIRST, 10_000)

        def states() -> Counter[str]:
            return Counter(row["state"] for row in vm.ports() if row["guest_port"] >= FIRST)

        others = sum(row["state"] == "listening" for row in vm.ports() if row["guest_port"] < FIRST)
        room = MAX_FORWARDS - others
        eventually(lambda: states() == {"listening": room, "pending": 10_000 - room}, timeout=120, interval=1)
        (reason,) = {row["reason"] for row in vm.ports() if row["state"] == "pending"}
        assert reason == f"the limit of {MAX_FORWARDS} forwards is reached"
        concurrently(FIRST, 10)
        assert vm.status()["guest_connected"]
        listening.close(FIRST, 10_000)
        eventually(lambda: not states(), timeout=120, interval=1)
    eventually(lambda: host_usage(vm).descriptors <= held)
