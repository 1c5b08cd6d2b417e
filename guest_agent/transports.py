"""How an agent reaches its host: a virtio-serial port as a trio stream, and the command line that names it.

The law: a port has no connections. While nobody holds the host's side of it, reading returns b"",
writing EAGAIN, and both poll ready (POLLHUP); none of that is an end of file. So it is waited out,
seldom enough to cost nothing and often enough to be there when the host is; only the port's own
disappearance breaks the stream. Nor is a port waited for by two at a time, one to read and one to write: poll(2) takes
what has come out of the ring, and what was used up out of the other, whatever it was asked; the interrupt that comes
then finds nothing, and wakes nobody up. So who waits to read may wait, and who wants to write tries again.
Behaviour: drivers/char/virtio_console.c, port_fops_read, _write and _poll; vring_interrupt.

Both agents' options are few and read by hand: importing argparse takes a tenth of a second in an emulated guest.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio

from protocol.serial import SocketPort

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 * 1024
SEND_BYTES = 32 * 1024
"""The driver copies what is written into one buffer of at most this size."""

BACKOFF_FIRST, BACKOFF_MOST = 0.02, 0.2
"""Seconds between attempts while the host side is not connected."""

FULL_FIRST = 0.002
"""The same while the host does not take what it is given: the ring has 128 buffers, of up to 32 KiB, and an emulated
guest's host takes 3 of these in that time. So more comes before the ring is empty."""

OPEN_RETRY = 0.1
"""Seconds between attempts to open: EBUSY while a killed predecessor still holds the port (the driver
lets in one), ENOENT before udev has named it."""

_OPEN_LATER = {errno.EBUSY, errno.ENOENT, errno.ENXIO, errno.ENODEV}

PORTS: Final = Path("/dev/virtio-ports")
"""Where udev names the ports."""

_USAGE: Final = """usage: python3 -m {module} [PORT | --connect-unix PATH]

  PORT                 a virtio-serial port (default: {port})
  --connect-unix PATH  a unix socket that stands in for the port

AGENTCTL_LOG=debug logs more."""

OpenTransport = Callable[[], Awaitable[trio.abc.Stream]]


class Backoff:
    """How long to wait after a call that came to nothing: from ``first`` seconds on, twice as long each time."""

    def __init__(self, first: float) -> None:
        self._first = self._seconds = first

    def reset(self) -> None:
        self._seconds = self._first

    async def wait(self) -> None:
        await trio.sleep(self._seconds)
        self._seconds = min(BACKOFF_MOST, self._seconds * 2)


class PortStream(trio.abc.Stream):
    """A stream over the non-blocking descriptor of a port, which it owns."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._sending = trio.Lock()
        self._send_backoff, self._receive_backoff = Backoff(FULL_FIRST), Backoff(BACKOFF_FIRST)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte, however long it takes. Raises ``BrokenResourceError`` if the port goes."""
        while True:
            # First: it is a checkpoint, and the only one that a read needs.
            await trio.lowlevel.wait_readable(self._open_fd())
            try:
                if data := os.read(self._open_fd(), max_bytes or RECEIVE_BYTES):
                    self._receive_backoff.reset()
                    return data
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"the port is gone: {error}") from error
            else:
                await self._receive_backoff.wait()

    def receive_nowait(self) -> bytes | None:
        """What has come; None if nothing has, or nobody is there, or the port is gone: ``receive_some`` knows."""
        try:
            return os.read(self._fd, RECEIVE_BYTES) or None
        except OSError:
            return None

    def fileno(self) -> int:
        return self._fd

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand everything to the port; waits while the host does not read or is not there."""
        await trio.lowlevel.checkpoint()
        async with self._sending:
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    sent += await self._send_some(view[sent : sent + SEND_BYTES])

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        """Hand ``data``, of ``SEND_BYTES`` at the most, to the port if it takes that now; False if not."""
        if self._sending.locked() or len(data) > SEND_BYTES:
            return False
        try:
            written = os.write(self._open_fd(), data)
        except BlockingIOError:
            return False
        except OSError as error:
            raise trio.BrokenResourceError(f"the port is gone: {error}") from error
        if written < len(data):  # the driver copies it whole
            raise trio.BrokenResourceError(f"the port took {written} of {len(data)} bytes")
        return True

    async def _send_some(self, data: memoryview) -> int:
        while True:
            try:
                count = os.write(self._open_fd(), data)
            except BlockingIOError:
                await self._send_backoff.wait()
            except OSError as error:
                raise trio.BrokenResourceError(f"the port is gone: {error}") from error
            else:
                self._send_backoff.reset()
                return count

    async def wait_send_all_might_not_block(self) -> None:
        """Nobody knows without trying, see above."""
        self._open_fd()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        await trio.lowlevel.checkpoint()

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise trio.ClosedResourceError("the port was closed")
        return self._fd


async def open_port(path: Path) -> PortStream:
    """Open a port, waiting until it exists and is free. Raises ``OSError`` for anything else."""
    waiting = False
    while True:
        try:
            return PortStream(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in _OPEN_LATER:
                raise
            if not waiting:
                log.warning("port.wait path=%s error=%s", path, error.strerror)
            waiting = True
        await trio.sleep(OPEN_RETRY)


async def open_unix(path: Path) -> SocketPort:
    """A unix socket that stands in for the port: the same bytes, without a VM. Raises ``OSError``."""
    return SocketPort(await trio.open_unix_socket(path))


def transport_of(arguments: Sequence[str], port: Path) -> OpenTransport | None:
    """The transport that a command line asks for, ``port`` if it says nothing; None if it makes no sense."""
    match arguments:
        case []:
            return partial(open_port, port)
        case ["--connect-unix", path]:
            return partial(open_unix, Path(path))
        case [path] if not path.startswith("-"):
            return partial(open_port, Path(path))
    return None


def run_agent(
    arguments: Sequence[str], module: str, port: Path, run: Callable[[OpenTransport], Awaitable[None]]
) -> int:
    """The whole of an agent's program: ``run`` over the transport that ``arguments`` ask for; its exit status."""
    open_transport = transport_of(arguments, port)
    if open_transport is None:
        print(_USAGE.format(module=module, port=port), file=sys.stderr)
        return 2
    level = logging.DEBUG if os.environ.get("AGENTCTL_LOG") == "debug" else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    trio.run(run, open_transport)
    return 0
