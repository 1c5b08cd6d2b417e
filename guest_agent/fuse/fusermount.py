"""Mounting without being root: libfuse's program, which is allowed to because it is setuid.

The laws:
- It decides, not we: where it may mount (a directory that its caller owns, or may write to), which options, how many.
  What it says is what the user is told.
- ``allow_other`` only where the machine's owner permits it (/etc/fuse.conf), and never without ``default_permissions``:
  what the kernel has been promised it shows without asking anybody.
- It may wait for whoever serves a path on its way: blocking, with a time limit, and never on the thread that serves.

Sources: fusermount3(1), mount.fuse3(8); util/fusermount.c of libfuse for _FUSE_COMMFD, the Unix socket on which it
hands the opened device over. fusermount of libfuse 2 is called in the same way.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAMS: Final = ("fusermount3", "fusermount")

PLACES: Final = "/usr/bin:/bin:/usr/local/bin:/usr/sbin:/sbin:/run/wrappers/bin"
"""Looked in besides PATH, which sshd may have left short; the last is where NixOS has what is setuid."""

CONFIGURATION: Final = Path("/etc/fuse.conf")
DEVICE: Final = Path("/dev/fuse")

TIMEOUT: Final = 50.0
"""Seconds; less than ``mounting.CHILD_TIMEOUT``, so that a child in which it runs still says why."""

_COMMFD: Final = "_FUSE_COMMFD"


class Refused(Exception):
    """What the program said, without its name."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why nothing can be mounted here by an ordinary user, and what to do about it, both a sentence."""

    problem: str
    fix: str


def find() -> str | None:
    """The program's path."""
    search = os.pathsep.join(filter(None, (os.environ.get("PATH"), PLACES)))
    return next((found for name in PROGRAMS if (found := shutil.which(name, path=search))), None)


def may_allow_other(configuration: Path = CONFIGURATION) -> bool:
    """Whether an ordinary user may show a mount to others: to the containers of a dockerd that is root, for one."""
    try:
        lines = configuration.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.partition("#")[0].strip() == "user_allow_other" for line in lines)


def obstacle(device: Path = DEVICE, status: Path = Path("/proc/self/status")) -> Obstacle | None:
    """What is in the way of an ordinary user's mounts, as far as it can be seen without mounting anything."""
    program = find()
    if program is None:
        return Obstacle(
            "fusermount3, with which ordinary users mount, is not installed",
            "install it: sudo apt-get install fuse3 (the package is called fuse3 nearly everywhere)",
        )
    if not device.exists():
        return Obstacle(f"there is no {device}", "load the kernel's module: sudo modprobe fuse")
    if not os.access(device, os.R_OK | os.W_OK):
        return Obstacle(f"you may not open {device}", f"let everybody: sudo chmod 666 {device}")
    if not _is_privileged(program):
        return Obstacle(f"{program} is not setuid root", f"make it so: sudo chmod u+s {program}")
    if not _has_name():
        return Obstacle(
            f"you have no name there (no entry of /etc/passwd for {os.getuid()}), which {program} asks for",
            "give that user one, or log in as another",
        )
    if _has_no_new_privileges(status):
        return Obstacle(
            "this login is not allowed to use setuid programs (no_new_privs)",
            "use a login that is, or log in as root",
        )
    return None


def _is_privileged(program: str) -> bool:
    """Setuid root; or with capabilities, as some distributions have it."""
    try:
        status = os.stat(program)
        if status.st_uid == 0 and status.st_mode & stat.S_ISUID:
            return True
        return bool(os.getxattr(program, "security.capability"))
    except OSError:
        return False


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _has_no_new_privileges(status: Path) -> bool:
    try:
        return "\nNoNewPrivs:\t1\n" in status.read_text()
    except OSError:
        return False


def options(source: str, kind: str, *, read_only: bool) -> str:
    """What ``mount`` is to be told. ``kind`` is a filesystem type as mountinfo has it, ``fuse.SUBTYPE``."""
    said = ["nosuid", "nodev", "default_permissions", f"fsname={source}", f"subtype={kind.partition('.')[2]}"]
    said += ["ro"] if read_only else []
    said += ["allow_other"] if may_allow_other() else []
    return ",".join(said)


def mount(path: str, said: str, keeper: socket.socket) -> None:
    """Mount at ``path``, a directory; the device that serves it is sent to the other end of ``keeper``.

    Raises ``Refused``.
    """
    _run(["-o", said, "--", path], keeper)


def take(ours: socket.socket) -> int:
    """The device, from the socket whose other end ``mount`` was given; the caller owns it. Raises ``Refused``."""
    ours.settimeout(TIMEOUT)
    try:
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise Refused(f"the device was not handed over: {error}") from error
    if not descriptors:
        raise Refused("the device was not handed over")
    return descriptors[0]


def unmount(path: str) -> None:
    """Take the mount off ``path``, lazily. Raises ``Refused``."""
    _run(["-u", "-z", "--", path])


def _run(arguments: list[str], keeper: socket.socket | None = None) -> None:
    program = find()
    if program is None:
        raise Refused("fusermount3 is not installed")
    environment = {**os.environ, "LC_ALL": "C"}
    descriptors = []
    if keeper is not None:
        environment[_COMMFD] = str(keeper.fileno())
        descriptors = [keeper.fileno()]
    try:
        done = subprocess.run(
            [program, *arguments],
            env=environment,
            pass_fds=descriptors,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"{program} did not end within {TIMEOUT:g} s") from None
    except OSError as error:
        raise Refused(f"{program}: {error.strerror}") from error
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().rpartition("\n")[2]
        raise Refused(said.partition(": ")[2] or said or f"{program} failed with status {done.returncode}")
