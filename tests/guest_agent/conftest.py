"""Fixtures for what needs a kernel of one's own, or at least a network namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from guest_agent import datagrams, dial, execute
from guest_agent.tracefs import TRACEFS
from protocol.errors import LinkClosed
from protocol.link import Hello, Link, Role, Service

REPOSITORY = Path(__file__).parents[2]
SCENARIOS = Path(__file__).with_name("namespace_scenarios.py")


def unshare_command() -> list[str]:
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


@pytest.fixture
def in_namespace() -> Callable[[str], dict[str, Any]]:
    """Runs a scenario in a network namespace of its own; skips where that is not permitted."""
    if subprocess.run([*unshare_command(), "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network namespace is not permitted here")

    def run(name: str) -> dict[str, Any]:
        command = [*unshare_command(), sys.executable, "-W", "error", str(SCENARIOS), name]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return run


@pytest.fixture
def tracing() -> Path:
    """The machine's tracefs, mounted if need be; skips where it is not permitted."""
    instances = TRACEFS / "instances"
    if os.geteuid() == 0 and not os.path.isdir(instances):
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACEFS], check=False, capture_output=True)
    if os.geteuid() != 0 or not os.access(instances, os.W_OK):
        pytest.skip("tracefs is not permitted here")
    return TRACEFS


@asynccontextmanager
async def linked(service: Service) -> AsyncIterator[Link]:
    """The host's end of a link whose other end answers with ``service``."""
    host_end, guest_end = trio.testing.memory_stream_pair()
    host = Link(host_end, Role.HOST, Service(), Hello(name="host"))
    guest = Link(guest_end, Role.GUEST, service, Hello(name="guest"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.run)
        await nursery.start(host.run)
        yield host
        with suppress(LinkClosed):  # the test may have said it
            await host.goodbye()


@pytest.fixture
async def host() -> AsyncIterator[Link]:
    """The host's end of a link to what the guest agent dials and executes."""
    service = Service()
    dial.register(service)
    datagrams.register(service)
    execute.register(service, lambda: "")
    async with linked(service) as link:
        yield link
