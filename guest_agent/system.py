"""The guest as a machine: its name, clock, default user, figures and end.

The law: the host sends its configuration once a session, so taking it again is cheap and changes
nothing. Every file is below ``root``; what only a kernel can do is in ``Kernel``.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from guest_agent.accounts import check, ensure_user, write_atomically
from guest_agent.clock import TOLERANCE_NS
from protocol.api import (
    Configure,
    Configured,
    Done,
    GetGuestInfo,
    GetHostKeys,
    GuestInfo,
    HostKeys,
    Shutdown,
)
from protocol.errors import ErrorCode, RpcError
from protocol.link import Service

log = logging.getLogger(__name__)

HOST_NAME = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9-]{1,63})*")
"""RFC 1123, and Linux's limit of 64 (HOST_NAME_MAX)."""

DATA = "var/lib/agentctl"
"""Where a VM has its data disk."""


@dataclass(frozen=True, slots=True)
class DataPlace:
    """The folder whose filesystem counts as the machine's disk; ``own``: only if that is mounted there."""

    path: str
    own: bool

    def find(self, root: Path) -> Path | None:
        """Below ``root``; None if it is not there."""
        path = root / self.path
        return path if path.is_mount() or (not self.own and path.is_dir()) else None


IN_VM = DataPlace(DATA, own=True)
HERE = DataPlace("", own=False)
"""Of a machine that has no disk of ours: where its root is."""

AUTHORIZED_KEYS = "etc/agentctl/authorized_keys"
"""Not in a home: homes are durable and the user's own, the keys are this session's."""

HOST_KEYS = f"{DATA}/ssh"
"""Where a VM's sshd has them (sshd_config.d/agentctl.conf): on the data disk."""

ANSWER_FIRST = 0.2
"""Seconds between answering a shutdown and beginning it."""


class Kernel:
    """What cannot be done to a folder."""

    def set_hostname(self, name: str) -> None:
        socket.sethostname(name)

    def now_ns(self) -> int:
        return time.time_ns()

    def set_clock(self, now_ns: int) -> None:
        time.clock_settime_ns(time.CLOCK_REALTIME, now_ns)

    async def power_off(self) -> None:
        await trio.run_process(["systemctl", "--no-block", "poweroff"])


class System:
    """Answers ``Configure``, ``GetHostKeys``, ``GetGuestInfo`` and ``Shutdown``."""

    def __init__(
        self,
        nursery: trio.Nursery,
        port_detection: Callable[[], str],
        root: Path = Path("/"),
        kernel: Kernel | None = None,
        *,
        port_dumps: Callable[[], int] = lambda: 0,
        data: DataPlace = IN_VM,
    ) -> None:
        self._nursery = nursery
        self._port_detection = port_detection
        self._port_dumps = port_dumps
        self._root = root
        self._data = data
        self._kernel = kernel or Kernel()
        self.default_user = ""
        """The configured user's name in the guest; empty (whoever we run as) until there is one."""

    def register(self, service: Service) -> None:
        """What changes the machine; ``guest_info`` is offered of any."""
        service.on_request(Configure, self.configure)
        service.on_request(GetHostKeys, self.host_keys)
        service.on_request(Shutdown, self.shutdown)

    async def configure(self, request: Configure) -> Configured:
        """Take the host's configuration. ``RpcError`` INVALID for one that makes no sense, with nothing
        done; DENIED where the agent may not (it is not root)."""
        try:
            _check(request)
        except ValueError as error:
            raise RpcError(ErrorCode.INVALID, str(error)) from error
        try:
            step = self._set_clock(request.clock_ns)
            await trio.to_thread.run_sync(self._apply, request)
        except PermissionError as error:
            raise RpcError(ErrorCode.DENIED, f"the guest agent may not: {error}") from error
        except OSError as error:
            raise RpcError(ErrorCode.INTERNAL, f"configuring the guest failed: {error}") from error
        log.info("system.configured user=%s clock_step_ms=%d", self.default_user, step // 1_000_000)
        return Configured(clock_step_ns=step)

    def _apply(self, request: Configure) -> None:
        self._set_hostname(request.hostname)
        self.default_user = ensure_user(self._root, request.user, request.uid).name
        keys = "".join(f"{key}\n" for key in request.authorized_keys)
        write_atomically(self._root / AUTHORIZED_KEYS, keys)

    def _set_clock(self, host_ns: int) -> int:
        """Step the clock to the host's if it is far off; returns by how much it moved, in ns."""
        step = host_ns - self._kernel.now_ns()
        if abs(step) <= TOLERANCE_NS:
            return 0
        self._kernel.set_clock(host_ns)
        return step

    def _set_hostname(self, name: str) -> None:
        self._kernel.set_hostname(name)
        write_atomically(self._root / "etc/hostname", f"{name}\n")
        hosts = self._root / "etc/hosts"
        before = (
            hosts.read_text().splitlines() if hosts.exists() else ["127.0.0.1 localhost", "::1 localhost"]
        )
        kept = [line for line in before if line.split()[:1] != ["127.0.1.1"]]
        # 127.0.1.1: Debian's address for a host's own name (Debian reference, 5.1.1).
        write_atomically(hosts, "\n".join([*kept, f"127.0.1.1 {name}"]) + "\n")

    async def host_keys(self, request: GetHostKeys) -> HostKeys:
        """Those of its sshd; none before the data disk is mounted, and its key there."""
        folder = self._root / HOST_KEYS
        return HostKeys([path.read_text().strip() for path in sorted(folder.glob("ssh_host_*_key.pub"))])

    async def guest_info(self, request: GetGuestInfo) -> GuestInfo:
        """Figures from /proc and the data disk, read when asked."""
        memory = read_meminfo((self._root / "proc/meminfo").read_text())
        total, free = self._data_disk()
        return GuestInfo(
            kernel=os.uname().release,
            uptime=float((self._root / "proc/uptime").read_text().split()[0]),
            memory_total=memory["MemTotal"],
            memory_available=memory["MemAvailable"],
            cpus=len(os.sched_getaffinity(0)),
            data_total=total,
            data_free=free,
            port_detection=self._port_detection(),
            port_dumps=self._port_dumps(),
        )

    def _data_disk(self) -> tuple[int, int]:
        path = self._data.find(self._root)
        if path is None:
            return 0, 0
        disk = os.statvfs(path)
        return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize

    async def shutdown(self, request: Shutdown) -> Done:
        """Answer, then power off: systemd stops the containers, then this agent."""
        self._nursery.start_soon(self._power_off)
        return Done()

    async def _power_off(self) -> None:
        await trio.sleep(ANSWER_FIRST)
        log.info("system.poweroff")
        try:
            await self._kernel.power_off()
        except Exception as error:  # the agent lives on, and the host will see that the guest does
            log.error("system.poweroff error=%r", error)


def read_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes, by name (proc_meminfo(5); its kB are KiB)."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _check(request: Configure) -> None:
    check(request.user, request.uid)
    if not HOST_NAME.fullmatch(request.hostname):
        raise ValueError(f"{request.hostname!r} cannot be the name of a host")
    if any("\n" in key or "\0" in key for key in request.authorized_keys):
        raise ValueError("an authorized key is one line")
    if request.clock_ns <= 0:
        raise ValueError("the host's clock stands before 1970")
