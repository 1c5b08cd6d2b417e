"""Whether a program of the host has a file open for writing: then it may change by stores into memory, which nobody is
told of (fcntl(2), F_SETLEASE).

The kernel gives a read lease only on a file that nobody has open for writing, and that includes whoever still has it
mapped. The lease is given back at once. A program that opens the file for writing meanwhile waits for that, some
microseconds; one that does so with O_NONBLOCK gets EWOULDBLOCK.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import signal

_SILENT = signal.SIGURG


class Writers(enum.Enum):
    """Who has a file open for writing. ``UNKNOWN``: it cannot be told, because the file is somebody else's (only its
    owner gets a lease), or because its filesystem has no leases."""

    NONE = enum.auto()
    SOME = enum.auto()
    UNKNOWN = enum.auto()


def writers(descriptor: int) -> Writers:
    """Of the file behind a descriptor that is open for reading only, which several threads may ask about at a time.
    One of this process's that is open for writing counts as well. Raises ``OSError`` for what is no such descriptor."""
    try:
        # A lease that is broken is told by SIGIO unless something else is asked for, and SIGIO ends a process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, _SILENT)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return Writers.SOME
        if error.errno in (errno.EACCES, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            return Writers.UNKNOWN
        raise
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        # Another thread that asked by the same descriptor has given the lease of both back.
        if error.errno != errno.EAGAIN:
            raise
    return Writers.NONE
