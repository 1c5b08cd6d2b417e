from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest_agent.view.dockerd import Dockerd


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="ac-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def dockerd(folder: Path) -> Iterator[Dockerd]:
    with Dockerd(folder / "docker.sock") as dockerd:
        yield dockerd
