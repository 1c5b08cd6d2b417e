"""``check``: what the agents can do on this machine as this user; and of what they cannot, what is in the way.

The law: what is said was tried, since a device file, a group or a setuid bit alone proves nothing (in a container none
of them does). Everything that is missing has a sentence and a fix, and the rest works without it.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import shutil
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from guest_agent.fuse import mounting
from guest_agent.fuse.mounting import MountError, MountSpec

FORMAT: Final = 1

WORD: Final = "agentctl-check"

TRACEFS: Final = Path("/sys/kernel/tracing")

DOCKER_TIME: Final = 2.0
"""Seconds for Docker's socket to accept; its backlog is the kernel's, so it does at once."""


@dataclass(frozen=True, slots=True)
class Mounts:
    ok: bool
    how: str = ""
    allow_other: bool = False
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Docker:
    socket: str = ""
    problem: str = ""
    fix: str = ""


def line(nonce: str) -> str:
    """The answer. ASCII, so that no locale is in its way."""
    return f"{WORD} {nonce} {json.dumps(capabilities(), ensure_ascii=True)}"


def capabilities() -> dict[str, Any]:
    root = os.geteuid() == 0
    mounts, docker = find_mounts(root), find_docker()
    problems = [{"what": found.problem, "fix": found.fix} for found in (mounts, docker) if found.problem]
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "executable": sys.executable,
        "uid": os.geteuid(),
        "user": user_name(),
        "home": str(Path.home()),
        "root": root,
        "kernel": os.uname().release,
        "hostname": os.uname().nodename,
        "mounts": asdict(mounts),
        "ports": {"how": "tracefs" if root and _has_tracefs() else "polling"},
        "docker": asdict(docker),
        "problems": problems,
    }


def user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _has_tracefs() -> bool:
    """Or could have: the agent mounts it if it is not there."""
    return os.access(TRACEFS / "instances", os.W_OK) or (TRACEFS.is_dir() and not any(TRACEFS.iterdir()))


# --- Docker ------------------------------------------------------------------------------------------------


def docker_sockets() -> list[Path]:
    """Where Docker listens, the user's own first (rootless, Docker's documentation)."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return [Path(runtime, "docker.sock"), Path("/run/docker.sock"), Path("/var/run/docker.sock")]


def find_docker(sockets: list[Path] | None = None) -> Docker:
    """The first socket that lets us in, or why none does; no Docker at all is no problem."""
    refused = Docker()
    for path in docker_sockets() if sockets is None else sockets:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(DOCKER_TIME)
                probe.connect(str(path))
        except PermissionError:
            refused = Docker(
                problem=f"{user_name()} may not use Docker there ({path})",
                fix=f"there: sudo usermod -aG docker {user_name()}, and log in again",
            )
        except OSError:
            continue
        else:
            return Docker(str(path))
    return refused


# --- mounts --------------------------------------------------------------------------------------------------


def find_mounts(root: bool) -> Mounts:
    if root:
        return _try_as_root()
    program = shutil.which("fusermount3")
    if program is None:
        return Mounts(
            False,
            problem="fusermount3 is not installed there, so this machine's folders cannot be mounted",
            fix="there: sudo apt-get install fuse3",
        )
    return Mounts(True, "fusermount3")


def _try_as_root() -> Mounts:
    """Mount something that nobody serves, and take it off again."""
    with tempfile.TemporaryDirectory(prefix="agentctl-") as folder:
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            try:
                mounting.mount(fd, MountSpec(0, folder))
                mounting.unmount(folder, force=True)
            finally:
                os.close(fd)
        except OSError as error:
            return _failed(f"/dev/fuse cannot be used there: {error.strerror}", "there: modprobe fuse")
        except MountError as error:
            return _failed(
                f"mounting is not permitted there: {error}", "in a container: give it CAP_SYS_ADMIN"
            )
    return Mounts(True, "root", allow_other=True)


def _failed(problem: str, fix: str) -> Mounts:
    return Mounts(False, problem=problem, fix=fix)
