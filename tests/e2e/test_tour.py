"""The README's tour, typed again: it says what the README says it does. Last, since the tour ends with ``stop``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import BOOT_TIME, SOURCES, Instance, eventually, fetch
from tests.tour import shape, steps

pytestmark = pytest.mark.vm

PORT = 8080


@pytest.fixture
def demonstration(vm: Instance) -> None:
    """The container that ``provision/quickstart`` starts."""
    vm.docker("rm", "-f", "agentctl-hello", check=False)
    vm.import_busybox("agentctl-hello", b"Hello from a container in the VM.\n")
    vm.docker("run", "-d", "--name", "agentctl-hello", "-p", f"{PORT}:80", "agentctl-hello")
    eventually(lambda: fetch(PORT))


def test_the_tour(vm: Instance, demonstration: None, project: Path, request: pytest.FixtureRequest) -> None:
    programs = project / "bin"
    programs.mkdir()
    agentctl = programs / "agentctl"
    agentctl.write_text(f'#!/bin/sh\nexec {sys.executable} -m host_agent "$@"\n')
    agentctl.chmod(0o755)
    (programs / ".curlrc").write_text("no-progress-meter\n")  # which a terminal shows differently
    path = f"{programs}:{os.environ['PATH']}:{vm.home / 'tools' / 'bin'}"
    up, *others = steps(SOURCES / "README.md")
    # As it was when these tests began. The first start of a home says more, and news come in any order.
    said = shape(vm.started)
    assert [line for line in shape("\n".join(up.output)) if line not in said] == []
    for step in others:
        done = subprocess.run(
            ["bash", "-c", step.command],
            cwd=project,
            env={**vm.environment, "PATH": path, "CURL_HOME": str(programs)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BOOT_TIME,
            check=False,
        )
        assert shape(done.stdout.decode()) == shape("\n".join(step.output)), step.command
    if request.session.items[-1] is not request.node:
        vm.agentctl("up")
