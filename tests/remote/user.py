"""A user of this side who has a machine to attach: a home with an SSH configuration, and the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness import Instance, eventually
from tests.remote.keys import Keys
from tests.remote.machine import environment_of

ALIAS = "box"


@dataclass(frozen=True)
class User(Instance):
    """``person`` is the home with ``.ssh`` in it; agentctl's own is ``home``."""

    person: Path = Path("/nonexistent")

    @property
    def environment(self) -> dict[str, str]:
        return {
            **super().environment,
            **environment_of(self.person),
            "AGENTCTL_HOME": str(self.home),
            "AGENTCTL_INSTANCE": self.name,
            "DOCKER_CONFIG": str(self.docker_config),
        }

    @property
    def config(self) -> Path:
        return self.person / ".ssh/config"

    @property
    def known_hosts(self) -> Path:
        return self.person / ".ssh/known_hosts"

    def know(self, keys: Keys, port: int) -> None:
        """The machine's key, as ssh writes it down at the first visit."""
        kind, key = keys.host_public.split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{port} {kind} {key}\n")

    def configure(self, keys: Keys, port: int, account: str) -> None:
        """``ALIAS`` is the machine behind ``port``, as ``account``."""
        lines = [
            f"Host {ALIAS}",
            "HostName 127.0.0.1",
            f"Port {port}",
            f"User {account}",
            f"IdentityFile {keys.user}",
        ]
        self.config.write_text("\n    ".join(lines) + "\n")

    def attach(
        self, *arguments: str, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        return self.agentctl("attach", ALIAS, "--name", self.name, *arguments, timeout=timeout, **options)

    def detach(self) -> None:
        self.agentctl("detach", self.name, timeout=120)

    def mounts(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.agentctl("mounts", "--json", timeout=60).stdout)
        return rows

    def exec(self, script: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        return self.agentctl("exec", "sh", "-c", script, **{"timeout": 120, **options})

    def wait_connected(self, connected: bool = True) -> None:
        eventually(lambda: self.status().get("guest_connected", False) is connected, 60, 0.2)

    def log(self) -> str:
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in logs)


def make_user(directory: Path, name: str) -> User:
    """Everything of theirs is below ``directory``, whose name is short for the sake of sockets."""
    person = directory / "u"
    (person / ".ssh").mkdir(mode=0o700, parents=True)
    person.chmod(0o700)
    shutil.rmtree(directory / "h", ignore_errors=True)
    return User(directory / "h", directory / "docker", name, person=person)
