"""What a user's machine looks like to the tests: a home of their own, and nothing else of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent.paths import Home, InstancePaths


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A private home, also of docker's configuration. Its name is short: sockets are made in it."""
    directory = Path(tempfile.mkdtemp(prefix="ac-"))
    monkeypatch.setenv("AGENTCTL_HOME", str(directory / "h"))
    monkeypatch.setenv("DOCKER_CONFIG", str(directory / "docker"))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    found = Home.find()
    found.ensure()
    yield found
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def instance(home: Home) -> InstancePaths:
    """An instance that was never started, with its folder."""
    paths = home.instance()
    paths.ensure()
    return paths


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="ac-"))
    yield path
    shutil.rmtree(path)
