"""``agentctl disk``: asked of the host agent if the instance runs, done here if it does not.

The law: nobody but QEMU touches a disk that a VM has open, so what is done here is done with the instance's locks held
and after a look for a QEMU that has outlived its host agent. e2fsck(8) may take as long as it needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

from host_agent import disks, groups, state
from host_agent.client import RESTART_TIME, connected
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Host
from host_agent.disk_room import allocated
from host_agent.disk_upkeep import GROW_TIME, TRIM_TIME, at_rest, check_growth, whole
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from protocol.api import ChangeDisk, CompactDisk, Disk, GetDisk, Request
from protocol.errors import ErrorCode, RemoteFailure

T = TypeVar("T")

#: How often it is looked whether another command is ready with the instance, seconds.
INTERVAL: Final = 0.2

#: Seconds beyond the host agent's own limits, so that its sentence comes first.
SLACK: Final = 30.0


def show(paths: InstancePaths) -> Disk:
    """How it is. Raises ``UserError``."""
    if state.is_locked(paths.lock):
        return groups.run(_ask, paths, GetDisk(), SLACK)
    _require_instance(paths)
    return at_rest(paths, _size(paths))


def grow(paths: InstancePaths, size: int) -> Disk:
    """Make it ``size`` bytes large, at once. Raises ``UserError``, ``RemoteFailure``, ``OSError``."""
    return _whether_running(paths, lambda: _grow_running(paths, size), lambda: _grow_at_rest(paths, size))


def compact(paths: InstancePaths) -> Disk:
    """Give back what it does not need. Raises ``UserError``, ``RemoteFailure``, ``OSError``."""
    return _whether_running(
        paths,
        lambda: groups.run(_ask, paths, CompactDisk(), TRIM_TIME + SLACK),
        lambda: _compact_at_rest(paths),
    )


async def grow_while_running(paths: InstancePaths, size: int) -> tuple[str, ...]:
    """For ``up``: the disk of an instance that runs is to have ``size`` bytes. Warnings, if it stays as it is."""
    try:
        await _ask(paths, ChangeDisk(size), GROW_TIME + SLACK)
    except RemoteFailure as error:
        return (f"{error.message}{f'; {error.hint}' if error.hint else ''}",)
    except UserError as error:
        return (f"{error.message}; {error.hint}",)
    return ()


def _whether_running(paths: InstancePaths, running: Callable[[], T], resting: Callable[[], T]) -> T:
    _require_instance(paths)
    while True:
        if state.is_locked(paths.lock):
            return running()
        with state.locked(paths.up_lock) as ours:
            if ours and not state.is_locked(paths.lock):
                if ProcessIdentity.read(paths.qemu_identity):
                    raise UserError(
                        "the VM runs on without its host agent, and has its disk",
                        "take it over: agentctl up, or end it: agentctl stop",
                        ExitCode.BUSY,
                    )
                return resting()
        time.sleep(INTERVAL)  # it is just being started


def _require_instance(paths: InstancePaths) -> None:
    if not paths.directory.exists():
        raise UserError("there is no such instance", "make it: agentctl up", ExitCode.NOT_RUNNING)


async def _ask(paths: InstancePaths, request: Request[Disk], timeout: float) -> Disk:
    async with connected(paths, patience=RESTART_TIME) as link:
        try:
            return await link.request(request, timeout=timeout)
        except RemoteFailure as error:
            if error.code is not ErrorCode.UNSUPPORTED:
                raise
            raise UserError(
                "the running instance is of an older agentctl", "restart it: agentctl restart"
            ) from None


def _grow_running(paths: InstancePaths, size: int) -> Disk:
    # Here as well as there, since a refusal of this kind has an exit code of its own.
    check_growth(show(paths).size, whole(size))
    return groups.run(_ask, paths, ChangeDisk(size), GROW_TIME + SLACK)


def _size(paths: InstancePaths) -> int:
    """What is configured; the disk itself may be larger, and is what counts then."""
    configured = configuration.load(paths, Host.measure()).disk
    try:
        return max(configured, paths.data_disk.stat().st_size)
    except OSError:
        return configured


def _grow_at_rest(paths: InstancePaths, size: int) -> Disk:
    """The file now, what is in it when the VM starts."""
    size = whole(size)
    check_growth(_size(paths), size)
    configuration.update(paths, lambda: replace(configuration.load(paths, Host.measure()), disk=size))
    if paths.data_disk.exists():
        disks.grow_data_disk(paths.data_disk, size)
    return at_rest(paths, size)


def _compact_at_rest(paths: InstancePaths) -> Disk:
    if not paths.data_disk.exists():
        return at_rest(paths, _size(paths))
    program = shutil.which("e2fsck", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise UserError(
            "e2fsck is missing", "install it: sudo apt-get install e2fsprogs", ExitCode.DEPENDENCY
        )
    before = allocated(paths.data_disk)
    done = subprocess.run(
        [program, "-f", "-p", "-E", "discard", str(paths.data_disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    # 1: something was corrected; from 4 on something is left to do (e2fsck(8)).
    if done.returncode not in (0, 1):
        words = (done.stderr.strip() or done.stdout.strip() or str(done.returncode)).splitlines()
        raise UserError(
            f"the disk could not be looked through: {words[-1]}",
            "start the VM, which repairs it if it can: agentctl up",
        )
    disk = at_rest(paths, _size(paths))
    return replace(disk, given_back=max(0, before - disk.allocated))
