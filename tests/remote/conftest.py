"""What these tests need: root, for a machine of their own, and an sshd. In ./provision/test nothing is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.remote.machine import missing

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [
        item
        for item in items
        if isinstance(item, pytest.Function) and HERE in item.path.parents and hasattr(item.module, "site")
    ]
    if not ours or not (reason := missing()):
        return
    if os.geteuid() == 0 and "AGENTCTL_TEST_KERNEL" in os.environ:
        raise pytest.UsageError(f"tests/remote: {reason}, and ./provision/test leaves out nothing")
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=reason))
