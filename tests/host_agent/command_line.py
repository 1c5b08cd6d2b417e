"""The command line, called as a user calls it: in this process, or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from host_agent import cli as module
from host_agent import hints, kind
from host_agent.paths import DEFAULT_INSTANCE

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def agentctl(*words: str) -> Done:
    """Run the command line; it never lets an exception out, whatever happens."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "argv", ["agentctl", *words])
        for name, stream in (("stdin", nothing), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            module.main()
        hints.choose(DEFAULT_INSTANCE)  # a process has one command line; this one has many
        kind.choose(attached=False)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Done(int(ended.value.code or 0), *texts)


def process(*words: str, **options: object) -> Done:
    """The same in a process of its own; it never shows a traceback."""
    settings: dict[str, object] = {"stdin": subprocess.DEVNULL, "capture_output": True, **options}
    done = subprocess.run(
        [sys.executable, "-m", "host_agent", *words],
        cwd=REPOSITORY,
        text=True,
        timeout=30,
        check=False,
        **settings,  # type: ignore[call-overload]
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout or "", done.stderr)


def said(done: Done) -> list[str]:
    """The sentence and the hint."""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: "), lines
    assert len(lines) <= 2, lines
    assert all(line.startswith("hint: ") for line in lines[1:]), lines
    return lines
