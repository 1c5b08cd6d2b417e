"""Many connections to one port, and what a process has of the machine; of a VM's ports as of others."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 60.0
"""Seconds for one connection on a machine that is busy with a thousand others."""
AT_A_TIME = 8
"""Short connections that overlap."""


@dataclass(frozen=True, slots=True)
class Usage:
    """``memory`` is what is resident, in bytes."""

    descriptors: int
    threads: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return cls(
            len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]), int(fields["VmRSS"].split()[0]) * 1024
        )


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used, exactly (clock_getcpuclockid(3): ``~pid << 3 | CPUCLOCK_SCHED``)."""
    return time.clock_gettime((~pid << 3) | 2)


def concurrently(port: int, count: int) -> None:
    """Have ``count`` connections at once; each must be answered while all of them are open."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            for _ in range(count)
        ]
        for number, client in enumerate(clients):
            client.sendall(b"%8d" % number)
        for number, client in enumerate(clients):
            assert client.recv(8, socket.MSG_WAITALL) == b"%8d" % number


def one_after_another(port: int, count: int) -> None:
    """``count`` short connections, ``AT_A_TIME`` at any moment; each must be answered and ended in order."""

    def connect(number: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            client.sendall(b"%8d" % number)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(8, socket.MSG_WAITALL) == b"%8d" % number
            assert client.recv(1) == b""

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for _ in pool.map(connect, range(count)):
            pass
