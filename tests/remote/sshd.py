"""A real sshd for tests, on a loopback port, and a home folder for who connects to it.

The law: nothing of the machine's own SSH is used or changed: host key, authorized keys, known_hosts, configuration and
the home of its sessions are a test's own. Started by root it serves every account, by an ordinary user that user. ``prefix`` starts it elsewhere (``nsenter …``).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from tests.free_ports import free_port

PATIENCE = 30.0
"""Seconds for sshd to listen, on a machine with load."""

UNTIL_WE_END = ["setpriv", "--pdeathsig", "KILL"]
"""Before a command: it does not outlive a test run that was killed."""


@cache
def program(name: str) -> str:
    """The path of a program of OpenSSH's; skips the test where there is none."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib/openssh")
    return found or pytest.skip(f"{name} is not installed (openssh-server, openssh-client)")


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A private key at ``path``, its public one beside it."""
    argv = [program("ssh-keygen"), "-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return path


def public(key: Path) -> str:
    return key.with_suffix(".pub").read_text().strip()


class Sshd:
    """An sshd of its own; a context manager. ``stop`` and ``start`` keep port and keys.

    Its folder is one that every account can enter, which pytest's are not.
    """

    def __init__(
        self,
        *,
        prefix: Sequence[str] = (),
        settings: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        """``settings`` are lines of sshd_config that win, ``environment`` what every session gets (HOME too)."""
        self.address = "127.0.0.1"
        self.port = free_port() if port is None else port
        self._prefix = [*prefix]
        self._folder = tempfile.TemporaryDirectory(prefix="agentctl-sshd-")
        self.folder = Path(self._folder.name)
        self.folder.chmod(0o755)
        self.host_key = make_key(self.folder / "host_key")
        self.authorized_keys = self.folder / "authorized_keys"
        self.authorized_keys.touch()
        self._process: subprocess.Popen[bytes] | None = None
        # The account's own files for shells may take a second, or wait for a lock that a killed session has left.
        home = self.folder / "home"
        home.mkdir()
        home.chmod(0o1777)
        given = {"HOME": str(home), **(environment or {})}
        lines = [
            *settings,
            "SetEnv " + " ".join(f'"{name}={value}"' for name, value in given.items()),
            f"ListenAddress {self.address}:{self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.authorized_keys}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "MaxStartups 100",
            "MaxSessions 100",
            "PrintMotd no",
            "LogLevel VERBOSE",
            f"Subsystem sftp {program('sftp-server')}",
        ]
        self.config = self.folder / "sshd_config"
        self.config.write_text("\n".join(lines) + "\n")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """Of the process that was started: sshd's, unless the prefix forks."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # as its unit would
        argv = [
            *UNTIL_WE_END,
            *self._prefix,
            program("sshd"),
            "-D",
            "-f",
            self.config,
            "-E",
            self.folder / "log",
        ]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._await_listening()

    def _await_listening(self) -> None:
        assert self._process is not None
        log = self.folder / "log"
        deadline = time.monotonic() + PATIENCE
        while True:
            said = log.read_text() if log.exists() else ""
            if f"listening on {self.address} port {self.port}" in said:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"sshd did not start: {said}")
            time.sleep(0.02)

    def authorize(self, public_key: str) -> None:
        """May log in, to any account that this sshd serves."""
        with self.authorized_keys.open("a") as keys:
            keys.write(public_key + "\n")

    def change_host_key(self) -> None:
        """As after an installation of the machine anew, or with somebody in between. Stop it before."""
        self.host_key.unlink()
        self.host_key.with_suffix(".pub").unlink()
        make_key(self.host_key)

    def end_connections(self) -> None:
        """Every connection's processes, with what they have run and has not left for a session of its own, are killed."""
        for process in self._below():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        """sshd and all its connections are killed; a new connection is refused."""
        if self._process is None:
            return
        below = self._below()
        self._process.kill()
        self._process.wait()
        self._process = None
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=PATIENCE)
        # What it logged is of one run, as is the line by which that one is known to listen.
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "log").replace(self.folder / "log.before")

    def _below(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def log(self) -> str:
        return (self.folder / "log").read_text()


@dataclass(frozen=True, slots=True)
class Client:
    """A home folder for who connects: a key, known_hosts and a configuration, all in ``home/.ssh``."""

    home: Path

    @classmethod
    def make(cls, home: Path) -> Client:
        client = cls(home)
        client.folder.mkdir(mode=0o700, parents=True)
        make_key(client.key)
        client.known_hosts.touch(mode=0o600)
        client.config.touch(mode=0o600)
        return client

    @property
    def folder(self) -> Path:
        return self.home / ".ssh"

    @property
    def key(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def trust(self, sshd: Sshd, *ports: int) -> None:
        """Its host key is known, at its own port and at ``ports`` (a delay line's)."""
        with self.known_hosts.open("a") as hosts:
            for port in (sshd.port, *ports):
                hosts.write(f"{known_as(sshd.address, port)} {public(sshd.host_key)}\n")

    def may_enter(self, sshd: Sshd) -> None:
        """Knows the host, and is known there."""
        self.trust(sshd)
        sshd.authorize(public(self.key))

    def configure(self, text: str) -> None:
        """Appended to ~/.ssh/config."""
        with self.config.open("a") as config:
            config.write(text + "\n")

    def options(self) -> list[str]:
        """For OpenSSH's own programs (ssh, sftp, sshfs), which look up the home of the account, not HOME."""
        settings = [
            f"UserKnownHostsFile={self.known_hosts}",
            "GlobalKnownHostsFile=/dev/null",
            f"IdentityFile={self.key}",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
        ]
        return ["-F", str(self.config), *(word for setting in settings for word in ("-o", setting))]


def known_as(address: str, port: int) -> str:
    """How known_hosts names it."""
    return address if port == 22 else f"[{address}]:{port}"


def account() -> str:
    """The account that an sshd of this process surely serves: its own."""
    return getpass.getuser()


@contextlib.contextmanager
def agent(key: Path | None = None) -> Iterator[Path]:
    """An ssh-agent that holds ``key``; gives the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="agentctl-agent-") as folder:
        path = Path(folder, "sock")
        argv = [*UNTIL_WE_END, program("ssh-agent"), "-D", "-a", str(path)]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            try:
                _await_socket(path)
                if key is not None:
                    environment = {**os.environ, "SSH_AUTH_SOCK": str(path)}
                    subprocess.run([program("ssh-add"), "-q", str(key)], env=environment, check=True)
                yield path
            finally:
                process.kill()


def _await_socket(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"nobody listens on {path}")
        time.sleep(0.02)
