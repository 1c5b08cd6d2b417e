from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import program
from tests.bench.instance import SOURCES, InstanceFailed


def test_two_programs_do_not_share_a_directory(tmp_path: Path) -> None:
    with program.directory(tmp_path / "work") as path:
        assert path == tmp_path / "work"
        with pytest.raises(InstanceFailed, match="another run"):
            with program.directory(path):
                pass
    with program.directory(path):
        pass


def test_the_directory_is_by_default_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with program.directory(None) as path:
        assert path == tmp_path / "agentctl-bench"
        assert path.is_dir()


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo one; echo two", "one"),
        ("echo version 9 >&2", "version 9"),
        ("echo no >&2; exit 1", "unknown"),
        ("true", "unknown"),
    ],
)
def test_what_a_program_says_of_itself(script: str, line: str) -> None:
    assert program.first_line("sh", "-c", script) == line


def test_what_cannot_be_started_is_unknown() -> None:
    assert program.first_line("/nowhere/at-all") == "unknown"


ENDED_TWICE = """
import os, signal, sys
from tests.bench import program
program.end_on_signals()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)
    print("cleared up")
"""


def test_a_second_signal_does_not_cut_the_end_short() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDED_TWICE],
        cwd=SOURCES,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "cleared up\n")


def test_signals_are_taken_only_when_asked_for() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert str(os.cpu_count()) in program.host()["host"]
