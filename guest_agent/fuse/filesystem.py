"""One share's file system: each request of the kernel's, to who can answer it.

Whatever has no entry here is ENOSYS, which the kernel takes for "not needed" and asks no more (ACCESS, POLL,
BMAP, STATX, SYNCFS: what was written is on the host, or in a moment will be; OPENDIR: see ``listing``). So are OPEN
and FLUSH, unless locks are the host's: an open(2) and a close(2) of a file send nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final

from guest_agent.fuse import attributes, bodies, data, locks, names
from guest_agent.fuse.abi import Opcode, Request
from guest_agent.fuse.operation import Kernel, Operation, start
from guest_agent.fuse.volume import Volume


def _ioctl(volume: Volume, request: Request) -> bytes:
    """Python's open() asks for the terminal's settings (TCGETS): no file of ours is one."""
    raise OSError(errno.ENOTTY, "")


REMOTE: Final[dict[int, Callable[[Volume, Request], Operation]]] = {
    Opcode.LOOKUP: names.lookup,
    Opcode.GETATTR: attributes.getattr_,
    Opcode.SETATTR: attributes.setattr_,
    Opcode.READLINK: names.readlink,
    Opcode.SYMLINK: names.symlink,
    Opcode.MKNOD: names.mknod,
    Opcode.MKDIR: names.mkdir,
    Opcode.UNLINK: names.unlink,
    Opcode.RMDIR: names.rmdir,
    Opcode.RENAME: names.rename,
    Opcode.RENAME2: names.rename,
    Opcode.LINK: names.link,
    Opcode.OPEN: data.open_,
    Opcode.READ: data.read,
    Opcode.WRITE: data.write,
    Opcode.STATFS: attributes.statfs,
    Opcode.FSYNC: names.fsync,
    Opcode.FSYNCDIR: names.fsync,
    Opcode.SETXATTR: attributes.setxattr,
    Opcode.GETXATTR: attributes.getxattr,
    Opcode.LISTXATTR: attributes.listxattr,
    Opcode.REMOVEXATTR: attributes.removexattr,
    Opcode.FLUSH: data.flush,
    Opcode.READDIRPLUS: names.readdirplus,
    Opcode.GETLK: locks.getlk,
    Opcode.SETLK: locks.setlk,
    Opcode.SETLKW: locks.setlkw,
    Opcode.CREATE: names.create,
    Opcode.TMPFILE: names.tmpfile,
    Opcode.FALLOCATE: data.fallocate,
    Opcode.LSEEK: data.lseek,
    Opcode.COPY_FILE_RANGE: data.copy_file_range,
}
"""Answered by operations, which may ask the host."""

LOCAL: Final[dict[int, Callable[[Volume, Request], bytes | None]]] = {
    Opcode.FORGET: names.forget,
    Opcode.BATCH_FORGET: names.batch_forget,
    Opcode.RELEASE: data.release,
    Opcode.IOCTL: _ioctl,
}
"""Answered at once; None: not answered at all."""


class Filesystem:
    """Handles the requests of one connection, ``kernel``."""

    def __init__(self, kernel: Kernel, volume: Volume) -> None:
        self._kernel = kernel
        self._volume = volume
        volume.kernel = kernel

    def handle(self, request: Request) -> None:
        """Have ``request`` answered, now or later."""
        if (operation := REMOTE.get(request.opcode)) is not None:
            host = self._volume.host
            host.caller = request.pid
            start(operation(self._volume, request), self._kernel, request.unique)
            host.caller = 0
        elif (local := LOCAL.get(request.opcode)) is not None:
            self._answer(local, request)
        elif request.opcode == Opcode.INTERRUPT:
            self._interrupt(request)
        else:
            self._kernel.fail(request.unique, errno.ENOSYS)

    def _interrupt(self, request: Request) -> None:
        """Not answered itself. The request that it is about may be, long before its operation has ended."""
        unique = bodies.parse_interrupt(request.body)
        self._volume.interrupt(unique, partial(self._kernel.fail, unique, errno.EINTR))

    def _answer(self, local: Callable[[Volume, Request], bytes | None], request: Request) -> None:
        try:
            reply = local(self._volume, request)
        except OSError as error:
            self._kernel.fail(request.unique, error.errno or errno.EIO)
        else:
            if reply is not None:
                self._kernel.reply(request.unique, reply)
