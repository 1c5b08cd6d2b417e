"""What the end-to-end tests know of an instance: its commands, its files, its ports, as a user sees them."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).resolve().parents[2]

#: Generous: everything runs on an emulated CPU, perhaps on a busy machine. Seconds.
BOOT_TIME = 420.0
PATIENCE = 60.0

#: For ``docker run``, where the network does not matter: one of its own is half of what a start costs an emulated CPU.
NO_NETWORK = ("--network", "host")


def eventually(condition: Callable[[], Any], timeout: float = PATIENCE, interval: float = 0.1) -> Any:
    """The first true value of ``condition``; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {timeout:.0f} s: {condition}")
        time.sleep(interval)


def fetch(port: int, host: str = "127.0.0.1", path: str = "/") -> bytes | None:
    """The body of an HTTP answer, or None if there is none (refused, reset, not HTTP)."""
    try:
        with socket.create_connection((host, port), timeout=20) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: test\r\n\r\n".encode())
            answer = b""
            while data := connection.recv(65536):
                answer += data
    except OSError:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return body if b" 200 " in head.split(b"\r\n")[0] else None


def is_refused(port: int, host: str = "127.0.0.1") -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect((host, port))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


@dataclass(frozen=True)
class Instance:
    """The instance under test. Its files are in ``directory``; ``started`` is what its first ``up`` said."""

    home: Path
    docker_config: Path
    name: str = "default"
    started: str = ""

    @property
    def directory(self) -> Path:
        return self.home / "instances" / self.name

    @property
    def environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("DOCKER_HOST", "DOCKER_CONTEXT")}
        return {
            **environment,
            "AGENTCTL_HOME": str(self.home),
            "AGENTCTL_INSTANCE": self.name,
            "DOCKER_CONFIG": str(self.docker_config),
            "PYTHONPATH": str(SOURCES),
            "COLUMNS": "200",
        }

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "host_agent", *arguments]
        return subprocess.Popen(command, env=self.environment, **options)

    def agentctl(
        self,
        *arguments: str,
        check: bool = True,
        input: bytes | None = None,
        timeout: float = BOOT_TIME,
        cwd: str | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "host_agent", *arguments]
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=cwd,
            input=input if input is not None else b"",
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        if check:
            assert done.returncode == 0, (arguments, done.returncode, done.stdout, done.stderr)
        return done

    def guest(self, script: str, *, check: bool = True, user: str = "root") -> str:
        """The output of a shell script run in the guest."""
        return self.agentctl("exec", "-u", user, "sh", "-c", script, check=check).stdout.decode()

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.agentctl("status", "--json", check=False).stdout)
        return answer

    def ports(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.agentctl("ports", "--json", "--all").stdout)
        return rows

    def port_states(self, guest_port: int) -> set[str]:
        return {row["state"] for row in self.ports() if row["guest_port"] == guest_port}

    def docker(self, *arguments: str, check: bool = True, input: bytes | None = None) -> str:
        tools = self.home / "tools" / "bin"
        environment = {**self.environment, "PATH": f"{os.environ['PATH']}:{tools}"}
        done = subprocess.run(
            ["docker", *arguments],
            env=environment,
            input=input,
            capture_output=True,
            timeout=BOOT_TIME,
            check=False,
        )
        if check:
            assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout.decode().strip()

    def import_busybox(self, name: str, page: bytes) -> None:
        """Make an image of the guest's busybox, with a web server of ``page`` for its command."""
        busybox = self.agentctl("exec", "-u", "root", "cat", "/usr/bin/busybox").stdout
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, content, mode in (("bin/busybox", busybox, 0o755), ("www/index.html", page, 0o644)):
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(content), mode
                archive.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("bin/sh")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        command = 'CMD ["/bin/busybox","httpd","-f","-p","80","-h","/www"]'
        self.docker("import", "-c", command, "-", name, input=buffer.getvalue())

    def processes(self) -> list[int]:
        """Pids of everything that belongs to this instance: keeper, host agent, QEMU."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if os.fsencode(self.directory) in command:
                    found.append(int(entry.name))
        return found

    def keeper_pid(self) -> int:
        return next(
            pid
            for pid in self.processes()
            if b"host_agent.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
