"""A mount namespace for each test, so that nothing that mounts, hangs or dies in it reaches anything else.

The test's own process never sees the mounts: whatever touches one is a process inside, with a time limit.
"""

from __future__ import annotations

import array
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

REPOSITORY = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("memory_filesystem.py")
TIMEOUT = 20.0
NOBODY = "65534"

RUN_WITH_FD = """
import os, sys
fd = int(sys.argv[1])
if fd != 3: os.dup2(fd, 3); os.close(fd)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}


class Server:
    """A process that serves, and what it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(json.loads(line))

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, key: str, timeout: float = TIMEOUT) -> dict[str, Any]:
        """The next event that has ``key``."""
        while True:
            event = self._said.get(timeout=timeout)
            if key in event:
                return event

    def ask(self, line: str, key: str) -> dict[str, Any]:
        self.order(line)
        return self.expect(key)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)


class Manager:
    """A service manager's file descriptor store: the socket it is told things on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(TIMEOUT)

    def receive(self) -> tuple[str, list[int]]:
        message, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(16))
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        return message.decode(), list(fds)

    def close(self) -> None:
        self._socket.close()


class Place:
    """A mount namespace and a directory; the processes in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._processes: list[subprocess.Popen[str]] = []
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.read(1):
            self._end_holder()
            pytest.skip("a mount namespace is not permitted here")
        self.environment = ENVIRONMENT

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        return ["nsenter", "--mount", "--target", str(self._holder.pid), "--", *command]

    def popen(self, *command: str, fds: tuple[int, ...] = (), **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._inside(command),
            env=self.environment | environment,
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def result(self, process: subprocess.Popen[str], timeout: float = TIMEOUT) -> str:
        """What a process wrote; ``CalledProcessError`` if it failed, and an end to all mounts if it hangs."""
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.unmount_all()
            raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        return out

    def run(self, *command: str, timeout: float = TIMEOUT) -> str:
        return self.result(self.popen(*command), timeout)

    def shell(self, script: str, timeout: float = TIMEOUT) -> str:
        return self.run("sh", "-euc", script, timeout=timeout)

    def python(self, code: str, *arguments: str, timeout: float = TIMEOUT) -> str:
        return self.run(sys.executable, "-c", code, *arguments, timeout=timeout)

    def serve(self, *arguments: str, **environment: str) -> Server:
        """The script, once it is ready."""
        server = Server(
            self.popen(sys.executable, "-W", "error", str(SCRIPT), "serve", *arguments, **environment)
        )
        server.expect("ready")
        return server

    def adopt(self, fd: int, name: str) -> Server:
        """The script as a successor that is given ``fd``."""
        command = [sys.executable, "-c", RUN_WITH_FD, str(fd), name, sys.executable, str(SCRIPT), "adopt"]
        server = Server(self.popen(*command, fds=(fd,)))
        server.expect("ready")
        return server

    def mounts(self) -> list[str]:
        """Lines of mountinfo: what was mounted in this place. Mounts of the machine's own are here as well."""
        lines = self.run("cat", "/proc/self/mountinfo").splitlines()
        return [line for line in lines if "fuse.agentctl" in line and f" {self.path}/" in line]

    def unmount_all(self) -> None:
        """By force, innermost first."""
        code = (
            "import ctypes, sys\n"
            "for path in sys.argv[:0:-1]:\n"
            "    ctypes.CDLL(None).umount2(path.encode(), 1 | 2)\n"
        )
        paths = [line.split(" ")[4].replace(r"\040", " ") for line in self.mounts()]
        with suppress(subprocess.TimeoutExpired):
            self.popen(sys.executable, "-c", code, *paths).wait(TIMEOUT)

    def _end_holder(self) -> None:
        self._holder.communicate(timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount_all()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(TIMEOUT)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
        self._end_holder()


def as_user(*command: str) -> list[str]:
    """Somebody who is not root."""
    if os.geteuid():
        return list(command)
    return ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--", *command]


class UsersPlace(Place):
    """The same for an ordinary user: one of root's making, or whoever runs the tests, then without a namespace.

    What only root can provide is set by the test: ``fuse_conf`` is what /etc/fuse.conf says.
    """

    def __init__(self, path: Path, fuse_conf: str = "") -> None:
        if os.geteuid():
            self.path = path
            self._processes = []
            self.environment = ENVIRONMENT
            return
        super().__init__(path)
        os.chown(path, int(NOBODY), int(NOBODY))
        # There are machines where only root may open /dev/fuse. What a private mount hides is nobody else's business.
        for_root = path / "root"
        for_root.mkdir(mode=0o755)
        (for_root / "fuse.conf").write_text(fuse_conf)
        script = (
            f"mknod -m 666 {for_root}/fuse c 10 229 && mount --bind {for_root}/fuse /dev/fuse\n"
            f"touch /etc/fuse.conf && mount --bind {for_root}/fuse.conf /etc/fuse.conf\n"
            "mount -t fusectl none /sys/fs/fuse/connections"
        )
        subprocess.run(super()._inside(("sh", "-euc", script)), check=True)

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        command = tuple(as_user(*command))
        return list(command) if os.geteuid() else super()._inside(command)

    def as_root(self, *command: str) -> list[str]:
        """Somebody else, who could do anything elsewhere; only where the tests are root's."""
        return super()._inside(command)

    def connections(self) -> bool:
        """Whether the kernel's list of connections is there."""
        return not os.geteuid() or "fusectl" in self.run("cat", "/proc/mounts")

    def unmount_all(self) -> None:
        if not os.geteuid():
            code = "import ctypes, sys; [ctypes.CDLL(None).umount2(path.encode(), 3) for path in sys.argv[:0:-1]]"
            paths = [line.split(" ")[4].replace(r"\040", " ") for line in self.mounts()]
            command = super()._inside((sys.executable, "-c", code, *paths))
            subprocess.run(command, check=True, timeout=TIMEOUT)
            return
        for line in reversed(self.mounts()):
            path = line.split(" ")[4].replace(r"\040", " ")
            subprocess.run(["fusermount3", "-u", "-z", "--", path], check=False, timeout=TIMEOUT)

    def _end_holder(self) -> None:
        if not os.geteuid():
            super()._end_holder()


@pytest.fixture
def users_place(request: pytest.FixtureRequest) -> Iterator[UsersPlace]:
    """Indirectly parametrized: with what /etc/fuse.conf says; only root has the say."""
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    if os.geteuid() and not os.access("/dev/fuse", os.W_OK):
        pytest.skip("only root may open /dev/fuse here")
    if os.geteuid() == 0:
        # By way of env: what setpriv starts is still looked for with root's capabilities.
        can_import = as_user("env", sys.executable, "-c", "import msgpack, protocol, trio")
        if subprocess.run(can_import, env=ENVIRONMENT, cwd="/", capture_output=True, check=False).returncode:
            pytest.skip("this interpreter is not everybody's")
    elif hasattr(request, "param"):
        pytest.skip("only root writes /etc/fuse.conf")
    with tempfile.TemporaryDirectory(prefix="agentctl-mounts-") as directory:
        Path(directory).chmod(0o755)
        with UsersPlace(Path(directory), getattr(request, "param", "")) as place:
            yield place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    if os.geteuid() or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("mounting with /dev/fuse is not permitted here")
    with Place(tmp_path) as place:
        yield place


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()
