"""One FUSE connection: requests read from /dev/fuse on trio's thread, replies written from anywhere.

The laws:
- The descriptor is non-blocking; reading waits for readiness, then drains, ``BATCH`` requests at most
  before other tasks have their turn. Where requests are read to is the ``Landing``'s business.
- A reply is one write, which never waits, in any order and from any thread.
- A handler that raises costs its caller EIO and us a line in the log, never the loop.
- Nothing here touches the mount itself: a process that waits for its own answer ends in D state, and with
  the descriptor in its hands cannot even be killed.

Behaviour of the device: fs/fuse/dev.c (fuse_dev_do_read, fuse_dev_do_write).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import trio

from guest_agent.fdstore import StoredConnection
from guest_agent.fuse import abi, mounting
from guest_agent.fuse.abi import Negotiated, Opcode, Request
from guest_agent.fuse.landing import Landing
from guest_agent.fuse.mounting import MountSpec
from protocol.lane import READABLE, Lane

log = logging.getLogger(__name__)

BATCH = 64
"""Requests answered in a row. Trio's own turn costs some 300 us in an emulated guest, a request about as much."""

LOOK_AGAIN = 16
"""Who asks one thing after another never has a second request there, and a vain look for one is a system call and
an exception. So after a vain look the next batches are of one request, and only each so-manieth looks again."""

_OVER = {errno.ENODEV, errno.ECONNABORTED, errno.EBADF}
"""Unmounted; aborted where ABORT_ERROR was agreed on; closed by us."""
_AGAIN = {errno.EINTR, errno.ENOENT}
"""A signal; a request that was taken back by its caller while it was being read."""
_GONE = {errno.ENOENT, errno.ENODEV, errno.EPERM, errno.EBADF}
"""Of a reply: its caller has left, or the whole connection has, or we have closed it."""

Handle = Callable[[Request], None]


class Connection:
    """A mount's connection with the kernel. It owns its descriptor."""

    def __init__(
        self, fd: int, spec: MountSpec, negotiated: Negotiated | None = None, device: int = 0
    ) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.spec = spec
        self.device = device
        """The minor number of the mount's superblock (its major is 0)."""
        self.negotiated = negotiated
        """None until the kernel's INIT was answered."""
        self.initialized = trio.Event()
        """Set with ``negotiated``; of an adopted connection from the start."""
        self._resent: set[int] = set()
        self._alone = 0
        """Batches of one request in a row."""
        self._on_close: Callable[[], None] | None = None
        if negotiated is not None:
            self.initialized.set()

    @classmethod
    def mount(cls, spec: MountSpec) -> Connection:
        """Mount ``spec``. Blocking, for a worker thread: the path may lead through mounts that we serve.

        Raises ``mounting.MountError``. The mount answers nobody until ``serve`` runs.
        """
        fd, device = mounting.mount_afresh(spec)
        return cls(fd, spec, None, device)

    @classmethod
    def adopt(
        cls, fd: int, spec: MountSpec, negotiated: Negotiated | None = None, device: int = 0
    ) -> Connection:
        """Take over a connection that a server before us had, with what it had ``negotiated`` (None: it died
        before it answered INIT, which then comes again). ``resend`` gets back what it had not answered."""
        return cls(fd, spec, negotiated, device)

    def stored_as(self) -> StoredConnection:
        """What a successor must know of it, for ``fdstore.store``."""
        minor, flags = (self.negotiated.minor, self.negotiated.flags) if self.negotiated else (0, 0)
        return StoredConnection(self.spec.share, self.device, minor, flags, self.spec.host_locks)

    async def serve(self, handle: Handle, landing: Landing | None = None, lane: Lane | None = None) -> None:
        """Read requests and pass them to ``handle`` until the file system is unmounted or aborted.

        ``landing`` is where they arrive, which all connections of a process share, and so may be the ``lane`` on which
        they are read. ``handle`` is called on trio's thread and must answer each request, then or later, with
        ``reply`` or ``fail``; not those of ``abi.NO_REPLY``. INIT and DESTROY are answered here.
        """
        landing = Landing() if landing is None else landing
        if lane is None:
            while await self._drain(landing, handle):
                pass
        else:
            await self._serve_in_lane(landing, handle, lane)
        log.info("fuse.end path=%s", self.spec.path)

    async def _serve_in_lane(self, landing: Landing, handle: Handle, lane: Lane) -> None:
        over = trio.Event()
        failures: list[OSError] = []
        fd = self.fd

        def on_readable(ready: int) -> None:
            try:
                if self._take_batch(landing, handle):
                    return
            except OSError as error:
                failures.append(error)
            end()

        def end() -> None:
            lane.forget(fd)
            over.set()

        try:
            lane.watch(fd, READABLE, on_readable)
        except (OSError, ValueError):
            return  # closed already
        self._on_close = end
        try:
            await over.wait()
        finally:
            self._on_close = None
            lane.forget(fd)
        if failures:
            raise failures[0]

    async def _drain(self, landing: Landing, handle: Handle) -> bool:
        """One batch, when there is something; False if there will be no more."""
        try:
            await trio.lowlevel.wait_readable(self.fd)
        except (trio.ClosedResourceError, OSError):
            return False
        return self._take_batch(landing, handle)

    def _take_batch(self, landing: Landing, handle: Handle) -> bool:
        """Handle what there is to read, up to a batch; False if there will be no more."""
        fd = self.fd
        for taken in range(BATCH):
            if taken == 1 and self._alone % LOOK_AGAIN:
                self._alone += 1
                return True  # if there is more, it is readable still
            try:
                request = landing.read(fd)
            except BlockingIOError:
                if taken == 1:
                    self._alone += 1
                return True
            except OSError as error:
                if error.errno in _AGAIN:
                    continue
                if error.errno in _OVER:
                    return False
                raise
            if taken:
                self._alone = 0
            self._dispatch(request, handle)
        return True

    def _dispatch(self, request: Request, handle: Handle) -> None:
        if request.resent:
            self._resent.add(request.unique)
        try:
            if request.opcode == Opcode.INIT:
                self._init(request)
            elif request.opcode == Opcode.DESTROY:
                self.reply(request.unique)
            else:
                handle(request)
        except Exception:
            log.exception("fuse.handler request=%r", request)
            if request.run is not None and request.run.slots:
                request.run.give_back()
            if request.opcode not in abi.NO_REPLY:
                self.fail(request.unique, errno.EIO)

    def _init(self, request: Request) -> None:
        major, minor, _, flags = abi.parse_init(request.body)
        wanted = abi.WANTED | (abi.WANTED_FOR_LOCKS if self.spec.host_locks else 0)
        try:
            negotiated = abi.negotiate(major, minor, flags, wanted)
        except abi.Unsupported as error:
            log.error("fuse.init path=%s error=%s", self.spec.path, error)
            return self.fail(request.unique, errno.EPROTO)
        self.reply(request.unique, abi.init_out(negotiated))
        self.negotiated = negotiated
        self.initialized.set()
        log.info("fuse.init path=%s minor=%d flags=%#x", self.spec.path, negotiated.minor, negotiated.flags)
        return None

    # --- answers: from any thread, never waiting -----------------------------------------------------

    def reply(self, unique: int, *buffers: bytes | bytearray | memoryview) -> None:
        """Answer a request with the concatenation of ``buffers``. That nobody waits for it any more is normal."""
        size = 16
        for buffer in buffers:
            size += len(buffer)
        self._answer(unique, [abi.OUT_HEADER.pack(size, 0, self._on_wire(unique)), *buffers])

    def fail(self, unique: int, error: int) -> None:
        """Answer a request with an errno (positive). One that is none of Linux's becomes EIO."""
        if not 0 < error < 512:
            error = errno.EIO
        self._answer(unique, [abi.OUT_HEADER.pack(16, -error, self._on_wire(unique))])

    def _on_wire(self, unique: int) -> int:
        if self._resent and unique in self._resent:
            self._resent.discard(unique)
            return unique | abi.RESEND_BIT
        return unique

    def _answer(self, unique: int, buffers: list[bytes | bytearray | memoryview]) -> None:
        try:
            os.writev(self.fd, buffers)
        except OSError as error:
            # The kernel has ended a request whose answer it could not use (EINVAL) with EIO.
            if error.errno not in _GONE:
                log.warning("fuse.reply unique=%d size=%d error=%s", unique, sum(map(len, buffers)), error)

    # --- notifications: they may wait for inode and page locks ---------------------------------------

    def inval_inode(self, node: int, offset: int = 0, length: int = 0) -> None:
        """Drop a node's cached data and attributes; that it has none is normal. Blocks while pages are locked,
        so until requests are answered: see ``notifier``."""
        self.notify(abi.inval_inode(node, offset, length))

    def inval_entry(self, parent: int, name: bytes) -> None:
        """Drop a cached name; that there is none is normal. Blocks while the directory is locked."""
        self.notify(abi.inval_entry(parent, name))

    def notify(self, notification: bytes) -> None:
        """Write a notification of ``abi``. Raises ``OSError``, but not where the kernel knows no such thing."""
        with suppress(FileNotFoundError):
            os.write(self.fd, notification)

    def resend(self) -> bool:
        """Ask for everything again that was read and not answered; never blocks. False if the kernel
        cannot (before Linux 6.9): such requests stay unanswered until the mount is aborted."""
        try:
            os.write(self.fd, abi.RESEND)
        except OSError as error:
            log.warning("fuse.resend path=%s error=%s", self.spec.path, error.strerror)
            return False
        return True

    # --- the end ---------------------------------------------------------------------------------------

    def unmount(self) -> None:
        """Take the mount off its path; it ends when its last user has. Blocking as ``mount``."""
        mounting.unmount(self.spec.path)

    def abort(self) -> None:
        """End it now: whoever uses it gets ENOTCONN, whoever waits ECONNABORTED. Blocking as ``mount``."""
        mounting.unmount(self.spec.path, force=True)

    def close(self) -> None:
        """Give the descriptor up. If it is the last one, the kernel aborts the connection."""
        if self.fd >= 0:
            if self._on_close is not None:
                self._on_close()
            fd, self.fd = self.fd, -1
            with suppress(RuntimeError):  # outside of trio nobody waits for it
                trio.lowlevel.notify_closing(fd)
            os.close(fd)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
