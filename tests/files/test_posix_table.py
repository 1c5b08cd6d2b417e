"""The table of POSIX operations on the mount, compared with the filesystem below it, row by row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.files.accepted import ACCEPTED
from tests.files.harness import Plane

SCRIPT = Path(__file__).resolve().parent / "posix_table.py"


def outcomes(plane: Plane, directory: Path, names: int) -> dict[str, Any]:
    argv = [
        sys.executable,
        "-B",
        str(SCRIPT),
        str(directory),
        "--names",
        str(names),
        "--seconds",
        str(60 + names // 100),
    ]
    return dict(json.loads(plane.run(argv, cwd=directory, timeout=150 + names / 50).output))


@pytest.fixture(scope="module")
def names(pytestconfig: pytest.Config) -> int:
    """Entries of the very large directory. 600 come in more than one piece."""
    return 100_000 if pytestconfig.getoption("--long") else 600


@pytest.fixture(scope="module")
def below(plane: Plane, names: int) -> dict[str, Any]:
    return outcomes(plane, plane.host, names)


def test_the_mount_is_like_the_filesystem_below_it(plane: Plane, names: int, below: dict[str, Any]) -> None:
    mounted = outcomes(plane, plane.guest, names)
    assert len(below) > 600
    assert mounted.keys() == below.keys()
    assert [row for row, outcome in below.items() if "Error: " in str(outcome)] == []
    wrong = {
        row: {"below": below[row], "mounted": outcome}
        for row, outcome in mounted.items()
        if outcome != below[row] and outcome != ACCEPTED.get(row, (below[row],))[0]
    }
    assert not wrong, json.dumps(wrong, indent=1)
    assert list(plane.host.iterdir()) == []


def test_what_is_accepted_is_a_row(below: dict[str, Any]) -> None:
    assert [row for row in ACCEPTED if row not in below] == []
    assert all(reason for _, reason in ACCEPTED.values())
