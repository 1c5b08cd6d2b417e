"""The wake-up: a private tracefs instance in which only edges of the set of listeners show up.

The law: idle costs nothing. Every accepted connection also passes through LISTEN->SYN_RECV, so the
filter takes the edges into LISTEN and from LISTEN to CLOSE and no others. An edge into LISTEN is
logged before the socket is hashed, where a dump would miss it; so ``listen()`` returning counts, too.
Measured from ``listen()`` to a readable pipe: 0.5-3 ms, also in an emulated guest.

An instance has its own ring buffer and switches: other users of tracing neither see it nor disturb
it. It outlives a process that is killed, so whoever starts next removes the leftovers; an instance
whose pipe somebody reads is busy and stays.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from guest_agent.edges import EdgeReader, matters

log = logging.getLogger(__name__)

TRACEFS = Path("/sys/kernel/tracing")
PREFIX = "agentctl-ports-"
BUFFER_KIB = 64
"""Ring buffer per CPU, some 500 edges. What is overwritten has already woken the reader."""
READ_BYTES = 65536

STATE_FILTER = "(protocol == 6 || protocol == 262) && (newstate == 10 || (oldstate == 10 && newstate == 7))"
"""6 is TCP, 262 MPTCP (Go's default for listeners since 1.24); 10 is TCP_LISTEN, 7 TCP_CLOSE."""

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO (include/linux/proc_ns.h): the trace's pids are those of this namespace."""


def remove_leftovers(instances: Path) -> None:
    """Remove the instances of killed predecessors. One that is in use is busy, and stays."""
    for path in instances.glob(f"{PREFIX}*"):
        with suppress(OSError):
            path.rmdir()


def open_instance(root: Path = TRACEFS) -> tuple[Path, int]:
    """Make an instance; returns its folder and a non-blocking fd of its pipe.

    Raises ``OSError`` where there is no tracefs, no permission, or a kernel without these events.
    """
    instances = root / "instances"
    if not instances.is_dir() and os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(root)], check=False, capture_output=True)
    remove_leftovers(instances)
    path = instances / f"{PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
    path.mkdir(mode=0o700)
    try:
        return path, _configure(path)
    except OSError:
        with suppress(OSError):
            path.rmdir()
        raise


def _configure(path: Path) -> int:
    # The pipe first: an open pipe is what tells other starters that this instance is in use.
    fd = os.open(path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        (path / "buffer_size_kb").write_text(str(BUFFER_KIB))
        (path / "events/sock/inet_sock_set_state/filter").write_text(STATE_FILTER)
        (path / "events/sock/inet_sock_set_state/enable").write_text("1")
        (path / "events/syscalls/sys_exit_listen/enable").write_text("1")
    except OSError:
        os.close(fd)
        raise
    return fd


def namespace_check() -> Callable[[int], bool]:
    """A function that says of a pid whether it is certainly in another network namespace than we."""
    if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
        return lambda pid: False
    own = os.stat("/proc/self/ns/net").st_ino

    def foreign(pid: int) -> bool:
        try:
            return os.stat(f"/proc/{pid}/ns/net").st_ino != own
        except OSError:
            return False  # it has gone; its namespace is not known

    return foreign


class TraceWakes:
    """Waits for edges that matter."""

    detection = "tracefs"
    confirm_after = 0.05
    """An edge may precede the hashing of its socket, and the process be off the CPU in between."""

    def __init__(self, fd: int, foreign: Callable[[int], bool]) -> None:
        self._fd = fd
        self._foreign = foreign
        self._edges = EdgeReader()

    async def wait(self, known_ports: Collection[int]) -> None:
        """Return once something may have changed. Raises ``OSError`` if the pipe breaks."""
        while not self._drain(known_ports):
            await trio.lowlevel.wait_readable(self._fd)

    def settle(self, changed: bool) -> None:
        """Nothing to adapt: the kernel says when."""

    def _drain(self, known_ports: Collection[int]) -> bool:
        """Read all there is, so that a burst is one wake-up; True if any of it matters."""
        woken = False
        while True:
            try:
                data = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                return woken
            if not data:
                raise OSError(errno.EIO, "tracing was switched off")
            edges = self._edges.receive_data(data)
            woken = woken or any(matters(edge, known_ports, self._foreign) for edge in edges)


@asynccontextmanager
async def open_wakes(root: Path = TRACEFS) -> AsyncIterator[TraceWakes]:
    """Wake-ups from an instance that exists as long as the block. Raises ``OSError`` as ``open_instance``.

    Switching events on and off patches kernel code and may take a while: it is done in a thread.
    """
    path, fd = await trio.to_thread.run_sync(open_instance, root)
    try:
        yield TraceWakes(fd, namespace_check())
    finally:
        trio.lowlevel.notify_closing(fd)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove_instance, path, fd)


def _remove_instance(path: Path, fd: int) -> None:
    os.close(fd)
    try:
        path.rmdir()
    except OSError as error:
        log.warning("tracefs.leftover path=%s error=%s", path, error)
