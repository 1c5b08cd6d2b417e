"""One VM for all of these tests, run exactly as a user would: by the command line, in a home of its own.

AGENTCTL_HOME is taken from the environment if it is set, so that an image built once is found again; the
instance in it is removed before and after. Nothing here uses a registry: the test image is made of the
guest's own busybox.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.harness import Instance

LOG_SHOWN = 6000
"""Characters of each log that are shown with a failure; a kernel's last words are within them."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure comes what the instance has logged so far: the next test may start another VM."""
    report = yield
    instance = getattr(item, "funcargs", {}).get("stopped")
    if report.failed and isinstance(instance, Instance):
        for name in ("agent.log", "console.log", "qemu.log"):
            with suppress(OSError):
                text = (instance.directory / name).read_text(errors="replace")
                report.sections.append((name, text[-LOG_SHOWN:]))
    return report


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """An instance that does not exist yet."""
    configured = os.environ.get("AGENTCTL_HOME")
    home = Path(configured) if configured else tmp_path_factory.mktemp("home")
    instance = Instance(home, tmp_path_factory.mktemp("docker-config"))
    instance.agentctl("delete", "--data", "--yes")
    yield instance
    instance.agentctl("delete", "--data", "--yes")
    assert instance.processes() == []


@pytest.fixture(scope="session")
def vm(stopped: Instance) -> Instance:
    """The instance, running."""
    flags = ("--cpus", "2", "--memory", "2GiB", "--disk", "20GiB")
    done = stopped.agentctl("up", *flags, timeout=1200, cwd=str(Path.home()))
    return replace(stopped, started=(done.stderr + done.stdout).decode())


@pytest.fixture(scope="session")
def image(vm: Instance) -> str:
    """An image of the guest's busybox with a web server for its command; the page says hello."""
    vm.import_busybox("hello", b"hello\n")
    return "hello"


@pytest.fixture
def project() -> Iterator[Path]:
    """A folder of the user's, below the home that is shared by default."""
    folder = Path(tempfile.mkdtemp(prefix="agentctl-e2e-", dir=Path.home()))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def other_home() -> Iterator[Path]:
    """A home for another instance, not made yet; its name is short, since sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="ac-", ignore_cleanup_errors=True) as directory:
        yield Path(directory) / "h"
