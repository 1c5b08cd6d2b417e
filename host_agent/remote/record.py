"""What is kept of an attached instance: which machine it is, and where the agent is there.

The law: an instance is an attached one if and only if it has this record. Whoever is quick (``status``, a prompt) reads
it, so that it imports nothing of SSH; and no secret is ever in it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass

from host_agent.errors import ExitCode, UserError
from host_agent.files import parse_record, write_atomically
from host_agent.paths import InstancePaths


@dataclass(frozen=True, slots=True)
class Attached:
    """``address`` is the user's own word for the machine, ``session`` the name of what runs there for us.

    ``keep``: what runs there goes on when nobody is attached. ``program``, the words of a shell that run the agent
    there, and ``home``, of the user there, are of the last time that it was reached, and empty before.
    """

    address: str
    session: str
    keep: bool = False
    program: str = ""
    home: str = ""

    def command(self, *words: str) -> str:
        """What runs the agent there, for any shell."""
        return f"{self.program} {shlex.join(words)}"


def load(paths: InstancePaths) -> Attached | None:
    """None of an instance that is a VM, or none yet. Raises ``UserError`` for a damaged record."""
    try:
        return parse_record(Attached, paths.attached.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{paths.attached} is damaged ({error})",
            f"remove the instance, and attach the machine again: agentctl delete, agentctl attach --name {paths.name}",
            ExitCode.USAGE,
        ) from None


def save(paths: InstancePaths, record: Attached) -> None:
    """Raises ``OSError``."""
    write_atomically(paths.attached, json.dumps(asdict(record), indent=1).encode() + b"\n")


def refuse(paths: InstancePaths, what: str, hint: str) -> None:
    """Raise ``UserError`` (USAGE) if the instance is an attached one; ``what`` is a sentence about VMs alone."""
    if paths.attached.exists():
        raise UserError(what, hint, ExitCode.USAGE)
