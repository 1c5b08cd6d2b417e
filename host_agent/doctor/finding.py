"""What a check has found: a word for what was looked at, a sentence, and what to do. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from host_agent.errors import ExitCode, UserError
from provision.errors import ProvisionError


class Level(StrEnum):
    """``ADVICE``: everything works, and could be faster or safer. ``PROBLEM``: something does not work."""

    OK = "ok"
    ADVICE = "advice"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """``topic`` is a word that never changes its meaning, ``message`` a sentence, ``fix`` a command or what else to do.
    ``exit_code`` is that of a problem, 0 of all else."""

    topic: str
    level: Level
    message: str
    fix: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order of the checks. ``exit_code`` is the first problem's: what ``up`` would end with."""

    findings: tuple[Finding, ...]
    exit_code: int

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Diagnosis:
        found = tuple(findings)
        return cls(found, next((finding.exit_code for finding in found if finding.exit_code), 0))

    def count(self, level: Level) -> int:
        return sum(finding.level is level for finding in self.findings)


def ok(topic: str, message: str) -> Finding:
    return Finding(topic, Level.OK, message)


def advice(topic: str, message: str, fix: str = "") -> Finding:
    return Finding(topic, Level.ADVICE, message, fix)


def problem(topic: str, message: str, fix: str = "", code: ExitCode = ExitCode.GENERAL) -> Finding:
    return Finding(topic, Level.PROBLEM, message, fix, int(code))


def of_error(topic: str, error: UserError | ProvisionError) -> Finding:
    """The problem that ``up`` would end with."""
    code = error.exit_code if isinstance(error, UserError) else ExitCode.DEPENDENCY
    return problem(topic, error.message.removesuffix("."), error.hint.removesuffix("."), code)
