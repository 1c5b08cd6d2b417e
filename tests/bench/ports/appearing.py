"""How long a listener of the guest takes to be on localhost, and a closed one to be gone.

    python -m tests.bench.ports.appearing [--cycles N] [--ports N] [--json FILE]

In a VM of its own, deleted afterwards. From the return of listen(2), or close(2), in the guest, by the guest's clock,
to the first connect(2) on the host that succeeds, or is refused. How the two clocks differ is asked before each cycle,
as NTP does: the sample with the shortest way there and back is right to half of that. There is no peer: what else there
is polls by the second.

Exit status: 0, or 1 when the VM fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from host_agent.boot import find_qemu
from host_agent.errors import UserError
from tests.bench import instance as instances
from tests.bench import processes, program
from tests.bench.instance import Instance, InstanceFailed
from tests.bench.machine import Devices
from tests.bench.ports import client, peers
from tests.bench.program import say
from tests.free_ports import free_port

# Each line is a command and ports; the answer is the clock right after it was done.
SERVER = """
import socket, sys, time
listeners = {}
for line in sys.stdin:
    word, *ports = line.split()
    for port in ports:
        if word == "listen":
            listeners[port] = socket.create_server(("127.0.0.1", int(port)))
        else:
            listeners.pop(port).close()
    print(time.monotonic_ns(), flush=True)
"""

PATIENCE = 30.0
"""Seconds after which a port is not coming, or going, any more."""

PAUSE = 0.0005
"""Seconds between two looks: what is measured is longer, and QEMU has these CPUs, too."""

ASKED = 5
"""Times that the guest's clock is asked before each cycle."""


@dataclass(frozen=True, slots=True)
class Clock:
    """``offset``: seconds that the host's monotonic clock is ahead of the guest's; right to ``error``."""

    offset: float
    error: float


def clock(exchanges: Sequence[tuple[float, float, float]]) -> Clock:
    """From exchanges of (asked at, the guest's time, answered at), in seconds."""
    asked, said, answered = min(exchanges, key=lambda exchange: exchange[2] - exchange[0])
    return Clock((asked + answered) / 2 - said, (answered - asked) / 2)


@dataclass(frozen=True, slots=True)
class Cycle:
    """Seconds. ``error``: by how much both may be wrong."""

    appeared: float
    vanished: float
    error: float


class Guest:
    """The program in the guest."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def tell(self, word: str, *ports: int) -> float:
        """Have it done; when it was, by the guest's clock, in seconds."""
        self._stdin.write(" ".join([word, *map(str, ports)]).encode() + b"\n")
        self._stdin.flush()
        if not (answer := self._stdout.readline()):
            raise InstanceFailed("the program in the guest has ended")
        return int(answer) / 1e9

    def clock(self) -> Clock:
        exchanges = []
        for _ in range(ASKED):
            asked = time.monotonic()
            exchanges.append((asked, self.tell("listen"), time.monotonic()))
        return clock(exchanges)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.connect(("127.0.0.1", port))
        except ConnectionRefusedError:
            return False
    return True


def until(condition: Callable[[], bool]) -> float:
    """When it holds, by the host's clock."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise InstanceFailed(f"a port did not follow the guest within {PATIENCE:g} s")
        time.sleep(PAUSE)
    return time.monotonic()


def cycle(guest: Guest, port: int) -> Cycle:
    compared = guest.clock()
    listened = guest.tell("listen", port) + compared.offset
    opened = until(lambda: is_open(port))
    closed = guest.tell("close", port) + compared.offset
    refused = until(lambda: not is_open(port))
    return Cycle(max(0.0, opened - listened), max(0.0, refused - closed), compared.error)


def all_at_once(guest: Guest, ports: Sequence[int]) -> float:
    """Seconds from the last listen(2) until each port can be reached."""
    compared = guest.clock()
    listened = guest.tell("listen", *ports) + compared.offset
    waiting = list(ports)

    def none_is_missing() -> bool:
        while waiting and is_open(waiting[-1]):
            waiting.pop()
        return not waiting

    took = until(none_is_missing) - listened
    guest.tell("close", *ports)
    return max(0.0, took)


@contextlib.contextmanager
def in_guest(instance: Instance, log: Path) -> Iterator[Guest]:
    process = instance.spawn_in_guest("python3", "-c", SERVER, log=log)
    try:
        yield Guest(process)
    finally:
        processes.end(process)


def measure(work: Path, cycles: int, count: int) -> tuple[list[Cycle], float]:
    ports = peers.Ports.choose()
    arguments = ["--cpus", "2", "--memory", "2GiB", "--disk", "20GiB", "--mount", "none"]
    say("starting the VM")
    with instances.running(work, Devices(str(find_qemu()), ports.of_qemu), arguments) as instance:
        with in_guest(instance, work / "appearing.log") as guest:
            port = free_port()
            cycle(guest, port)  # the first one finds everything cold
            say(f"{cycles} cycles of one port")
            found = [cycle(guest, port) for _ in range(cycles)]
            say(f"{count} ports at once")
            several: set[int] = set()
            while len(several) < count:
                several.add(free_port())
            return found, all_at_once(guest, sorted(several))


def report(cycles: Sequence[Cycle], count: int, together: float) -> str:
    lines = []
    for name, times in (
        ("listen to reachable", [each.appeared for each in cycles]),
        ("close to refused", [each.vanished for each in cycles]),
    ):
        middle, late = (client.percentile(times, part) * 1e3 for part in (0.5, 0.99))
        lines.append(f"{name:20}  p50 {middle:6.1f} ms  p99 {late:6.1f} ms")
    lines.append(f"{count} ports at once    all reachable after {together:.2f} s")
    error = client.percentile([each.error for each in cycles], 0.5)
    lines.append(
        f"{len(cycles)} cycles; the clocks of host and guest are compared to {error * 1e3:.1f} ms (p50)"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ports.appearing")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--ports", type=int, default=200, help="that are opened at once")
    parser.add_argument("--json", type=Path, help="where to write every sample")
    parser.add_argument("--work", type=Path, help="directory to work in (default ~/.cache/agentctl-bench)")
    chosen = parser.parse_args(arguments)
    program.end_on_signals()
    try:
        with program.directory(chosen.work) as work:
            cycles, together = measure(work, chosen.cycles, chosen.ports)
    except (InstanceFailed, UserError, KeyboardInterrupt) as error:
        print(error or "interrupted", file=sys.stderr)
        return 1
    print(report(cycles, chosen.ports, together))
    if chosen.json:
        samples = {"cycles": [asdict(each) for each in cycles], "together": together, **program.host()}
        chosen.json.write_text(json.dumps(samples) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
