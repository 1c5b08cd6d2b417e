"""Starting an instance when its user logs in, by a unit of the user's own systemd (systemd.unit(5)).

The law: a unit that is not ours is neither replaced nor removed, and one that says what it should is not touched.
Nothing here needs root or a systemd that runs: the files are what `systemctl --user enable` would make, and a manager
that runs is told to read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from host_agent.errors import ExitCode, UserError
from host_agent.files import write_atomically
from host_agent.paths import Home, InstancePaths

MARK = "# Made by agentctl; `agentctl autostart off` removes it."

#: Seconds. The guest may take 120 to stop its containers and itself (host_agent.daemon).
STOP_TIME = 150

#: Seconds for the user's systemd to read its files again.
RELOAD_TIME = 20.0

#: What of the environment means the same at a login: where things are.
KEPT = ("AGENTCTL_HOME", "DOCKER_CONFIG", "PATH", "PYTHONPATH")

LINGER = Path("/var/lib/systemd/linger")
"""A file by the name of each user whose systemd starts with the machine (loginctl(1), enable-linger)."""


@dataclass(frozen=True, slots=True)
class Autostart:
    """The unit of one instance. ``configuration`` is the user's ($XDG_CONFIG_HOME)."""

    paths: InstancePaths
    configuration: Path

    @classmethod
    def of(cls, paths: InstancePaths, environment: Mapping[str, str] = os.environ) -> Autostart:
        configured = environment.get("XDG_CONFIG_HOME", "")
        return cls(paths, Path(configured) if os.path.isabs(configured) else Path.home() / ".config")

    @property
    def unit(self) -> Path:
        """Named for the instance; of another home than the usual one also for that, which may have one of this name."""
        home = self.paths.directory.parent.parent
        other = "" if home == Home.usual().root else f"-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"
        return self.configuration / "systemd" / "user" / f"agentctl-{self.paths.name}{other}.service"

    @property
    def wanted(self) -> Path:
        """The link by which logins want it."""
        return self.unit.parent / "default.target.wants" / self.unit.name

    def is_on(self) -> bool:
        return self._is_ours() and os.path.lexists(self.wanted)

    def turn_on(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Start it at logins from now on; whether something had to be changed.

        Raises ``UserError`` where that cannot be: no systemd, somebody else's unit, a folder that cannot be written.
        """
        if not sys.platform.startswith("linux"):
            raise UserError("an instance is started at logins by systemd, which this machine does not have")
        text = unit_text(self.paths.name, environment)
        self._check_ours()
        if self.is_on() and self.unit.read_text() == text:
            return False
        try:
            self.wanted.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.unit, text.encode(), mode=0o644)
            if not os.path.lexists(self.wanted):
                self.wanted.symlink_to(f"../{self.unit.name}")
        except OSError as error:
            raise UserError(f"the unit {self.unit} cannot be written: {error.strerror}") from None
        reload_manager(environment)
        return True

    def turn_off(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Start it no longer; whether something had to be changed. What runs goes on. Raises ``UserError``."""
        if not os.path.lexists(self.unit):
            return False
        self._check_ours()
        try:
            self.wanted.unlink(missing_ok=True)
            self.unit.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"the unit {self.unit} cannot be removed: {error.strerror}") from None
        reload_manager(environment)
        return True

    def _is_ours(self) -> bool:
        try:
            return self.unit.read_text(errors="replace").startswith(MARK)
        except OSError:
            return False

    def _check_ours(self) -> None:
        if os.path.lexists(self.unit) and not self._is_ours():
            raise UserError(
                f"{self.unit} was not made by agentctl, and is left alone",
                "move it away, or keep it instead of autostart",
                ExitCode.USAGE,
            )


def lingers(user: str, folder: Path = LINGER) -> bool:
    """Whether the user's systemd starts with the machine, and not at the first login."""
    return (folder / user).exists()


def unit_text(instance: str, environment: Mapping[str, str], python: str = sys.executable) -> str:
    """The unit, for a VM that outlives the command which starts it."""
    command = [python, "-m", "host_agent", "--instance", instance]
    kept = "".join(
        f"Environment={quoted(f'{name}={environment[name]}')}\n" for name in KEPT if environment.get(name)
    )
    return f"""{MARK}
[Unit]
Description=agentctl VM {instance}

[Service]
Type=oneshot
# What it starts goes on, and is stopped with the login (or the machine) in good order.
RemainAfterExit=yes
# Of no user's folders, so that none is added to those that the VM sees.
WorkingDirectory=/
{kept}ExecStart={command_line([*command, "up"])}
ExecStop={command_line([*command, "stop"])}
TimeoutStopSec={STOP_TIME}

[Install]
WantedBy=default.target
"""


def command_line(words: Sequence[str]) -> str:
    """As ``ExecStart=`` has it (systemd.service(5)): no variable of it is expanded."""
    return " ".join(quoted(word).replace("$", "$$") for word in words)


def quoted(word: str) -> str:
    """One word of a unit's line: no specifier of it is expanded (systemd.unit(5)), and quoted if it has to be."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def reload_manager(environment: Mapping[str, str] = os.environ) -> None:
    """Have the user's systemd read its files again, if it runs. One that does not answer reads them when it starts."""
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if not runtime or not Path(runtime, "systemd", "private").exists():
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["systemctl", "--user", "daemon-reload"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=RELOAD_TIME,
            check=False,
        )
