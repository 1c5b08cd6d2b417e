"""A machine with a real sshd and Debian's Python, on this one's kernel: namespaces of its own, and users of its own.

What listens in it is on nobody else's localhost, what is mounted in it nobody else sees, and when its first process is
killed, whatever still ran in it has ended. Only root can make one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.files.namespace import FORCE_DETACH, UNTIL_WE_END, Finished, Running, Stuck
from tests.free_ports import free_port
from tests.remote.keys import Keys

INIT = Path(__file__).with_name("machine_init.py")
PYTHON: Final = "/usr/bin/python3"
NEEDED: Final = ("sshd", "ssh-keygen", "unshare", "nsenter", "setpriv", "fusermount3")

USER: Final = "dev"
"""The machine's ordinary user."""
UID: Final = 61_234

HOMES: Final = {"root": (0, "/mnt/root"), USER: (UID, f"/mnt/{USER}")}

CONFIG: Final = """
Port {port}
ListenAddress 127.0.0.1
HostKey /run/sshd/host_key
AuthorizedKeysFile .ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
MaxStartups 100
"""


def missing() -> str:
    """Why there can be no machine here, as a sentence; empty if there can."""
    if os.geteuid() != 0:
        return "only root makes a machine with users of its own"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if not Path(PYTHON).exists():
        absent.append(PYTHON)
    return f"needs {', '.join(absent)}" if absent else ""


class Machine:
    """``door`` leads to its sshd. ``homes_size``: bytes that there are for its users' homes, 0 for plenty. ``hide``: programs
    that it does not have. ``port``: of its sshd, on its own loopback."""

    def __init__(self, directory: Path, keys: Keys, *, homes_size: int = 0, hide: Sequence[str] = ()) -> None:
        self.door = directory / "door"
        self.port = free_port()
        self._keys = keys
        self._homes_size, self._hide = homes_size, hide

    def __enter__(self) -> Machine:
        command = [
            "unshare",
            "--net",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--mount-proc",
        ]
        command += ["--kill-child", PYTHON, "-I", str(INIT)]
        self._unshare = subprocess.Popen(
            [*UNTIL_WE_END, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        assert self._unshare.stdin is not None
        assert self._unshare.stdout is not None
        with self._unshare.stdin as stdin:
            stdin.write(json.dumps(self._description()).encode())
        if self._unshare.stdout.readline() != b"ready\n":
            self.__exit__(None, None, None)
            raise AssertionError("the machine did not come up")
        pid = self._unshare.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        return self

    def _description(self) -> dict[str, object]:
        passwd = [f"{name}:*:{uid}:{uid}::{home}:/bin/bash" for name, (uid, home) in HOMES.items()]
        passwd += [
            line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")
        ]
        group = [*Path("/etc/group").read_text().splitlines(), f"{USER}:x:{UID}:"]
        return {
            "door": str(self.door),
            "port": self.port,
            "etc": {"passwd": "\n".join(passwd) + "\n", "group": "\n".join(group) + "\n"},
            "keys": {"sshd_config": CONFIG.format(port=self.port), "host_key": self._keys.host_private},
            "users": HOMES,
            "homes_size": self._homes_size,
            "authorized": self._keys.user_public,
            "hide": self._hide,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"--- sshd\n{self.log()[-4000:]}")
            print(f"--- processes\n{self.processes()}")
        if hasattr(self, "pid") and (mounts := self.fuse_mounts()):
            subprocess.run(self.command([PYTHON, "-c", FORCE_DETACH, *mounts]), timeout=30, check=False)
        self._unshare.kill()
        self._unshare.wait(20)
        assert self._unshare.stdout is not None
        self._unshare.stdout.close()
        self.door.unlink(missing_ok=True)

    # --- inside --------------------------------------------------------------------------------------

    def command(self, argv: Sequence[str], user: str = "root") -> list[str]:
        """``argv`` as a command that runs in the machine, as ``user``, in that user's home."""
        uid, home = HOMES[user]
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--"]
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"] if uid else []
        environment = [
            "env",
            "-i",
            f"HOME={home}",
            f"USER={user}",
            "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        ]
        return [*UNTIL_WE_END, *enter, *become, *environment, "sh", "-c", 'cd && exec "$@"', "sh", *argv]

    def start(self, argv: Sequence[str], user: str = "root") -> Running:
        return Running(self.command(argv, user), cwd="/")

    def run(
        self, argv: Sequence[str], user: str = "root", *, timeout: float = 60, status: int | None = 0
    ) -> Finished:
        """Run it to its end. Its exit status must be ``status``; None for any."""
        with self.start(argv, user) as running:
            try:
                finished = running.wait(timeout)
            except subprocess.TimeoutExpired:
                raise Stuck(f"{argv} did not end within {timeout:g} s; it said {running.said()}") from None
        if status is not None:
            assert finished.status == status, (argv, finished)
        return finished

    def sh(self, script: str, user: str = "root", *, timeout: float = 60, status: int | None = 0) -> str:
        """The output of a shell script that runs in it."""
        return self.run(["sh", "-ec", script], user, timeout=timeout, status=status).output

    def write(self, path: str, text: str, user: str = "root") -> None:
        self.run(["sh", "-ec", 'printf %s "$2" >"$1"', "sh", path, text], user)

    def processes(self) -> dict[int, str]:
        """Command lines by their pids on this side, of all that run in it but what it came with."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            try:
                if os.readlink(entry / "ns/pid") != namespace:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if line and not line.startswith("sshd: /usr/sbin/sshd"):
                found[int(entry.name)] = line
        return found

    def agents(self) -> dict[int, str]:
        """Of these, what came with an agent: everything but sshd's sessions, and what tests run."""
        return {
            pid: line for pid, line in self.processes().items() if "agent" in line and PYTHON_NAME in line
        }

    def kill(self, pid: int) -> None:
        """One of its processes, by its number on this side."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def fuse_mounts(self) -> list[str]:
        """Where something is mounted that a user's process serves, innermost first."""
        try:
            lines = Path(f"/proc/{self.pid}/mounts").read_text().splitlines()
        except OSError:
            return []
        mounts = [line.split(" ") for line in lines]
        paths = [path for _, path, kind, *_ in mounts if kind.startswith("fuse")]
        return [path.encode().decode("unicode_escape") for path in reversed(paths)]

    def log(self) -> str:
        """What sshd says."""
        try:
            return Path(f"/proc/{self.pid}/root/run/sshd/log").read_text(errors="replace")
        except OSError as error:
            return str(error)


PYTHON_NAME: Final = "python"


def environment_of(home: Path, **more: str) -> Mapping[str, str]:
    """Of a user of this side, who has ``home``: no agent, no configuration but what is there."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SSH_", "DOCKER_", "AGENTCTL_"))
    }
    return {**kept, "HOME": str(home), **more}
