"""The README's tour as a script: what is typed, and what is said, with what differs from run to run taken out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: What depends on the machine and the moment, and how it is written instead; in this order.
_VARIABLE = (
    (re.compile(r"\S*/instances/default/"), "INSTANCE/"),
    (re.compile(r"/home/[a-z][-a-z0-9_.]*|/root"), "HOME"),
    (re.compile(r"\b[0-9a-f]{12,}\b"), "ID"),
    (re.compile(r"\b(Less than a|About an?|\d+) (second|minute|hour)s?\b"), "A WHILE"),
    (re.compile(r"\b\d+ (s|min|h|d)\b( \d+ (s|min|h)\b)*"), "A WHILE"),
    (re.compile(r":::"), "[::]:"),  # docker's command lines differ
    (re.compile(r"\d+(\.\d+)?( [KMGT]iB)?"), "N"),
    (re.compile(r"\s{2,}"), "  "),
)

#: Lines of an emulated VM, which one with hardware virtualisation does not have.
_EMULATED = re.compile(r"\btcg\b|\bkvm\b|emulated", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the tour, and the lines that it prints."""

    command: str
    output: tuple[str, ...]


def steps(readme: Path) -> list[Step]:
    """The console block of ``readme``: a command after each ``$``, its output until an empty line or the next."""
    (block,) = _BLOCK.findall(readme.read_text())
    found: list[Step] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Step(_without_comment(line[2:]), ()))
        elif line:
            last = found[-1]
            found[-1] = Step(last.command, (*last.output, line))
    return found


def _without_comment(command: str) -> str:
    return re.sub(r"\s{2,}# .*$", "", command)


def shape(output: str) -> list[str]:
    """The lines of ``output`` that every machine prints, without what differs."""
    lines = []
    for line in output.splitlines():
        if not line.strip() or _EMULATED.search(line):
            continue
        for pattern, instead in _VARIABLE:
            line = pattern.sub(instead, line)
        lines.append(line.rstrip())
    return lines
