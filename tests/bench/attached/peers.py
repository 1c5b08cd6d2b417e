"""What is compared where the machine is far away: both go through one sshd, and one line to it that holds each byte.

sshfs     in reverse: ``ssh machine sshfs -o passive``, and sftp-server here answers it over that connection (``sshfs`` as
          in ``tests.bench.files.peers``)
sshfs-C   the same with ssh's compression
agentctl  the files agent there and the file server here, over a unix socket that ``ssh -L`` carries; no shared memory
unpacked  the same, and nothing is packed

"There" is this kernel, in the namespaces of ``tests.bench.files.local``, and so is the sshd.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from typing import Final

from fileserver.control import SharedFolder
from tests.bench import processes, ssh
from tests.bench.files.local import Here, LocalMount
from tests.bench.files.peers import find_sftp_server, joined
from tests.bench.files.report import OURS
from tests.bench.files.runner import Peer, PeerFailed
from tests.bench.ports.peers import sshd, sshd_config
from tests.delay_line import DelayLine
from tests.files.harness import FileServer, TrioThread
from tests.files.service import FilesAgent
from tests.free_ports import free_port

SSHFS: Final = "sshfs"
SSHFS_C: Final = "sshfs-C"
UNPACKED: Final = "unpacked"
PEERS: Final = (OURS, SSHFS)
PACKING_PEERS: Final = (OURS, UNPACKED, SSHFS, SSHFS_C)
"""Where a line has a rate."""

START_TIMEOUT: Final = 60.0

SETTLED: Final = 1.0
"""Seconds after a mount, for all: it has asked for what is at the root, or not."""


def obstacle(name: str) -> str:
    """Why this host cannot offer the peer ``name``, in a clause; empty if it can."""
    if not (shutil.which("ssh") and shutil.which("ssh-keygen") and sshd()):
        return "no ssh or no sshd (openssh-client, openssh-server)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened"
    if name in (SSHFS, SSHFS_C) and (find_sftp_server() is None or shutil.which("sshfs") is None):
        return "no sshfs or no sftp-server (sshfs, openssh-sftp-server)"
    return ""


class Machine:
    """An sshd, and the line to it. ``stack`` ends both."""

    def __init__(
        self, stack: contextlib.ExitStack, work: Path, round_trip: float, rate: float | None = None
    ) -> None:
        """``round_trip``: seconds that the line adds to one; ``rate``: bytes a second that it carries, None for any."""
        self.work = work
        if os.geteuid() == 0:  # whose sshd wants it (PRIVSEP_DIR); another user's does not
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentctl-bench-")))
        self.key, host_key = ssh.new_key(self.directory / "key"), ssh.new_key(self.directory / "host-key")
        listen = free_port()
        configuration = self.directory / "sshd_config"
        configuration.write_text(sshd_config(listen, host_key, self.key.with_suffix(".pub")))
        program = sshd()
        assert program is not None
        self._start(stack, [program, "-D", "-e", "-f", str(configuration)])
        _wait_until_listening(listen)
        self.port = stack.enter_context(DelayLine(f"127.0.0.1:{listen}", round_trip / 2, rate)).port

    def _start(self, stack: contextlib.ExitStack, command: list[str]) -> None:
        with (self.work / "machine.log").open("ab") as log:
            process = processes.spawn(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(processes.end, process)

    def run(self, script: str, *options: str) -> list[str]:
        """A command that has a shell there run ``script``."""
        known = ssh.options(self.key, self.port)
        # Of an option ssh takes what it is told first.
        return [known[0], *options, *known[1:], f"{getpass.getuser()}@127.0.0.1", "--", script]

    def forward(self, listen: Path, target: Path) -> list[str]:
        """A command that carries the unix socket ``listen`` to ``target`` there, until its stdin ends.

        Not by ``-N``: for a connection that has no session sshd sets no TCP_NODELAY, and the second of two messages waits
        for the answer to the first."""
        # fmt: off
        return [
            *ssh.options(self.key, self.port),
            "-o", "StreamLocalBindUnlink=yes",
            "-L", f"{listen}:{target}",
            f"{getpass.getuser()}@127.0.0.1", "exec cat",
        ]
        # fmt: on


class FarSshfs(LocalMount):
    def __init__(self, stack: contextlib.ExitStack, machine: Machine, name: str = SSHFS) -> None:
        super().__init__(stack, machine.work, name)
        self._machine = machine
        self._options = ["-o", "Compression=yes"] if name == SSHFS_C else []

    def _start(self, stack: contextlib.ExitStack) -> None:
        server = find_sftp_server()
        assert server is not None
        share, point = (shlex.quote(str(path)) for path in (self._work / "share", self.point))
        command = self._machine.run(f"exec sshfs -f :{share} {point} -o passive,allow_other", *self._options)
        stack.enter_context(joined(command, [server], self._work / "sshfs.log"))


class FarAgentctl(LocalMount):
    """As ``local.LocalAgentctl``: a fresh mount is a new files agent's."""

    def __init__(self, stack: contextlib.ExitStack, machine: Machine, name: str = OURS) -> None:
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentctl-bench-")))
        super().__init__(stack, machine.work, name)
        self._packed = name == OURS
        loop = stack.enter_context(TrioThread())
        near, self._far = self._directory / "near.sock", self._directory / "far.sock"
        with (machine.work / "ssh.log").open("ab") as log:
            carrier = processes.spawn(
                machine.forward(near, self._far), stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        stack.callback(processes.end, carrier)
        self._server = FileServer(loop, self._directory, near, [], packed=self._packed)
        stack.callback(self._server.kill)
        point = str(self.point)
        self._server.start([SharedFolder(zlib.crc32(point.encode()), str(self._work / "share"), point)])

    def calls(self) -> int:
        """What was asked of the host so far."""
        return self._server.states().shares[0].calls

    def _start(self, stack: contextlib.ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory)))
        self._far.unlink(missing_ok=True)
        agent = FilesAgent(
            Here(), directory, self._far, None, listening=True, attached=True, packed=self._packed
        )
        stack.enter_context(agent)
        stack.callback(agent.kill, signal.SIGTERM)
        agent.start(ready=None)

    def _wait(self) -> None:
        super()._wait()
        time.sleep(SETTLED)


def offered(stack: contextlib.ExitStack, machine: Machine, names: list[str]) -> list[Peer]:
    """The peers ``names``, of which this host has what they need. ``stack`` ends them."""
    return [
        FarSshfs(stack, machine, name) if name in (SSHFS, SSHFS_C) else FarAgentctl(stack, machine, name)
        for name in names
    ]


def _wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise PeerFailed("sshd does not start") from None
            time.sleep(0.05)
        else:
            return
