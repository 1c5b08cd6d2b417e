"""The process of a file server, or of a view: started with its sockets, recorded for whoever comes after, and ended.

The law: it never outlives the ``with`` block that started it, since the end of its control socket is its own end, and
one that does not end by that is killed. The one of a host agent that was killed is found by its recorded identity.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Final

import trio

from host_agent.process import ProcessIdentity

logger = logging.getLogger(__name__)

PROGRAM: Final = (sys.executable, "-m", "host_agent.fileserver")

#: How long it may take to end when its control socket has ended, and to die when it is killed, seconds.
END_TIME = 5.0


@asynccontextmanager
async def started(
    argv: Sequence[str],
    log: Path,
    store: socket.socket | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[trio.Process, trio.SocketStream]]:
    """The process, which is given ``store``, and our end of its control socket. At the end it is told to end, and
    killed if it does not. ``environment``: other than ours.

    Raises ``OSError`` if it cannot be started.
    """
    ours, theirs = socket.socketpair()
    control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    async with control:
        with theirs, store or nullcontext():
            given = {"--control-fd": theirs.fileno(), **({"--store-fd": store.fileno()} if store else {})}
            process = await _open(argv, log, given, environment)
        try:
            yield process, control
        finally:
            with trio.CancelScope(shield=True):
                await control.aclose()
                await _end(process)


async def end_predecessor(identity: Path) -> None:
    """Wait for the file server of a host agent that was killed: two must not write one journal.

    It sees its control socket end, as ours would. Raises ``OSError`` if it cannot be ended.
    """
    predecessor = ProcessIdentity.read(identity)
    if predecessor is None:
        return
    with trio.move_on_after(END_TIME):
        await predecessor.wait()
        return
    predecessor.send_signal(signal.SIGKILL)
    with trio.move_on_after(END_TIME):
        await predecessor.wait()
        return
    raise OSError(errno.EBUSY, f"the one before it, pid {predecessor.pid}, does not end")


def record(pid: int, identity: Path) -> None:
    """For whoever comes after us. A full disk must not be what keeps the folders away: it is only logged."""
    try:
        ProcessIdentity.of_child(pid).write(identity)
    except OSError as error:
        logger.error("which process the file server is could not be saved: %s", error)


async def _open(
    argv: Sequence[str], log: Path, given: Mapping[str, int], environment: Mapping[str, str] | None
) -> trio.Process:
    # O_APPEND: when the log grew too large and is emptied, it goes on at its start.
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return await trio.lowlevel.open_process(
            [*argv, *(word for option, fd in given.items() for word in (option, str(fd)))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=list(given.values()),
            cwd="/",
            env=environment,
        )
    finally:
        os.close(output)


async def _end(process: trio.Process) -> None:
    with trio.move_on_after(END_TIME):
        await process.wait()
        return
    process.kill()
    with trio.move_on_after(END_TIME):
        await process.wait()
        return
    # It waits for a disk that does not answer, where no signal reaches it.
    logger.error("pid %d cannot be ended: %s", process.pid, process.args)
