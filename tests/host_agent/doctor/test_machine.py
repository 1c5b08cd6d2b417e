from __future__ import annotations

import os
import platform
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from host_agent.configuration.config import GIB, Host, InstanceConfig
from host_agent.disk_room import LITTLE_ROOM
from host_agent.doctor import machine
from host_agent.doctor.finding import Level
from host_agent.errors import ExitCode
from host_agent.paths import Home, InstancePaths
from provision.image import BUILD_SPACE

HOST = Host(cpus=4, memory=16 * GIB)


@pytest.fixture
def config() -> InstanceConfig:
    return replace(InstanceConfig.default(HOST), mounts=())


def free(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, amount))


def test_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, architecture, level in (
        ("Linux", "x86_64", Level.OK),
        ("Linux", "aarch64", Level.ADVICE),
        ("Darwin", "arm64", Level.ADVICE),
        ("Linux", "riscv64", Level.PROBLEM),
    ):
        monkeypatch.setattr(platform, "system", lambda kernel=kernel: kernel)
        monkeypatch.setattr(platform, "machine", lambda architecture=architecture: architecture)
        assert machine.system().level is level


def test_a_home_that_is_there_or_can_be_made(home: Home, folder: Path) -> None:
    assert machine.home(home, home.instance()).level is Level.OK
    new = Home(folder / "one" / "two")
    assert machine.home(new, InstancePaths(new.root / "instance")).level is Level.OK
    assert not new.root.parent.exists()


def test_a_home_that_cannot_be(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = Home(tmp_path / ("x" * 120))
    found = machine.home(long, long.instance())
    assert (found.level, found.exit_code) == (Level.PROBLEM, ExitCode.USAGE)
    assert "AGENTCTL_HOME" in found.fix
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: home.root.stat().st_uid + 1)
        assert "belongs to another user" in machine.home(home, home.instance()).message
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = machine.home(home, home.instance())
    assert "you may not write" in found.message
    assert found.level is Level.PROBLEM


def test_a_configuration_is_read_and_judged(instance: InstancePaths) -> None:
    config, found = machine.configured(instance, HOST)
    assert found == []
    assert not instance.config.exists()
    _, (finding,) = machine.configured(instance, Host(cpus=0, memory=16 * GIB))
    assert (finding.topic, finding.exit_code) == ("configuration", ExitCode.RESOURCES)
    instance.config.write_text('{"cpus": ')
    config, (finding,) = machine.configured(instance, HOST)
    assert config.cpus == 4
    assert (finding.level, finding.exit_code) == (Level.PROBLEM, ExitCode.USAGE)
    assert finding.fix == "correct it: agentctl config edit"


def test_memory_that_is_not_free(config: InstanceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(3 * GIB))
    found = machine.memory(config, running=False)
    assert found.level is Level.ADVICE
    assert found.fix.endswith("agentctl up --memory 1536MiB")
    assert machine.memory(config, running=True).level is Level.OK
    assert machine.memory(replace(config, memory=3 * GIB), running=False).level is Level.OK
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1))
    assert machine.memory(config, running=False).fix.endswith("--memory 512MiB")


def test_the_disk(
    config: InstanceConfig, home: Home, instance: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*, has_image: bool = True) -> tuple[Level, int]:
        (finding,) = machine.disk(config, home, instance, has_image=has_image)
        return finding.level, finding.exit_code

    free(monkeypatch, GIB - 1)
    assert looked() == (Level.PROBLEM, ExitCode.RESOURCES)
    free(monkeypatch, GIB)
    assert looked() == (Level.ADVICE, 0)
    assert looked(has_image=False) == (Level.PROBLEM, ExitCode.RESOURCES)
    free(monkeypatch, BUILD_SPACE)
    assert looked(has_image=False) == (Level.ADVICE, 0)
    free(monkeypatch, LITTLE_ROOM)
    assert looked() == looked(has_image=False) == (Level.OK, 0)
    # Nothing more can come of a disk that is all there.
    free(monkeypatch, GIB)
    small = replace(config, disk=2 << 20)
    instance.data_disk.write_bytes(bytes(2 << 20))
    (finding,) = machine.disk(small, home, instance, has_image=True)
    assert finding.level is Level.OK


def test_where_nothing_is_yet_its_disk_is_that_of_what_is_above(tmp_path: Path) -> None:
    assert machine.existing(tmp_path / "a/b/c") == tmp_path
    assert machine.existing(tmp_path) == tmp_path
