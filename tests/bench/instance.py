"""The bench VM: an ordinary instance in a home of its own, with a few devices more (``machine``).

The law: nothing of the user's changes. The instance, its docker configuration and its QEMU script are in the
bench's directory; of the user's own home only the guest image (built once, the expensive part) and the
docker tools are shared, by links. The instance is deleted, data and all, before and after.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_agent.boot import find_qemu
from host_agent.errors import UserError
from host_agent.paths import Home
from tests.bench import processes
from tests.bench.machine import Devices

SOURCES = Path(__file__).resolve().parents[2]

#: The first start builds the image.
UP_TIMEOUT = 1500.0
COMMAND_TIMEOUT = 180.0


class InstanceFailed(Exception):
    """The VM does not do what it must; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Instance:
    """Everything is below ``directory``, whose path must be short: sockets are made in it."""

    directory: Path

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def script(self) -> Path:
        """What agentctl finds as its QEMU."""
        return self.directory / "bin" / find_qemu().name

    @property
    def environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("DOCKER_HOST", "DOCKER_CONTEXT")}
        return {
            **environment,
            "AGENTCTL_HOME": str(self.home),
            "DOCKER_CONFIG": str(self.directory / "docker"),
            "PYTHONPATH": str(SOURCES),
            "PATH": f"{self.directory / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        }

    def prepare(self, devices: Devices) -> None:
        """Everything but the VM."""
        user = Home.find()
        user.ensure()
        for path in (self.home, self.script.parent, self.directory / "docker"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for shared in (user.images, user.tools):
            link = self.home / shared.name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(shared)
        configuration = self.directory / "devices.json"
        devices.write(configuration)
        machine = Path(__file__).with_name("machine.py")
        command = shlex.join([sys.executable, str(machine), str(configuration)])
        self.script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        self.script.chmod(0o755)

    def agentctl(
        self, *arguments: str, timeout: float = COMMAND_TIMEOUT, input: bytes = b"", check: bool = True
    ) -> str:
        """Run a command of agentctl's; its output."""
        command = [sys.executable, "-m", "host_agent", *arguments]
        try:
            done = subprocess.run(
                command, env=self.environment, input=input, capture_output=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise InstanceFailed(f"agentctl {arguments[0]} did not end within {timeout:.0f} s") from None
        if check and done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip()
            raise InstanceFailed(
                f"agentctl {shlex.join(arguments)[:120]} ended with {done.returncode}: {words}"
            )
        return done.stdout.decode(errors="replace")

    def guest(self, script: str, timeout: float = COMMAND_TIMEOUT, input: bytes = b"") -> str:
        """The output of a shell script that root runs in the guest."""
        return self.agentctl("exec", "-u", "root", "sh", "-euc", script, timeout=timeout, input=input)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.agentctl("status", "--json", check=False))
        return answer

    def spawn_in_guest(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """A process of root's in the guest, with pipes for stdin and stdout."""
        arguments = [sys.executable, "-m", "host_agent", "exec", "-u", "root", *command]
        with log.open("ab") as errors:
            return processes.spawn(
                arguments, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )

    def delete(self) -> None:
        self.agentctl("delete", "--data", "--yes", timeout=240)


@contextlib.contextmanager
def running(directory: Path, devices: Devices, arguments: Sequence[str]) -> Iterator[Instance]:
    """The instance, up with ``arguments`` of ``agentctl up``, and deleted afterwards however this ends."""
    instance = Instance(directory)
    try:
        instance.prepare(devices)
        instance.delete()
        try:
            instance.agentctl("up", *arguments, timeout=UP_TIMEOUT)
            yield instance
        finally:
            instance.delete()
    except UserError as error:
        raise InstanceFailed(f"{error.message}; {error.hint}") from None


def can_mount(instance: Instance) -> bool:
    """Whether this agentctl has folders of the host's to mount at all."""
    return "--mount" in instance.agentctl("up", "--help")


def require(*programs: str) -> None:
    """Raises ``InstanceFailed`` if one is not on PATH."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise InstanceFailed(f"{', '.join(missing)} missing on this host")
