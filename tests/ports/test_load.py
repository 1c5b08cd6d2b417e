"""Load on forwarded ports: what it leaves behind, and what silence costs. Both agents as processes, without a VM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from host_agent.forwards import MAX_FORWARDS
from tests.e2e.harness import eventually
from tests.ports.harness import Agent, Ports, permitted, running
from tests.ports.load import Usage, concurrently, cpu_seconds, one_after_another

FIRST = 20_000
"""Below what the kernel gives to clients."""
SLACK = 8 << 20
"""Bytes by which a process may have grown by all that: what an allocator keeps. One connection of each round that was
kept would be 11,000 times a stream, two buffers and a pump, some 50 MB."""
IDLE = 0.005
"""Of a core."""


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    if not permitted():
        pytest.skip("a network namespace is not permitted here")
    with TemporaryDirectory(prefix="ac-") as directory, running(Path(directory)) as ports:
        yield ports


def living(agent: Agent) -> dict[str, Any]:
    return {"tasks": agent.report()["tasks"], "descriptors": Usage.of(agent.pid).descriptors}


def test_load_leaves_nothing_behind(ports: Ports) -> None:
    ports.programs.listen(FIRST)
    ports.wait(listening=1)
    both = (ports.host, ports.guest)
    before = [living(agent) for agent in both]
    threads = [Usage.of(agent.pid).threads for agent in both]
    concurrently(FIRST, 1000)  # what is allocated once is there now
    eventually(lambda: [living(agent) for agent in both] == before)
    memory = [Usage.of(agent.pid).memory for agent in both]
    concurrently(FIRST, 1000)
    one_after_another(FIRST, 10_000)
    eventually(lambda: [living(agent) for agent in both] == before)
    grown = [Usage.of(agent.pid).memory - had for agent, had in zip(both, memory, strict=True)]
    print(f"grown by 1,000 connections at once and 10,000 short ones: {grown} bytes (host, guest)")
    assert max(grown) < SLACK, grown
    # trio keeps threads that have nothing to do for 10 s.
    for agent, had in zip(both, threads, strict=True):
        assert Usage.of(agent.pid).threads <= had
    ports.programs.close(FIRST)
    ports.wait()


def silences(request: pytest.FixtureRequest) -> list[float]:
    return [60.0] if request.config.getoption("--long") else [5.0] * 3


def share_of_a_core(ports: Ports, seconds: float) -> list[float]:
    """What the host agent and the guest agent use in the next ``seconds``."""
    pids = (ports.host.pid, ports.guest.pid)
    started, before = time.monotonic(), [cpu_seconds(pid) for pid in pids]
    time.sleep(seconds)
    used = [cpu_seconds(pid) - had for pid, had in zip(pids, before, strict=True)]
    return [each / (time.monotonic() - started) for each in used]


def test_silence_costs_nothing(ports: Ports, request: pytest.FixtureRequest) -> None:
    """Fifty listeners, and nothing happens. The clocks of processes are exact, so some seconds tell; the quietest of three
    times, since both agents see the machine's other programs connect, too."""
    ports.programs.listen(FIRST, 50)
    ports.wait(listening=50)
    time.sleep(2)  # what is still being confirmed
    shares = min((share_of_a_core(ports, seconds) for seconds in silences(request)), key=max)
    print(f"idle with 50 listeners: host agent {shares[0]:.3%}, guest agent {shares[1]:.3%} of a core")
    assert max(shares) < IDLE, shares
    ports.programs.close(FIRST, 50)
    ports.wait()


def test_more_listeners_than_are_forwarded(ports: Ports) -> None:
    """The limit is said, once and in the rows, and everything else goes on."""
    before = living(ports.host)
    ports.host.report()
    ports.programs.listen(FIRST, 10_000)
    said: list[str] = []

    def settled() -> bool:
        report = ports.host.report()
        said.extend(report["limits"])
        states: dict[str, int] = report["states"]
        return states == {"listening": MAX_FORWARDS, "pending": 10_000 - MAX_FORWARDS}

    eventually(settled, interval=0.2)
    assert said == [f"the VM listens on too many ports: {MAX_FORWARDS} are forwarded"]
    limited = f"the limit of {MAX_FORWARDS} forwards is reached"
    assert ports.host.report()["reasons"] == {"": MAX_FORWARDS, limited: 10_000 - MAX_FORWARDS}
    concurrently(FIRST, 10)
    ports.programs.close(FIRST, 5000)
    ports.wait(listening=MAX_FORWARDS, pending=5000 - MAX_FORWARDS)
    concurrently(FIRST + 5000, 10)
    ports.programs.close(FIRST + 5000, 5000)
    ports.wait()
    eventually(lambda: living(ports.host) == before)
