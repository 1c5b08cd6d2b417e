"""One VM for all of these tests, run exactly as a user would: by the command line, in a home of its own.

AGENTCTL_HOME is taken from the environment if it is set, so that an image built once is found again; the
instance in it is removed before and after. Nothing here uses a registry: the test image is made of the
guest's own busybox.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Instance


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """An instance that does not exist yet."""
    configured = os.environ.get("AGENTCTL_HOME")
    home = Path(configured) if configured else tmp_path_factory.mktemp("home")
    instance = Instance(home, tmp_path_factory.mktemp("docker-config"))
    instance.agentctl("delete", "--data", "--yes")
    yield instance
    # Shown by pytest when something failed: how the VM ended is in its console's last words.
    for name in ("agent.log", "console.log", "qemu.log"):
        log = instance.directory / name
        if log.exists():
            print(f"\n--- {name}\n" + log.read_text(errors="replace")[-6000:])
    instance.agentctl("delete", "--data", "--yes")
    assert instance.processes() == []


@pytest.fixture(scope="session")
def vm(stopped: Instance) -> Instance:
    """The instance, running."""
    stopped.agentctl("up", "--cpus", "2", "--memory", "2GiB", "--disk", "20GiB", timeout=1200)
    return stopped


@pytest.fixture(scope="session")
def image(vm: Instance) -> str:
    """An image of the guest's busybox with a web server for its command; the page says hello."""
    busybox = vm.agentctl("exec", "-u", "root", "cat", "/usr/bin/busybox").stdout
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content, mode in (
            ("bin/busybox", busybox, 0o755),
            ("www/index.html", b"hello\n", 0o644),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        archive.addfile(link)
    command = 'CMD ["/bin/busybox","httpd","-f","-p","80","-h","/www"]'
    vm.docker("import", "-c", command, "-", "hello", input=buffer.getvalue())
    return "hello"


@pytest.fixture
def other_home() -> Iterator[Path]:
    """A home for another instance, not made yet; its name is short, since sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="ac-", ignore_cleanup_errors=True) as directory:
        yield Path(directory) / "h"
