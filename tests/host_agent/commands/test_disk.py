"""The disk of an instance that does not run; the one of a VM is in test_api_server.py and in the end-to-end tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from host_agent import disks, state
from host_agent.configuration.config import GIB, Host, InstanceConfig, load
from host_agent.errors import ExitCode
from host_agent.paths import InstancePaths
from host_agent.process import ProcessIdentity
from protocol.api import Disk
from tests.host_agent.command_line import agentctl, said

MIB = 1 << 20
TOOLS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
needs_e2fsck = pytest.mark.skipif(shutil.which("e2fsck", path=TOOLS) is None, reason="needs e2fsprogs")


@pytest.fixture
def asked() -> int:
    """The size of an instance of which nothing was said."""
    return InstanceConfig.default(Host.measure()).disk


@pytest.fixture
def made(instance: InstancePaths) -> InstancePaths:
    """Its disk is there, and larger than what is configured, as after ``delete`` without ``--data``."""
    disks.make_data_disk(instance.data_disk, 61 * GIB)
    return instance


def test_a_disk_is_shown_before_it_is_made(instance: InstancePaths, asked: int) -> None:
    shown = json.loads(agentctl("disk", "--json").stdout)
    assert set(shown) == set(Disk.__slots__)
    assert (shown["size"], shown["allocated"], shown["used"]) == (asked, 0, None)
    assert "60 GiB" in agentctl("disk").stdout


@needs_e2fsck
def test_it_grows_and_never_shrinks(made: InstancePaths) -> None:
    done = agentctl("disk", "grow", "62GiB")
    assert done.returncode == 0
    assert "62 GiB" in done.stdout
    assert made.data_disk.stat().st_size == 62 * GIB
    assert load(made, Host.measure()).disk == 62 * GIB
    for size, words in (("61GiB", "never shrinks"), ("16TiB", "can have 15 TiB")):
        refused = agentctl("disk", "grow", size)
        assert refused.returncode == ExitCode.RESOURCES
        sentence, hint = said(refused)
        assert words in sentence
        assert hint
    assert made.data_disk.stat().st_size == 62 * GIB


def test_the_size_of_a_disk_that_is_not_made_yet_is_kept_for_then(
    instance: InstancePaths, asked: int
) -> None:
    assert json.loads(agentctl("disk", "--json", "grow", "80GiB").stdout)["size"] == 80 * GIB
    assert load(instance, Host.measure()).disk == 80 * GIB
    assert not instance.data_disk.exists()


@needs_e2fsck
def test_what_is_free_is_given_back(made: InstancePaths) -> None:
    # What was deleted without a discard: blocks that are taken here, and free in there.
    free = 5 * GIB
    with made.data_disk.open("r+b") as disk:
        disk.seek(free)
        disk.write(os.urandom(8 * MIB))
        os.fsync(disk.fileno())
    before = made.data_disk.stat().st_blocks
    found = json.loads(agentctl("disk", "compact", "--json").stdout)
    assert found["given_back"] >= 8 * MIB
    assert (before - made.data_disk.stat().st_blocks) * 512 >= 8 * MIB
    again = agentctl("disk", "compact")
    assert "there was nothing to give back" in again.stderr
    check = subprocess.run(
        [str(shutil.which("e2fsck", path=TOOLS)), "-f", "-n", str(made.data_disk)],
        capture_output=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout


@needs_e2fsck
def test_what_is_no_filesystem_is_left_alone(instance: InstancePaths) -> None:
    instance.data_disk.write_bytes(b"precious" * 1000)
    done = agentctl("disk", "compact")
    assert done.returncode == ExitCode.GENERAL
    assert "could not be looked through" in said(done)[0]
    assert instance.data_disk.read_bytes() == b"precious" * 1000


def test_without_e2fsck_it_is_said_what_to_install(
    made: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    done = agentctl("disk", "compact")
    assert done.returncode == ExitCode.DEPENDENCY
    assert "e2fsprogs" in said(done)[1]


@pytest.mark.parametrize("words", [("grow", "70GiB"), ("compact",)])
def test_nobody_but_qemu_touches_a_disk_that_it_has(made: InstancePaths, words: tuple[str, ...]) -> None:
    """The host agent and its keeper were killed; this process stands for the VM that lives on."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    identity.write(made.qemu_identity)
    done = agentctl("disk", *words)
    assert done.returncode == ExitCode.BUSY
    assert "runs on without its host agent" in said(done)[0]
    assert made.data_disk.stat().st_size == 61 * GIB


@pytest.mark.parametrize("words", [(), ("grow", "70GiB"), ("compact",)])
def test_without_an_instance_there_is_no_disk(home: object, words: tuple[str, ...]) -> None:
    done = agentctl("disk", *words)
    assert done.returncode == ExitCode.NOT_RUNNING
    assert said(done)[1] == "hint: make it: agentctl up"


def test_a_size_that_is_none_is_refused(instance: InstancePaths) -> None:
    for size in ("abc", "-1", "", "1e9GiB"):
        assert agentctl("disk", "grow", size).returncode == ExitCode.USAGE
    assert not Path(instance.config).exists()


def test_little_room_is_said(made: InstancePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(made.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=3 * GIB))
    assert "3 GiB are left on this machine's disk" in agentctl("disk").stderr
    with state.locked(made.up_lock) as ours:
        assert ours  # nothing is held by then
