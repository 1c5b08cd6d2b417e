"""A short private directory: sockets are made in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="ac-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
