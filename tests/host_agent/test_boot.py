"""What a boot prepares, as far as it needs no VM."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest

from host_agent.boot import Booter
from host_agent.bulk_memory import NOT_WANTED, SIZE
from host_agent.configuration.config import GIB, InstanceConfig
from host_agent.events import EventLog
from host_agent.paths import Home, InstancePaths
from provision.image import Image
from provision.manifest import Manifest


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """One that says it has the device."""
    program = tmp_path / "qemu-system-x86_64"
    program.write_text("#!/bin/sh\necho '  memdev=<link<memory-backend>>'\n")
    program.chmod(0o755)
    return program


def booter(home: Home, instance: InstancePaths, *, bulk: bool) -> tuple[Booter, list[str]]:
    config = InstanceConfig(1, GIB, 2 * GIB, "auto", str(uuid.uuid4()), bulk=bulk)
    image = Image(home.images, Manifest("d", "trixie", "amd64", "6.12", [], 0, {}, {}))
    events = EventLog()
    said: list[str] = []
    events.say = lambda kind, message, **_: said.append(f"{kind}: {message}")  # type: ignore[method-assign]
    return Booter(home, instance, config, image, events), said


async def test_memory_is_there_until_the_vm_has_booted(
    home: Home, instance: InstancePaths, qemu: Path
) -> None:
    boots, said = booter(home, instance, bulk=True)
    with ExitStack() as until_booted:
        memory = await boots._bulk(qemu, until_booted)
        assert memory is not None
        assert memory.path.stat().st_size == SIZE
    assert not memory.path.exists()
    assert (boots.bulk_memory, boots.bulk_reason, said) == (SIZE, "", [])


async def test_what_is_not_wanted_is_not_announced(home: Home, instance: InstancePaths, qemu: Path) -> None:
    boots, said = booter(home, instance, bulk=False)
    assert await boots._bulk(qemu, ExitStack()) is None
    assert (boots.bulk_memory, boots.bulk_reason, said) == (0, NOT_WANTED, [])


async def test_what_cannot_be_had_is_said_and_the_vm_starts_without(
    home: Home, instance: InstancePaths, qemu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    boots, said = booter(home, instance, bulk=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        assert await boots._bulk(qemu, ExitStack()) is None
    reason = "no 64 MiB of memory for it: Cannot allocate memory"
    assert (boots.bulk_memory, boots.bulk_reason) == (0, reason)
    assert said == [f"no-bulk: no memory is shared with the VM: {reason}"]
    # The next boot has it again, and no reason is left of this one.
    with ExitStack() as until_booted:
        assert await boots._bulk(qemu, until_booted) is not None
    assert (boots.bulk_memory, boots.bulk_reason) == (SIZE, "")
