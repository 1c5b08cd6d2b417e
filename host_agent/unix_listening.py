"""Unix sockets of the host, put where nobody else listens.

The law: nobody but its owner can connect, at no moment; who finds its name finds somebody who listens. A stale name is
replaced.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from host_agent.binding import as_listener
from host_agent.errors import UserError
from host_agent.rules import MAX_UNIX_PATH

# Room for a burst while the accepting task is busy. The kernel cuts it to net.core.somaxconn (often 4096).
BACKLOG = 1024


def listen_unix(path: Path) -> trio.SocketListener:
    """Listen on a unix socket that only its owner may connect to, in place of a stale one if there is one.

    The socket gets its mode before it listens and its name after, so there is no moment at which a stranger
    could connect or the name leads nowhere.

    Raises:
        UserError: somebody answers at ``path``, something else than a socket is there, or it is too long.
        OSError: it cannot be created.
    """
    _check_unix_path(path)
    # Not longer than any reasonable socket name; the instance's lock keeps a second process away.
    temporary = path.with_name(f".{os.getpid()}")
    temporary.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _as_address(temporary) as address:
            sock.bind(address)
        temporary.chmod(0o600)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError:
        sock.close()
        temporary.unlink(missing_ok=True)
        raise
    return as_listener(sock)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file is there; None if there is none, or nobody can tell."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _check_unix_path(path: Path) -> None:
    """Raise UserError unless a socket may be put at ``path``."""
    if (length := len(os.fsencode(path))) > MAX_UNIX_PATH:
        raise UserError(
            f"the socket path {path} is too long: {length} bytes, of which the system allows {MAX_UNIX_PATH}",
            hint="set AGENTCTL_HOME to a directory with a shorter path",
        )
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UserError(f"{path} exists and is not a socket", hint="move it away and try again")
    if _answers(path):
        raise UserError(f"another process listens on {path}", hint="stop it and try again")


def _answers(path: Path) -> bool:
    """Whether a connection to ``path`` is accepted. A full backlog counts: somebody has it open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


@contextmanager
def _as_address(path: Path) -> Iterator[str]:
    """What bind(2) takes for ``path``: one that is too long by a few bytes is named through its folder (Linux)."""
    if len(os.fsencode(path)) <= MAX_UNIX_PATH or sys.platform != "linux":
        yield os.fspath(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
