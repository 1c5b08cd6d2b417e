"""Random operations on one file, on both sides, against a model. Again: AGENTCTL_FSX_SEED=... pytest ..."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.files.harness import Plane, loose_directory

SCRIPT = Path(__file__).resolve().parent / "fsx.py"


def seed() -> str:
    return os.environ.get("AGENTCTL_FSX_SEED") or str(random.SystemRandom().randrange(1 << 32))


def fsx(plane: Plane, operations: int, *arguments: str) -> None:
    argv = [
        sys.executable,
        "-B",
        str(SCRIPT),
        str(plane.guest),
        "--operations",
        str(operations),
        "--seed",
        seed(),
        "--fence",
        str(plane.agent.fence),
    ]
    finished = plane.run([*argv, *arguments], timeout=60 + operations / 100, status=None)
    print(finished.output)
    assert finished.status == 0, f"{finished.output[-12000:]}\n{finished.errors}"
    host = plane.server.use() if plane.with_memory else None
    assert not plane.with_memory or (host is not None and host.received > operations // 100)


def test_both_sides_change_one_file(plane: Plane) -> None:
    fsx(plane, 14_000, "--host", str(plane.host))


def test_both_sides_change_one_file_without_memory(inline: Plane) -> None:
    fsx(inline, 5_000, "--host", str(inline.host))


def test_one_side_changes_a_file(plane: Plane) -> None:
    fsx(plane, 6_000)


@pytest.mark.long
def test_at_length(plane: Plane) -> None:
    fsx(plane, 200_000, "--host", str(plane.host))


def test_the_tester_finds_what_is_wrong() -> None:
    """A file that loses a byte now and then, as a filesystem might: the tester must not be content."""
    broken = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import fsx\n"
        "real, count = os.pwrite, [0]\n"
        "def pwrite(fd, data, offset):\n"
        "    count[0] += 1\n"
        "    return real(fd, bytes(len(data)) if count[0] == 100 else data, offset)\n"
        "os.pwrite = pwrite\n"
        "sys.exit(fsx.main(sys.argv[1:]))"
    )
    with loose_directory() as directory:
        finished = subprocess.run(
            [
                sys.executable,
                "-B",
                "-c",
                broken,
                str(SCRIPT.parent),
                str(directory),
                "--seed",
                "1",
                "--operations",
                "2000",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert finished.returncode == 1
    assert "FAILED: Mismatch" in finished.stdout
    assert "again with --seed 1" in finished.stdout
    assert len(finished.stdout.splitlines()) >= 60
