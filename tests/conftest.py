"""Options of the whole test run."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest

# Hypothesis keeps examples beside the sources; a test user may not write there.
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), f"hypothesis-{os.getuid()}")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the full length of every campaign")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` a module's tests run in one process, and all of tests/files do.

    These keep two agents and a kernel busy, and look for what the host has changed as soon as it has.
    """
    from xdist.scheduler import LoadFileScheduling

    class LoadFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/files" if nodeid.startswith("tests/files/") else super()._split_scope(nodeid)

    return LoadFiles(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="a full-length campaign; run with --long")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether campaigns are to take their full length."""
    return bool(pytestconfig.getoption("--long"))
