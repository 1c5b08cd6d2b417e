"""What these tests need: root, FUSE, and the programs that they run. In ./provision/test nothing is left out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.harness import Plane
from tests.files.sight import Sight

HERE = Path(__file__).resolve().parent
PROGRAMS = ("cc", "fio", "git", "make", "nsenter", "sqlite3", "stress-ng", "unshare")


def missing() -> str:
    """What is missing here, as a sentence; empty if nothing is."""
    if os.geteuid() != 0:
        return "only root mounts with allow_other and becomes other users"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    if not ours or not (reason := missing()):
        return
    if os.geteuid() == 0 and "AGENTCTL_TEST_KERNEL" in os.environ:
        raise pytest.UsageError(f"tests/files: {reason}, and ./provision/test leaves out nothing")
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    """One share, mounted, for all tests of a module; each leaves it as it was."""
    with Plane() as plane:
        yield plane
        assert plane.server.alive()
        assert plane.agent.alive()


@pytest.fixture(scope="module")
def inline() -> Iterator[Plane]:
    """As ``plane``, but without memory that both sides have."""
    with Plane(with_memory=False) as plane:
        yield plane


@pytest.fixture(scope="module")
def sight(plane: Plane) -> Iterator[Sight]:
    """A program of the guest that looks at the share."""
    with plane.sight() as sight:
        yield sight


@pytest.fixture(scope="module")
def second(plane: Plane) -> Iterator[Sight]:
    """Another one."""
    with plane.sight() as sight:
        yield sight
