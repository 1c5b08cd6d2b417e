"""What these tests need: root, for a mount namespace, and FUSE with its library. In ./provision/test nothing is left out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from host_agent.view import library

HERE = Path(__file__).resolve().parent
PROGRAMS = ("fusermount3", "git", "nsenter", "setpriv", "unshare")


def missing() -> str:
    """What is missing here, as a sentence; empty if nothing is."""
    if os.geteuid() != 0:
        return "only root makes mount namespaces"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    if library.find_library() is None:
        return "needs libfuse 3"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    if not ours or not (reason := missing()):
        return
    if os.geteuid() == 0 and "AGENTCTL_TEST_KERNEL" in os.environ:
        raise pytest.UsageError(f"tests/view: {reason}, and ./provision/test leaves out nothing")
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=reason))
