"""The user's editor, on one file."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from host_agent.errors import ExitCode, UserError

#: What is tried where the environment names none; Debian's and Fedora's own first.
_USUAL = ("editor", "vim", "vi", "nano")


def command() -> list[str]:
    """Raises ``UserError`` if there is none."""
    for variable in ("VISUAL", "EDITOR"):
        if words := shlex.split(os.environ.get(variable, "")):
            if shutil.which(words[0]) is None:
                raise UserError(
                    f"${variable} is {words[0]}, which is not there",
                    f"set {variable} to your editor, like: export {variable}=nano",
                    ExitCode.DEPENDENCY,
                )
            return words
    for name in _USUAL:
        if found := shutil.which(name):
            return [found]
    raise UserError(
        "there is no editor",
        "set EDITOR to yours, or change single keys: agentctl config set",
        ExitCode.DEPENDENCY,
    )


def edit(path: Path) -> None:
    """Returns when the user is done. Raises ``UserError`` if the editor fails."""
    words = command()
    status = subprocess.run([*words, str(path)], check=False).returncode
    if status:
        raise UserError(f"{words[0]} ended with status {status}")
