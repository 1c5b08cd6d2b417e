"""What agentctl's forwarded connections are compared with, each being a port of this host's.

In the VM, where all lead to one server:
agentctl  the port that agentctl opens by itself when something in the guest listens
ssh -L    OpenSSH's client with Lima's options, to the guest's sshd, through QEMU's user network
hostfwd   a ``hostfwd`` rule of QEMU's user network: libslirp, and the guest's own network card

Without a VM, on loopback:
agentctl  host agent and guest agent, a unix socket between them (``ours``)
ssh -L    the same client, to an sshd of our own
direct    the server itself: the ceiling

The law: a peer is there when it has answered; what it needs ends with the caller's stack.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import processes, ssh
from tests.bench.instance import SOURCES, Instance, InstanceFailed
from tests.bench.ports import client
from tests.bench.ports.client import MeasureFailed
from tests.bench.ports.measurements import Peer
from tests.bench.ports.report import OURS
from tests.bench.ports.server import Server
from tests.free_ports import free_port

SSH = "ssh -L"
HOSTFWD = "hostfwd"
DIRECT = "direct"

VM_PEERS = (OURS, SSH, HOSTFWD)
LOCAL_PEERS = (OURS, SSH, DIRECT)

#: Seconds for a peer to answer the first time; an emulated sshd takes several for its handshake.
START_TIMEOUT = 60.0
IN_GUEST = "/usr/local/bin/bench-server"


class PeerFailed(Exception):
    """A peer cannot be had; the message is a sentence."""


def obstacle(name: str, *, vm: bool) -> str:
    """Why this host cannot offer the peer ``name``, in a clause; empty if it can."""
    if name != SSH:
        return ""
    if not (shutil.which("ssh") and shutil.which("ssh-keygen")):
        return "no ssh (openssh-client)"
    if not vm and sshd() is None:
        return "no sshd (openssh-server)"
    if not vm and os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        return "root's sshd wants /run/sshd; another user's does not"
    return ""


def sshd() -> str | None:
    """Where sshd is; it is on no ordinary user's PATH."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True, slots=True)
class Ports:
    """``server`` is the guest's, and the host's that agentctl forwards it to. QEMU lets the host's ``sshd`` and
    ``hostfwd`` lead to the guest's sshd and to the server."""

    server: int
    sshd: int
    hostfwd: int

    @classmethod
    def choose(cls) -> Ports:
        return cls(free_port(), free_port(), free_port())

    @property
    def of_qemu(self) -> tuple[tuple[int, int], ...]:
        return (self.sshd, ssh.PORT), (self.hostfwd, self.server)


class Local:
    """The peers on this host. ``stack`` ends all that they need, ``work`` has the logs."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, server: Server) -> None:
        self._stack = stack
        self._work = work
        # Sockets have short paths, and sshd wants its files in a place of the user's own.
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentctl-bench-")))
        self._target = free_port()
        command = server.command(self._target)
        _serve(stack, lambda: _spawn(command, work / "server.log", stdin=subprocess.PIPE))
        wait_for(Peer(DIRECT, self._target))

    def offer(self, name: str) -> Peer:
        """Start the peer ``name``; raises ``PeerFailed``."""
        peer = Peer(name, self._target if name == DIRECT else free_port())
        if name == SSH:
            self._ssh(peer.port)
        elif name == OURS:
            self._ours(peer.port)
        wait_for(peer)
        return peer

    def _ours(self, port: int) -> None:
        path = self._directory / "guest.sock"
        program = [sys.executable, "-m", "tests.bench.ports.ours"]
        self._start([*program, "guest", str(path)], "guest.log")
        self._start([*program, "host", str(path), str(port), str(self._target)], "host.log")

    def _ssh(self, port: int) -> None:
        program = sshd()
        assert program is not None
        key, host_key = ssh.new_key(self._directory / "key"), ssh.new_key(self._directory / "host-key")
        listen = free_port()
        configuration = self._directory / "sshd_config"
        configuration.write_text(sshd_config(listen, host_key, key.with_suffix(".pub")))
        # In the foreground, and of its own: nothing of the host's configuration is read. It wants an absolute path.
        self._start([program, "-D", "-e", "-f", str(configuration)], "sshd.log")
        _wait_until_listening(listen)
        user = getpass.getuser()
        self._start(ssh.forwarding(key, listen, listen=port, target=self._target, user=user), "ssh.log")

    def _start(self, command: Sequence[str], log: str) -> None:
        _serve(self._stack, lambda: _spawn(command, self._work / log, stdin=subprocess.DEVNULL))


def sshd_config(port: int, host_key: Path, authorized: Path) -> str:
    """sshd_config(5) of an sshd for this user alone. StrictModes would refuse a directory below /tmp."""
    return f"""
ListenAddress 127.0.0.1:{port}
HostKey {host_key}
AuthorizedKeysFile {authorized}
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
PidFile none
AllowTcpForwarding local
"""


class Guest:
    """The peers in the running ``instance``, whose ports were chosen before it was started."""

    def __init__(self, stack: contextlib.ExitStack, instance: Instance, server: Server, ports: Ports) -> None:
        self._stack = stack
        self._instance = instance
        self._ports = ports
        instance.guest(f"cat >{IN_GUEST} && chmod 755 {IN_GUEST}", input=server.file.read_bytes())
        command = server.command(ports.server, IN_GUEST)
        _serve(stack, lambda: instance.spawn_in_guest(*command, log=instance.directory / "server.log"))

    def offer(self, name: str) -> Peer:
        """Start the peer ``name``; raises ``PeerFailed``."""
        if name == SSH:
            peer = Peer(SSH, self._ssh())
        else:
            peer = Peer(name, self._ports.server if name == OURS else self._ports.hostfwd)
        wait_for(peer)
        return peer

    def _ssh(self) -> int:
        try:
            key = ssh.authorize(self._instance)
        except InstanceFailed as error:
            raise PeerFailed(str(error)) from None
        listen = free_port()
        command = ssh.forwarding(key, self._ports.sshd, listen=listen, target=self._ports.server)
        log = self._instance.directory / "ssh.log"
        _serve(self._stack, lambda: _spawn(command, log, stdin=subprocess.DEVNULL))
        return listen


def offered(
    offer: Callable[[str], Peer], names: Sequence[str], *, vm: bool
) -> tuple[list[Peer], dict[str, str]]:
    """The peers ``names`` that can be had, and why the others cannot."""
    found, missing = [], {}
    for name in names:
        if reason := obstacle(name, vm=vm):
            missing[name] = reason
            continue
        try:
            found.append(offer(name))
        except PeerFailed as error:
            missing[name] = str(error)
    return found, missing


def wait_for(peer: Peer, timeout: float = START_TIMEOUT) -> None:
    """Until the server has answered through ``peer``; raises ``PeerFailed``."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            client.round_trips(peer.port, 1)
        except MeasureFailed as error:
            if time.monotonic() > deadline:
                raise PeerFailed(f"it does not answer: {error}") from None
            time.sleep(0.1)
        else:
            return


def _wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            socket.create_connection((client.HOST, port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise PeerFailed("sshd does not start") from None
            time.sleep(0.05)
        else:
            return


def _spawn(command: Sequence[str], log: Path, stdin: int) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return processes.spawn(command, cwd=SOURCES, stdin=stdin, stdout=output, stderr=output)


def _serve(stack: contextlib.ExitStack, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    stack.callback(processes.end, start())
