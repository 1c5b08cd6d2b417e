"""The wake-up: a private tracefs instance in which only edges of the set of listeners show up, and the kernel's word
about UDP sockets that were closed.

The law: idle costs nothing. Every accepted connection also passes through LISTEN->SYN_RECV, so the
filter takes the edges into LISTEN and from LISTEN to CLOSE and no others. An edge into LISTEN is
logged before the socket is hashed, where a dump would miss it; so ``listen()`` returning counts, too.
A bind(2) is seen of any protocol: where reading UDP's truth is in vain, it is done less and less often.
Measured from ``listen()`` to a readable pipe: 0.5-3 ms, also in an emulated guest.

An instance has its own ring buffer and switches: other users of tracing neither see it nor disturb
it. In the VM the initrd makes it (provision/guest/usr/lib/agentctl/init), and it stays: each agent takes it
over from the one before. Elsewhere an agent makes its own. That one outlives a process that is killed, so
whoever starts next removes the leftovers; an instance whose pipe somebody reads is busy and stays.

Why the VM's stays: switching events on or off patches the kernel's code while other CPUs run it, and QEMU
before 8.1 may then run a translation of the half patched code for ever when it emulates ("Oops: int3"; seen
after 6 of an agent's lives).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import select
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from guest_agent.edges import NOTHING, Edge, EdgeReader, Known, concerns
from guest_agent.listeners import ALL_PROTOS, Protos
from guest_agent.udp_closes import open_closes, read_closes
from protocol.api import Proto

log = logging.getLogger(__name__)

TRACEFS = Path("/sys/kernel/tracing")
BOOT_INSTANCE = "agentctl-ports"
"""The instance that the VM's initrd makes, for the agent that has its folder locked."""
PREFIX = "agentctl-ports-"
"""Of the instances that agents make."""
BUFFER_KIB = 64
"""Ring buffer per CPU, some 500 edges. What is overwritten has already woken the reader."""
READ_BYTES = 65536

EVENTS = (
    "sock/inet_sock_set_state",
    "syscalls/sys_exit_listen",
    "syscalls/sys_enter_bind",
    "syscalls/sys_exit_bind",
)
STATE_FILTER = "(protocol == 6 || protocol == 262) && (newstate == 10 || (oldstate == 10 && newstate == 7))"
"""6 is TCP, 262 MPTCP (Go's default for listeners since 1.24); 10 is TCP_LISTEN, 7 TCP_CLOSE."""

BIND_FILTER = "addrlen >= 16 && addrlen != 110"
"""sockaddr_in has 16 bytes and sockaddr_in6 28, and callers may say more; sockaddr_nl has 12, sockaddr_un often 110."""

VAIN_PAUSE, VAIN_PAUSE_LONGEST = 0.05, 1.0
"""Seconds from a read of UDP's truth that showed nothing new to the next: doubled each time, none after a change."""

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO (include/linux/proc_ns.h): the trace's pids are those of this namespace."""


def remove_leftovers(instances: Path) -> None:
    """Remove the instances of killed predecessors. One that is in use is busy, and stays."""
    for path in instances.glob(f"{PREFIX}*"):
        with suppress(OSError):
            path.rmdir()


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance in use: its folder, a non-blocking fd of its pipe, and, of the VM's own, the fd that locks it."""

    path: Path
    pipe: int
    lock: int | None = None

    def close(self) -> None:
        """Let go of the VM's own instance, which stays as it is; remove one that an agent made."""
        os.close(self.pipe)
        if self.lock is not None:
            os.close(self.lock)
            return
        try:
            self.path.rmdir()
        except OSError as error:
            log.warning("tracefs.leftover path=%s error=%s", self.path, error)


def open_instance(root: Path = TRACEFS, boot_instance: str = BOOT_INSTANCE) -> Instance:
    """The VM's own instance if there is one and it is free, or else a new one.

    Raises ``OSError`` where there is no tracefs, no permission, or a kernel without these events.
    """
    instances = root / "instances"
    if not instances.is_dir() and os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(root)], check=False, capture_output=True)
    return _take_over(instances / boot_instance) or _make(instances)


def _take_over(path: Path) -> Instance | None:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Instance(path, _configure(path), lock)
    except BlockingIOError:  # an agent that is about to end has it
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise


def _make(instances: Path) -> Instance:
    remove_leftovers(instances)
    path = instances / f"{PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
    path.mkdir(mode=0o700)
    try:
        return Instance(path, _configure(path))
    except OSError:
        with suppress(OSError):
            path.rmdir()
        raise


def _configure(path: Path) -> int:
    # The pipe first: an open pipe is what tells other starters that this instance is in use. What is on already is
    # switched on again at no cost, and without patching anything.
    fd = os.open(path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        (path / "buffer_size_kb").write_text(str(BUFFER_KIB))
        (path / "events/sock/inet_sock_set_state/filter").write_text(STATE_FILTER)
        (path / "events/syscalls/sys_enter_bind/filter").write_text(BIND_FILTER)
        for event in EVENTS:
            (path / "events" / event / "enable").write_text("1")
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

    def __init__(self, fd: int, closes: socket.socket, foreign: Callable[[int], bool]) -> None:
        self._fd = fd
        self._closes = closes
        self._foreign = foreign
        self._edges = EdgeReader()
        self._waiting: Protos = NOTHING
        self._udp_pause = 0.0
        self._udp_from = -math.inf
        self._both = select.epoll()  # waits for both at once; it is itself a descriptor that one can wait for
        self._both.register(fd, select.EPOLLIN)
        self._both.register(closes, select.EPOLLIN)

    def close(self) -> None:
        """Nobody may be waiting."""
        self._both.close()

    async def wait(self, known: Known) -> Protos:
        """Return once something may have changed, with the protocols. Raises ``OSError`` if the pipe breaks."""
        while True:
            self._waiting |= self._drain(known)
            if ready := self._due():
                self._waiting -= ready
                return ready
            with trio.move_on_at(self._udp_from if self._waiting else math.inf):
                await trio.lowlevel.wait_readable(self._both.fileno())

    def _due(self) -> Protos:
        return self._waiting if trio.current_time() >= self._udp_from else self._waiting - {Proto.UDP}

    def settle(self, read: Protos, changed: Protos) -> None:
        """Leave longer pauses while reading UDP's truth is in vain."""
        if Proto.UDP in read:
            vain = Proto.UDP not in changed
            self._udp_pause = min(VAIN_PAUSE_LONGEST, max(VAIN_PAUSE, 2 * self._udp_pause)) if vain else 0.0
            self._udp_from = trio.current_time() + self._udp_pause

    def _drain(self, known: Known) -> Protos:
        """Read all there is, so that a burst is one wake-up; which protocols any of it matters to."""
        woken = self._concerned(read_closes(self._closes), known)
        while True:
            try:
                data = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                return woken
            if not data:
                raise OSError(errno.EIO, "tracing was switched off")
            woken |= self._concerned(self._edges.receive_data(data), known)

    def _concerned(self, edges: list[Edge | None], known: Known) -> Protos:
        woken = NOTHING
        for edge in edges:
            if woken != ALL_PROTOS:
                woken |= concerns(edge, known, self._foreign)
        return woken


@asynccontextmanager
async def open_wakes(root: Path = TRACEFS) -> AsyncIterator[TraceWakes]:
    """Wake-ups from an instance that exists as long as the block. Raises ``OSError`` as ``open_instance``.

    Making an instance and removing it may take a while: it is done in a thread.
    """
    instance = await trio.to_thread.run_sync(open_instance, root)
    try:
        with open_closes() as closes, closing(TraceWakes(instance.pipe, closes, namespace_check())) as wakes:
            yield wakes
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(instance.close)
