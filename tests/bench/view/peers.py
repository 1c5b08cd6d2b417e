"""What ``agentctl view`` is compared with: ways to the files of a named volume in the VM, on this machine.

agentctl   ``agentctl view``, as a user has it, and cp(1) out of it
sshfs      the guest's volume by sshfs on this machine, as root over there, through a port of QEMU's user network; with
           Lima's options of ssh, as in the other benchmarks, and sshfs's own as they are
docker cp  of a container that has the volume; a copy is all that it does

The law: whatever a peer has mounted is taken off with the caller's stack.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench import processes, ssh
from tests.bench.files.report import OURS
from tests.bench.instance import Instance, InstanceFailed
from tests.bench.view.workloads import PeerFailed, output

SSHFS = "sshfs"
DOCKER_CP = "docker cp"
PEERS = (OURS, DOCKER_CP, SSHFS)

VOLUME = "bench"
IMAGE = "bench-nothing"
CONTAINER = "bench"

#: Seconds for a mount; an emulated guest starts a process of Python, or an sshd and its handshake.
MOUNT_TIME = 120.0

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
"""In the guest, by its path: what its sshd offers by which name is not the question."""


def obstacle(name: str) -> str:
    """Why this host cannot offer the peer ``name``, in a clause; empty if it can."""
    needed = {SSHFS: ("sshfs", "ssh", "ssh-keygen", "fusermount3"), OURS: ("fusermount3",), DOCKER_CP: ()}
    missing = [program for program in needed[name] if shutil.which(program) is None]
    return f"no {', '.join(missing)}" if missing else ""


class Volume:
    """A named volume with the tree in it, and a container that has it."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self.docker("volume", "create", VOLUME)
        self.path = self.docker("volume", "inspect", "-f", "{{.Mountpoint}}", VOLUME).strip()
        self.docker("import", "-", IMAGE, input=bytes(10_240))  # an empty archive
        self.docker("create", "--name", CONTAINER, "-v", f"{VOLUME}:/tree", IMAGE, "/nothing")

    def docker(self, *arguments: str, input: bytes = b"") -> str:
        """Raises ``InstanceFailed``."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=input,
            capture_output=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise InstanceFailed(f"docker {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode()

    def command(self, *arguments: str) -> list[str]:
        program = shutil.which("docker") or str(self._instance.home / "tools" / "bin" / "docker")
        return [program, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return self._instance.environment


class DockerCp:
    name = DOCKER_CP
    tree = None

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._environment = [f"{key}={value}" for key, value in volume.environment.items()]

    def renew(self) -> None:
        """It keeps nothing."""

    def copy(self, name: str, to: Path) -> None:
        command = self._volume.command("cp", "-q", f"{CONTAINER}:/tree/{name}", str(to))
        output("env", "-i", *self._environment, *command)


class Mount:
    """What both mounts have in common."""

    tree: Path

    def copy(self, name: str, to: Path) -> None:
        output("cp", "-r", f"{self.tree}/{name}", str(to))


class View(Mount):
    name = OURS

    def __init__(self, instance: Instance, stack: contextlib.ExitStack) -> None:
        self._instance = instance
        stack.callback(self._end)
        self.renew()

    def renew(self) -> None:
        self._end()
        try:
            shown = json.loads(self._instance.agentctl("view", "--json", timeout=MOUNT_TIME))
        except InstanceFailed as error:
            raise PeerFailed(str(error)) from None
        self.tree = Path(shown["path"], "volumes", VOLUME)
        _wait_for(self.tree)

    def _end(self) -> None:
        with contextlib.suppress(InstanceFailed):
            self._instance.agentctl("view", "--end", timeout=MOUNT_TIME)


class Sshfs(Mount):
    name = SSHFS

    def __init__(self, instance: Instance, volume: Volume, port: int, stack: contextlib.ExitStack) -> None:
        self.tree = instance.directory / "sshfs"
        self._log = instance.directory / "sshfs.log"
        self._source = f"root@127.0.0.1:{volume.path}"
        # A program, since sshfs takes what is between commas for options of its own.
        self._ssh = instance.directory / "sshfs-ssh"
        self._ssh.write_text(
            f'#!/bin/sh\nexec {shlex.join(ssh.options(ssh.authorize(instance), port))} "$@"\n'
        )
        self._ssh.chmod(0o700)
        self._process: subprocess.Popen[bytes] | None = None
        stack.callback(self._end)
        self.renew()

    def renew(self) -> None:
        self._end()
        self.tree.mkdir(exist_ok=True)
        words = [f"ssh_command={self._ssh}", f"sftp_server={SFTP_SERVER}"]
        self._process = _spawn(
            ["sshfs", "-f", self._source, str(self.tree), "-o", ",".join(words)], self._log
        )
        _wait_for(self.tree / "small")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            subprocess.run(["fusermount3", "-u", "-q", "-z", str(self.tree)], check=False, timeout=20)
            processes.end(process)


def _spawn(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as errors:
        return processes.spawn(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + MOUNT_TIME
    while not path.is_dir():
        if time.monotonic() > deadline:
            raise PeerFailed(f"{path} is not there after {MOUNT_TIME:.0f} s")
        time.sleep(0.05)
