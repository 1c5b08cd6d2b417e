"""The process of a plane: the agent of a VM, with a door in the place of a port.

The law: what it was started with (lock, socket, log) is its whole tie to who started it. It is in a session of its
own, in the root folder, and has nothing of any connection but what it is handed.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Awaitable
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from guest_agent.remote.door import Door
from guest_agent.remote.logfile import StderrLog
from guest_agent.remote.rundir import RunDir, write_holder
from guest_agent.transports import OpenTransport
from protocol.build import digest
from protocol.packedport import PackedPort

log = logging.getLogger(__name__)

FIRST_GRACE: Final = 60.0
"""Seconds for who started it to connect, which says how long to wait for the next."""

MAX_FILES: Final = 65536
"""Descriptors, if the machine lets us: as many as in a VM (agentctl-agent.service)."""


PACKED: Final = ("files", "view")
"""Planes whose host may be far away from so many bytes that packing them pays."""


class Run(Protocol):
    def __call__(self, open_transport: OpenTransport, *, vm: bool) -> Awaitable[None]: ...


def main(plane: str, session: str, lock: int, listener: int) -> int:
    """Begin, and go on in a process of its own: this one's end (0) says that it has begun."""
    if os.fork():
        return 0
    status = 1
    try:
        os.setsid()
        os.chdir("/")
        for fd in (lock, listener):
            os.set_inheritable(fd, False)
        write_holder(lock)
        _raise_limit()
        rundir = RunDir.of(session)
        _begin_log(rundir.plane(plane).log)
        with socket.socket(fileno=listener) as listening:
            trio.run(_serve, _agent_of(plane, rundir.fence), listening, plane in PACKED)
        status = 0
    except BaseException:
        log.exception("daemon.failed plane=%s", plane)
    finally:
        logging.shutdown()
        os._exit(status)


async def _serve(run: Run, listener: socket.socket, packed: bool) -> None:
    async with trio.open_nursery() as nursery:
        door = Door(listener, digest(), FIRST_GRACE)
        nursery.start_soon(door.run)

        async def open_packed() -> PackedPort:
            return PackedPort(await door.open_transport())

        await run(open_packed if packed else door.open_transport, vm=False)
        nursery.cancel_scope.cancel()


def _agent_of(plane: str, fence: Path) -> Run:
    # Imported here: neither process needs what the other does.
    if plane == "files":
        from guest_agent import files

        return partial(files.run, fence=fence)
    if plane == "view":
        from guest_agent.view import agent as view

        return view.run
    from guest_agent import agent

    return partial(agent.run, fence=fence)


def _begin_log(path: Path) -> None:
    level = logging.DEBUG if os.environ.get("AGENTCTL_LOG") == "debug" else logging.INFO
    handler = StderrLog(path)
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", handlers=[handler]
    )
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    log.info("daemon.begin pid=%d", os.getpid())


def _raise_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
