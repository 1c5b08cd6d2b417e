"""``connect``: hands the stdio of this process to the daemon of a plane, which is started if there is none.

The law: once it is handed over nothing here touches it, and this process ends when the daemon has done with it. A
process that only waits: it imports no trio, and is there in some tens of milliseconds.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from guest_agent.remote.handover import MAX_LINE, OTHER_BUILD, REFUSED, TAKEN, Offer
from guest_agent.remote.rundir import Place, RunDir, RunDirError
from protocol.build import digest

START_TIME: Final = 45.0
"""Seconds for a daemon to take what it is given: one that is in the way may have to end first, which takes up to 20."""

LOOK_AGAIN: Final = 0.05
"""Seconds between two attempts while another process starts a daemon, or a daemon ends."""

ATTEMPTS: Final = 3
"""Daemons that are started: one that dies as it starts may have been killed, three were not."""

VANISHED: Final = 10
"""Times that the folder goes while a daemon is started in it: so many ``end`` nobody asks for."""

TAIL: Final = 2000
"""Bytes of a daemon's log in which the reason for its end is looked for."""

_NOT_THE_DAEMONS: Final = ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "SSH_ORIGINAL_COMMAND", "SSH_AUTH_SOCK",
                           "NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "XDG_SESSION_ID")  # fmt: skip
"""Variables of a connection, or of a login, which a daemon outlives."""


class CannotConnect(Exception):
    """There is no daemon; the message is a sentence."""


def connect(session: str, plane: str, grace: float) -> None:
    """Returns when the daemon has done with our stdio. Raises ``CannotConnect``."""
    try:
        rundir = RunDir.of(session)
        offer = Offer(digest(), grace).encode()
        with _handed_over(rundir, rundir.plane(plane), offer) as connection:
            stay(connection)
    except ConnectionError:
        pass  # the daemon was killed, or the connection was lost before there was one
    except RunDirError as error:
        raise CannotConnect(str(error)) from error
    except OSError as error:
        raise CannotConnect(f"no agent could be started in {rundir.path}: {error.strerror}") from error


def stay(connection: socket.socket) -> None:
    """Until who has taken our stdio has done with it. Raises ``ConnectionError`` if it was killed."""
    _let_go_of_stdio()
    connection.settimeout(None)
    while connection.recv(MAX_LINE):
        pass


def _handed_over(rundir: RunDir, place: Place, offer: bytes) -> socket.socket:
    deadline = time.monotonic() + START_TIME
    started = vanished = 0
    while time.monotonic() < deadline:
        if is_hung_up():
            raise ConnectionAbortedError
        if (connection := hand_over(place, offer, deadline)) is not None:
            return connection
        try:
            rundir.make()
            if _is_being_ended(rundir) or (lock := place.take_lock()) is None:
                time.sleep(LOOK_AGAIN)
            elif started == ATTEMPTS:
                os.close(lock)
                raise CannotConnect(
                    f"the {place.plane} agent ends as soon as it is started: {_last_line(place.log)}"
                )
            else:
                started += 1
                _start(place, rundir.path.name, lock)
        except FileNotFoundError:
            vanished += 1
            if vanished == VANISHED:
                raise
            # The session was just ended, its folder with it: this one begins it anew.
    raise CannotConnect(f"the {place.plane} agent does not answer; its log is {place.log}")


def _is_being_ended(rundir: RunDir) -> bool:
    """Then what is started now would be ended, too."""
    if (lock := rundir.ending.take_lock()) is None:
        return True
    os.close(lock)
    return False


def is_hung_up() -> bool:
    """Whether nobody is at the other end of our stdio any more: then no agent is to be started for it."""
    poll = select.poll()
    poll.register(0, select.POLLRDHUP)
    poll.register(1, 0)
    gone = select.POLLHUP | select.POLLRDHUP | select.POLLERR | select.POLLNVAL
    return any(events & gone for _, events in poll.poll(0))


def hand_over(place: Place, offer: bytes, deadline: float) -> socket.socket | None:
    """Give our stdio to who listens there.

    The connection over which it was taken; None if nobody did. Raises ``CannotConnect`` if it was refused."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        with place.address() as address:
            connection.connect(address)
        socket.send_fds(connection, [offer], [0, 1])
        answer = connection.recv(MAX_LINE)
    except (OSError, TimeoutError):  # nobody is there, or not any more
        answer = b""
    if answer == TAKEN:
        return connection
    connection.close()
    if answer.startswith(REFUSED):
        raise CannotConnect(
            f"the {place.plane} agent refuses: {answer[len(REFUSED) :].decode(errors='replace').strip()}"
        )
    if answer == OTHER_BUILD:
        time.sleep(LOOK_AGAIN)
    return None


def _start(place: Place, session: str, lock: int) -> None:
    """Start the daemon, with the lock and the socket at which it is found: whoever connects from now on is heard."""
    program, environment = _program(Path(__file__).absolute().parents[2])
    with place.listen() as listener, open(place.log, "ab") as log:
        try:
            arguments = [place.plane, session, str(lock), str(listener.fileno())]
            # It goes on in a child of its own, so this one's end is the beginning.
            subprocess.run(
                [*program, "daemon", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                pass_fds=(lock, listener.fileno()),
                check=False,
            )
        finally:
            os.close(lock)


def _program(root: Path) -> tuple[list[str], dict[str, str]]:
    """The daemon's command line without its words, and its environment; ``root`` is where this package lies.

    Whatever the locale of a login is, names are UTF-8, as they are for the host.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_THE_DAEMONS}
    if (root / "__main__.py").is_file():  # the archive that a host sends, unpacked: it holds its folder
        return [sys.executable, "-IS", "-X", "utf8", str(root)], kept
    return [sys.executable, "-P", "-s", "-X", "utf8", "-m", "guest_agent.remote"], {
        **kept,
        "PYTHONPATH": str(root),
    }


def _let_go_of_stdio() -> None:
    """It is the daemon's alone now; what would still be written here goes nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)
    os.close(nothing)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
        if os.statvfs(log.parent).f_bavail == 0:
            return f"the disk of {log.parent} is full"
    except OSError as error:
        return str(error)
    return next((line.strip() for line in reversed(lines) if line.strip()), f"{log} is empty")
