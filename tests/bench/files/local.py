"""The same comparison without a VM: agentctl's own programs and sshfs on this host, in a mount namespace.

What is left out is what a VM adds (virtio-serial, ssh, emulation); what remains is what the programs cost.

plain     the directory itself: the ceiling
sshfs     ``sshfs -o passive`` and sftp-server, joined by a socketpair
agentctl  the file server and the files agent as the host agent and the guest run them, with shared memory (if /proc
          can be mounted); where QEMU would be they are joined by a socket

The law: nobody else sees these mounts, and they and their processes end with the namespaces, of which this
process is the first (pid 1). It never touches a mount itself: only the driver does, which can be given up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from fileserver.control import SharedFolder
from tests.bench import processes
from tests.bench.files.driver import Driver
from tests.bench.files.freshness import Watcher
from tests.bench.files.peers import find_sftp_server, joined
from tests.bench.files.report import OURS
from tests.bench.files.runner import Peer, PeerFailed
from tests.bench.files.trees import Sizes
from tests.files.harness import FileServer, TrioThread
from tests.files.memory import memory
from tests.files.namespace import Namespace
from tests.files.service import FilesAgent

PEERS = (OURS, "sshfs", "plain")

PROCEDURE = (
    "cold: in a mount made anew in this round (but plain), of files not looked at since; the host's own caches "
    "are warm for all, so that cold and warm differ only in what the mount's kernel and programs remember"
)

MOUNT_TIMEOUT = 60.0

#: Set in the namespace.
_INSIDE = "AGENTCTL_BENCH_NAMESPACE"

_CLONE_NEWPID = 0x20000000  # linux/sched.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def enter_namespace(module: str) -> None:
    """Go on in namespaces of one's own: of mounts and of processes; an ordinary user needs a user namespace for that.
    ``module`` is the program.

    The program starts again by unshare(1); then a child goes on, and its parent only passes signals on and
    ends as the child has.
    """
    if not os.environ.get(_INSIDE):
        user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        command = ["unshare", *user, "--mount", "--propagation=private"]
        command += [sys.executable, "-m", module, *sys.argv[1:]]
        os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})
    # Only now: the next child is the first process of the namespace, and the last.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "no namespace of processes")
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # Of this namespace's processes: memory is found by its holder's number. A container may forbid it.
        subprocess.run(["mount", "-t", "proc", "proc", "/proc"], stderr=subprocess.DEVNULL, check=False)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


class Plain:
    """The shared directory itself."""

    def __init__(self, shared: Path) -> None:
        self.name = "plain"
        self.common, self.own = str(shared / "common"), str(shared / self.name)

    def mount(self) -> None:
        """There is nothing to do."""


class LocalMount:
    """A mount made by processes of ours. Subclasses start them in ``_start``."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, name: str) -> None:
        self.name = name
        self.point = work / "mounts" / name
        self.point.mkdir(parents=True, exist_ok=True)
        self.common, self.own = str(self.point / "common"), str(self.point / name)
        self._work = work
        self._running = contextlib.ExitStack()
        stack.callback(self._end)

    def mount(self) -> None:
        self._end()
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._wait()
            self._running = stack.pop_all()

    def _start(self, stack: contextlib.ExitStack) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        # By another process: an unmount may wait for the program that serves the mount.
        subprocess.run(["umount", "-l", str(self.point)], stderr=subprocess.DEVNULL, timeout=30, check=False)
        self._running.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + MOUNT_TIMEOUT
        while f" {self.point} " not in Path("/proc/self/mountinfo").read_text():
            if time.monotonic() > deadline:
                raise PeerFailed(f"{self.name} did not mount; see {self._work / self.name}.log")
            time.sleep(0.01)


class LocalSshfs(LocalMount):
    def _start(self, stack: contextlib.ExitStack) -> None:
        server = find_sftp_server()
        assert server is not None
        command = ["sshfs", "-f", f":{self._work / 'share'}", str(self.point), "-o", "passive,allow_other"]
        stack.enter_context(joined(command, [server], self._work / "sshfs.log"))


class Here(Namespace):
    """The namespace that this process is in."""

    def __init__(self) -> None:
        """There is nothing to make."""

    def command(self, argv: Sequence[str]) -> list[str]:
        return list(argv)


class LocalAgentctl(LocalMount):
    """Both processes of the files plane. The file server stays, as it does in an instance; a fresh mount is a
    new files agent's."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, name: str) -> None:
        # Sockets have short paths. Entered first, so that it is the last to go.
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentctl-bench-")))
        super().__init__(stack, work, name)
        loop = stack.enter_context(TrioThread())
        self._port = self._directory / "files.sock"
        ours = os.readlink("/proc/self") == str(os.getpid())
        self._memory = stack.enter_context(memory(self._directory)) if ours else None
        self._server = FileServer(loop, self._directory, self._port, [], self._memory)
        stack.callback(self._server.kill)
        point = str(self.point)
        self._server.start([SharedFolder(zlib.crc32(point.encode()), str(work / "share"), point)])

    def _start(self, stack: contextlib.ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory)))
        agent = stack.enter_context(
            FilesAgent(Here(), directory, self._port, None, self._memory, listening=True)
        )
        stack.callback(agent.kill, signal.SIGTERM)
        try:
            agent.start(ready=MOUNT_TIMEOUT)
        except AssertionError as error:
            words = agent.log.read_text(errors="replace").strip().splitlines()
            raise PeerFailed(f"the files agent does not start: {words[-1] if words else error}") from None


def obstacle(name: str) -> str:
    """Why this host cannot offer the peer ``name``; empty if it can."""
    if name == "sshfs" and (find_sftp_server() is None or shutil.which("sshfs") is None):
        return "no sshfs or no sftp-server (sshfs, openssh-sftp-server)"
    if name != "plain" and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened"
    return ""


def offered(stack: contextlib.ExitStack, work: Path, names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers ``names`` that this host can have, and why it cannot have the others. ``stack`` ends them."""
    missing = {name: reason for name in names if (reason := obstacle(name))}
    peers: list[Peer] = []
    for name in names:
        if name == "plain":
            peers.append(Plain(work / "share"))
        elif name == "sshfs" and name not in missing:
            peers.append(LocalSshfs(stack, work, name))
        elif name == OURS and name not in missing:
            peers.append(LocalAgentctl(stack, work, name))
    return peers, missing


def driver(work: Path, sizes: Sizes) -> Driver:
    """A driver in this namespace."""
    (work / "copies").mkdir(exist_ok=True)
    command = [sys.executable, "-u", str(Path(__file__).with_name("workloads.py")), sizes.to_json()]

    def start() -> subprocess.Popen[bytes]:
        with (work / "driver.log").open("ab") as log:
            return processes.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    return Driver(start)


def watcher(work: Path) -> Watcher:
    """A watcher in this namespace."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("watcher.py"))]

    def start() -> subprocess.Popen[bytes]:
        with (work / "watcher.log").open("ab") as log:
            return processes.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    return Watcher(start)
