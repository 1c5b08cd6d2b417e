"""What a user is told when something cannot be done.

The law here: a ``UserError`` is a sentence that says what is wrong, a hint that says what to do, and
an exit code that scripts may rely on. Exit codes never change their meaning.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit status of the command line, by kind of failure."""

    GENERAL = 1
    USAGE = 2
    DEPENDENCY = 3  # a program this needs is missing or unusable
    RESOURCES = 4  # memory, disk or cpus
    BUSY = 5  # another command is at work on the instance
    NOT_RUNNING = 6
    BOOT = 7
    GUEST = 8  # the guest agent cannot be reached
    DOCKER = 9
    INTERRUPTED = 130  # as a shell reports SIGINT

    @classmethod
    def of(cls, number: str | int) -> ExitCode:
        """The code another process wrote down; GENERAL for one that this version does not know."""
        try:
            return cls(int(number))
        except ValueError:
            return cls.GENERAL


class UserError(Exception):
    """A failure the user can understand: shown as ``message`` and ``hint``, never as a traceback."""

    def __init__(self, message: str, hint: str = "", exit_code: ExitCode = ExitCode.GENERAL) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def qemu_unusable(qemu: os.PathLike[str], problem: str) -> UserError:
    """QEMU is missing or does not run; ``problem`` is a clause."""
    if sys.platform == "darwin":
        hint = "Install it with: brew install qemu"
    else:
        hint = "Install it, on Debian and Ubuntu with: sudo apt-get install qemu-system-x86 qemu-utils"
    return UserError(f"{os.fspath(qemu)} cannot be run: {problem}.", hint, ExitCode.DEPENDENCY)
