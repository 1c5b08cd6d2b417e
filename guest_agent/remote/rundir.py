"""Where the processes of a session find each other: a folder of the user's, with a lock and a socket for each plane.

The law: the lock is the only proof of life (flock on one open file description, which whoever starts a daemon passes on
to it); who holds it stands in it. A folder that is removed takes its locks along, so a lock counts only while its file
still has its name. Nobody else may look into the folder, so whoever can connect is the user.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PLANES: Final = ("control", "files", "view")

SESSION_NAME: Final = re.compile(r"[a-z0-9-]{1,40}")

FOLDER: Final = ".cache/agentctl/run"
"""Below the home."""

SHARED_MEMORY: Final = Path("/dev/shm")
"""Files that are no disk's (shm_overview(7))."""

REMOVALS: Final = 10
"""Removals by others that are borne while a folder is made."""

MAX_HOLDER: Final = 64
"""Bytes of what stands in a lock."""


class RunDirError(Exception):
    """Why there can be no such folder, as a sentence."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this boot: its pid, and when it started (in ticks): the pid's next owner is not taken for it."""

    pid: int
    started: int

    @classmethod
    def current(cls) -> Process:
        return cls(os.getpid(), start_ticks(os.getpid()) or 0)

    def signal(self, number: signal.Signals) -> bool:
        """False if it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if start_ticks(self.pid) != self.started:
                return False
            signal.pidfd_send_signal(descriptor, number)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since the boot (proc_pid_stat(5)); None if there is none."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name is in brackets, and may have any of these in it.
    fields = content.rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


@dataclass(frozen=True, slots=True)
class RunDir:
    """The folder of one session."""

    path: Path

    @classmethod
    def of(cls, session: str, home: Path | None = None) -> RunDir:
        """Raises ``RunDirError`` for what is no session's name."""
        if not SESSION_NAME.fullmatch(session):
            raise RunDirError(f"{session!r} cannot be the name of a session")
        return cls((home or Path.home()) / FOLDER / session)

    def make(self) -> None:
        """Raises ``RunDirError``."""
        try:
            status = self._made()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise RunDirError(f"{self.path} is not a folder of this user")
            if status.st_mode & 0o077:
                self.path.chmod(0o700)
        except OSError as error:
            raise RunDirError(f"{self.path} cannot be made: {error.strerror}") from error

    def _made(self) -> os.stat_result:
        removals = 0
        while True:
            try:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                return self.path.lstat()
            except (FileNotFoundError, FileExistsError):  # it, or its parent, is just removed
                if removals == REMOVALS:
                    raise
                removals += 1

    def remove(self) -> None:
        """With all that is in it. Locks last: as long as there is one, who holds it is found."""
        with suppress(OSError):
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.suffix == ".lock"):
                entry.unlink()
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.fence.unlink()
        with suppress(OSError):
            self.path.parent.rmdir()  # of the last session

    @property
    def fence(self) -> Path:
        """Memory of the control agent and the files agent (``guest_agent.fence``). Not in the folder: what is mapped
        from the disk of a home may find that full, which kills. (A logout may remove the name; both have it mapped.)"""
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        return SHARED_MEMORY / f"agentctl-{os.geteuid()}-{name}"

    @property
    def ending(self) -> Place:
        """No plane: who has its lock ends the session, and no daemon is started meanwhile."""
        return Place(self.path, "ending")

    def plane(self, name: str) -> Place:
        return Place(self.path, name)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the daemon of one plane is found."""

    folder: Path
    plane: str

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.plane}.lock"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.plane}.log"

    def take_lock(self) -> int | None:
        """The lock, as a descriptor; None if somebody has it, or just removes the folder. Raises ``OSError``."""
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here, ours = os.stat(self.lock), os.fstat(descriptor)
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return None
        if (here.st_dev, here.st_ino) != (ours.st_dev, ours.st_ino):
            os.close(descriptor)
            return None
        os.truncate(descriptor, 0)  # whoever stood there has ended
        return descriptor

    def holder(self) -> Process | None:
        """Who holds the lock; None if nobody has said so (yet)."""
        try:
            words = self.lock.read_text()[:MAX_HOLDER].split()
            return Process(int(words[0]), int(words[1]))
        except (OSError, ValueError, IndexError):
            return None

    @contextmanager
    def address(self) -> Iterator[str]:
        """What bind(2) and connect(2) take for the socket. Named through its folder: a home's path may be longer than
        sockaddr_un has room for. Raises ``OSError``."""
        descriptor = os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}/{self.plane}.sock"
        finally:
            os.close(descriptor)

    def listen(self) -> socket.socket:
        """For whoever has the lock. Raises ``OSError``."""
        with self.address() as address:
            with suppress(FileNotFoundError):
                os.unlink(address)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(address)
                listener.listen()
            except OSError:
                listener.close()
                raise
        return listener


def write_holder(descriptor: int) -> None:
    """Say in a lock that this process holds it."""
    process = Process.current()
    os.pwrite(descriptor, f"{process.pid} {process.started}\n".encode(), 0)
