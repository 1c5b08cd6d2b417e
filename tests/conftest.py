"""Options of the whole test run."""

from __future__ import annotations

import os
import tempfile

import pytest

# Hypothesis keeps examples beside the sources; a test user may not write there.
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), f"hypothesis-{os.getuid()}")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the full length of every campaign")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="a full-length campaign; run with --long")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)
