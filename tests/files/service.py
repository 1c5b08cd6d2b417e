"""What systemd is to the files agent in the VM: it starts it, hears what it says, and keeps its descriptors.

sd_notify(3), FDSTORE=1: a descriptor sent along is kept, under its FDNAME, and passed to the next process as
sd_listen_fds(3) describes, from number 3 on.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.files.memory import START, Memory, Use, use_of
from tests.files.namespace import Namespace

SOURCES = Path(__file__).resolve().parents[2]

LAUNCHER = """
import os, sys
given = [int(number) for number in os.environ.pop("GIVEN_FDS").split()]
high = [os.dup2(fd, 1000 + index) for index, fd in enumerate(given)]
for index, fd in enumerate(high):
    os.dup2(fd, 3 + index, inheritable=True)
    os.close(fd)
if given:
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Store:
    """The notification socket, and the descriptors that came over it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[tuple[str, int]] = []
        self.said: list[str] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Store:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(self.path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"END=1", os.fspath(self.path))
        self._thread.join()
        self._socket.close()
        self.clear()

    def _listen(self) -> None:
        while True:
            message, descriptors = self._receive()
            if message == "END=1":
                return
            with self._changed:
                self._take(dict(line.partition("=")[::2] for line in message.splitlines()), descriptors)
                self.said += message.splitlines()
                self._changed.notify_all()

    def _receive(self) -> tuple[str, list[int]]:
        room = socket.CMSG_SPACE(16 * 4)
        data, ancillary, _, _ = self._socket.recvmsg(8192, room, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % 4])
        return data.decode(), list(descriptors)

    def _take(self, fields: dict[str, str], descriptors: list[int]) -> None:
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            self.kept += [(name, fd) for fd in descriptors]
            return
        for fd in descriptors:
            os.close(fd)
        if fields.get("FDSTOREREMOVE") == "1":
            for known, fd in self.kept:
                if known == name:
                    os.close(fd)
            self.kept = [(known, fd) for known, fd in self.kept if known != name]

    def clear(self) -> None:
        with self._changed:
            for _, fd in self.kept:
                os.close(fd)
            self.kept = []

    def names(self) -> list[str]:
        with self._changed:
            return [name for name, _ in self.kept]

    def wait_for(self, line: str, since: int, timeout: float) -> None:
        """Until ``line`` is said, not counting the first ``since`` lines."""
        with self._changed:
            if not self._changed.wait_for(lambda: line in self.said[since:], timeout):
                raise AssertionError(f"no {line} within {timeout:g} s, only {self.said[since:]}")


class FilesAgent:
    """The unit agentctl-files.service, so to speak."""

    def __init__(
        self,
        namespace: Namespace,
        directory: Path,
        guest_socket: Path,
        patience: float | None,
        memory: Memory | None = None,
        losing: int | None = None,
        listening: bool = False,
        attached: bool = False,
        packed: bool = False,
    ) -> None:
        """``listening``: on its socket, for the host to connect to. ``attached``: it is on a machine that is no VM, and
        never says that it is ready. ``packed``: what travels is, if its host knows of that, too."""
        self._packed = packed
        self._attached = attached
        self._namespace = namespace
        self._losing = losing
        self._listening = listening
        self._memory = memory
        self._says = directory / "agent.use"
        self._directory = directory
        self._guest_socket = guest_socket
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self.store = Store(directory / "notify")
        self.fence = directory / "fence"
        self.log = directory / "agent.log"

    def __enter__(self) -> FilesAgent:
        self.store.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.store.__exit__()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, ready: float | None = 60) -> None:
        """Start it with what is in the store; wait ``ready`` seconds for READY=1, None for not at all."""
        said = len(self.store.said)
        kept = list(self.store.kept)
        environment = {
            **os.environ,
            "PYTHONPATH": str(SOURCES),
            "NOTIFY_SOCKET": str(self.store.path),
            "AGENTCTL_FENCE": str(self.fence),
            "GIVEN_FDS": " ".join(str(fd) for _, fd in kept),
        }
        if kept:
            environment["LISTEN_FDS"] = str(len(kept))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in kept)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._namespace.command([sys.executable, "-c", LAUNCHER, *self._module()]),
                cwd="/",
                env=environment,
                pass_fds=[fd for _, fd in kept],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if ready is not None:
            self.store.wait_for("READY=1", said, ready)

    def _module(self) -> list[str]:
        arguments = ["guest_agent.files", "--connect-unix", str(self._guest_socket)]
        options: list[str] = []
        if self._patience is not None:
            options += ["--patience", str(self._patience)]
        if self._memory is not None:
            options += ["--memory", str(self._memory.path), str(START)]
        if self._losing is not None:
            options += ["--lose", str(self._losing)]
        if self._listening:
            options.append("--listen")
        if self._attached:
            options.append("--attached")
        if self._packed:
            options.append("--packed")
        if options:
            return ["-m", "tests.files.observed", *options, str(self._says), *arguments]
        return ["-m", *arguments]

    def use(self) -> Use | None:
        """Of its memory."""
        return use_of(self.pid, self._says)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill it and wait for its end; the store stays as it is."""
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            process.wait(20)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None


def eventually(what: str, condition: object, timeout: float = 20) -> None:
    """Wait until ``condition()`` is true."""
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.02)
