"""``check``: what the agents can do on this machine as this user; and of what they cannot, what is in the way.

The law: what is said was tried, since a device file, a group or a setuid bit alone proves nothing (in a container none
of them does). Everything that is missing has a sentence and a fix, and the rest works without it.
"""

from __future__ import annotations

import os
import platform
import pwd
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from guest_agent.fuse import fusermount, mounting
from guest_agent.fuse.mounting import MountError, MountSpec
from protocol.capabilities import Capabilities, Docker, Mounts, Problem

WORD: Final = "agentctl-check"

TRACEFS: Final = Path("/sys/kernel/tracing")

DOCKER_TIME: Final = 2.0
"""Seconds for Docker's socket to accept; its backlog is the kernel's, so it does at once."""


def line(nonce: str) -> str:
    """The answer."""
    return f"{WORD} {nonce} {capabilities().to_json()}"


def ssh_port() -> int:
    """The port of this machine that its host came in by (SSH_CONNECTION of sshd(8)); 0 if nobody says."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return int(words[3]) if len(words) == 4 and words[3].isdecimal() else 0


def capabilities() -> Capabilities:
    root = os.geteuid() == 0
    mounts, docker = find_mounts(root), find_docker()
    problems = [Problem(found.problem, found.fix) for found in (mounts, docker) if found.problem]
    problems += unseen_by_containers(mounts, docker) + kills_processes(root)
    return Capabilities(
        python=platform.python_version(),
        uid=os.geteuid(),
        user=user_name(),
        home=str(Path.home()),
        root=root,
        kernel=os.uname().release,
        mounts=mounts,
        ports="tracefs" if root and _has_tracefs() else "polling",
        docker=docker,
        problems=tuple(problems),
        ssh_port=ssh_port(),
    )


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
    """By mounting something that nobody serves, and taking it off again."""
    obstacle = None if root else fusermount.obstacle()
    if obstacle is not None:
        return Mounts(
            False, problem=f"no folder can be mounted there: {obstacle.problem}", fix=f"there, {obstacle.fix}"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="agentctl-") as folder:
            _try_to_mount(folder)
    except MountError as error:
        return _failed(str(error), "in a container, give it CAP_SYS_ADMIN" if root else "see fusermount3(1)")
    except OSError as error:
        return _failed(
            f"{error.filename}: {error.strerror}", "there: modprobe fuse; in a container, give it /dev/fuse"
        )
    if root:
        return Mounts(True, "root", allow_other=True)
    return Mounts(True, "fusermount3", fusermount.may_allow_other())


def _try_to_mount(folder: str) -> None:
    fd, _ = mounting.mount_afresh(MountSpec(0, folder))
    try:
        mounting.unmount(folder, force=True)
    finally:
        os.close(fd)


def _failed(reason: str, fix: str) -> Mounts:
    return Mounts(False, problem=f"no folder can be mounted there: {reason}", fix=fix)


# --- other things ------------------------------------------------------------------------------------------


def unseen_by_containers(mounts: Mounts, docker: Docker) -> list[Problem]:
    """Docker's processes are another user's, to whom the kernel does not show a mount of ours."""
    if not mounts.ok or mounts.allow_other or not docker.socket:
        return []
    fix = f"there: echo user_allow_other | sudo tee -a {fusermount.CONFIGURATION}"
    return [Problem("containers there do not see what is mounted", fix)]


def kills_processes(root: bool, folder: Path = Path("/etc/systemd")) -> list[Problem]:
    """systemd may end what a login leaves behind (logind.conf(5)); root's is left alone."""
    if root:
        return []
    said = "no"
    for path in (folder / "logind.conf", *sorted(folder.glob("logind.conf.d/*.conf"))):
        with suppress(OSError):
            for line in path.read_text(errors="replace").splitlines():
                name, _, value = line.partition("=")
                if name.strip() == "KillUserProcesses":
                    said = value.strip().lower()
    if said not in ("1", "yes", "y", "true", "t", "on"):
        return []
    what = "the agents there end with each loss of the connection, and mounts with them (KillUserProcesses)"
    return [Problem(what, f"there: set KillUserProcesses=no in {folder}/logind.conf")]
