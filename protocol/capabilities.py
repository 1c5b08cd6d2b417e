"""What can be done on an attached machine as its user: ``check`` there finds it, and its host goes by it.

The law: whoever reads it bounds it, field by field; it is a stranger's text (``host_agent.remote.machine``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not work on the machine, and what would make it work; sentences for a person who is not at it."""

    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Mounts:
    """Whether folders can be mounted: ``how`` is ``root`` or ``fusermount3``."""

    ok: bool = False
    how: str = ""
    allow_other: bool = False
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Docker:
    """Docker's socket, as a path on the machine, if its user can use it; else why not."""

    socket: str = ""
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``ports`` is ``tracefs`` or ``polling``; ``problems`` is all that a person is shown.

    ``ssh_port`` is where the machine's sshd listens, or 0.
    """

    python: str
    uid: int
    user: str
    home: str
    root: bool = False
    kernel: str = ""
    mounts: Mounts = Mounts()
    ports: str = ""
    docker: Docker = Docker()
    problems: tuple[Problem, ...] = ()
    ssh_port: int = 0

    def to_json(self) -> str:
        """One line of ASCII, so that no locale is in its way."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=True)
