from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from host_agent import bulk_memory, probe
from host_agent.configuration.config import Host, InstanceConfig
from host_agent.doctor import programs
from host_agent.doctor.finding import Finding, Level
from host_agent.errors import ExitCode
from host_agent.paths import Home
from host_agent.probe import Qemu, Verdict
from host_agent.state import InstanceState
from provision import image as images
from provision.image import Image
from provision.machine import Accelerator

NEWS = InstanceState()


@pytest.fixture
def path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that programs are found in."""
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(programs, "_SBIN", str(folder))
    return folder


@pytest.fixture
def config() -> InstanceConfig:
    return replace(InstanceConfig.default(Host(4, 16 << 30)), mounts=())


def program(folder: Path, name: str, body: str = "exit 0") -> Path:
    made = folder / name
    made.write_text(f"#!/bin/sh\n{body}\n")
    made.chmod(0o755)
    return made


def an_image(home: Home, monkeypatch: pytest.MonkeyPatch) -> Image:
    image = Image(home.images / "x", None)  # type: ignore[arg-type]
    image.directory.mkdir()
    image.kernel.touch()
    monkeypatch.setattr(images, "find", lambda store, digest: image)
    return image


# --- QEMU ------------------------------------------------------------------------------------------


async def test_no_qemu(path: Path) -> None:
    found, (finding,) = await programs.qemu()
    assert found is None
    assert (finding.topic, finding.level, finding.exit_code) == ("qemu", Level.PROBLEM, ExitCode.DEPENDENCY)
    assert "apt-get install qemu-system" in finding.fix


@pytest.mark.parametrize(
    ("version", "usage", "said"),
    [
        ("QEMU emulator version 7.2.22 (Debian)", "-sandbox on", []),
        ("QEMU emulator version 10.0.2", "-sandbox on", []),
        ("QEMU emulator version 6.2.0", "-sandbox on", ["nothing below 7.2 was tried"]),
        ("QEMU emulator version 9.0.0", "-nothing", ["does not confine itself"]),
    ],
)
async def test_a_qemu(path: Path, version: str, usage: str, said: list[str]) -> None:
    for name in ("qemu-system-x86_64", "qemu-system-aarch64"):
        program(path, name, f'case $1 in --version) echo "{version}";; -help) printf "\\n{usage} \\n";; esac')
    found, findings = await programs.qemu()
    assert found is not None
    assert found.version == version
    assert [finding.level for finding in findings] == [Level.ADVICE if said else Level.OK]
    assert all(text in finding.message for text, finding in zip(said, findings, strict=False))


async def test_a_qemu_that_does_not_run(path: Path) -> None:
    for name in ("qemu-system-x86_64", "qemu-system-aarch64"):
        program(path, name, "echo 'error while loading shared libraries' >&2; exit 127")
    found, (finding,) = await programs.qemu()
    assert found is None
    assert finding.exit_code == ExitCode.DEPENDENCY


def test_programs_that_are_missing(path: Path) -> None:
    (finding,) = programs.programs()
    assert finding.message == "qemu-img, mke2fs are missing"
    assert finding.fix == "sudo apt-get install qemu-utils e2fsprogs"
    assert finding.exit_code == ExitCode.DEPENDENCY
    program(path, "mke2fs")
    (finding,) = programs.programs()
    assert finding.message == "qemu-img is missing"
    program(path, "qemu-img")
    assert list(programs.programs()) == []


async def test_shared_memory(path: Path, config: InstanceConfig) -> None:
    qemu = Qemu(program(path, "qemu", 'echo "memdev=<link>"'), "x", True)
    assert (await programs.shared_memory(qemu, config)).level is Level.OK
    program(path, "qemu", "echo unknown device")
    found = await programs.shared_memory(qemu, config)
    assert found.level is Level.ADVICE
    assert "virtio-pmem-pci" in found.message
    found = await programs.shared_memory(qemu, replace(config, bulk=False))
    assert found.fix == "agentctl up --bulk"
    assert bulk_memory.NOT_WANTED not in found.message


# --- the accelerator -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exists", "allowed", "flags", "fix"),
    [
        (True, False, "vmx", "sudo usermod -aG kvm $(id -un), then log in again"),
        (True, True, "vmx", "verdicts"),
        (False, False, "fpu vmx hypervisor", "sudo modprobe kvm_intel"),
        (False, False, "fpu svm", "sudo modprobe kvm_amd"),
        (False, False, "fpu hypervisor", "nested virtualisation"),
        (False, False, "fpu", "firmware"),
    ],
)
def test_the_way_to_kvm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, allowed: bool, flags: str, fix: str
) -> None:
    (folder / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n\nflags : other\n")
    if exists:
        (folder / "kvm").touch()
    monkeypatch.setattr(programs, "_CPU", folder / "cpuinfo")
    monkeypatch.setattr(programs, "KVM_DEVICE", folder / "kvm")
    monkeypatch.setattr(programs.sys, "platform", "linux")
    monkeypatch.setattr(os, "access", lambda path, mode: allowed)
    found = programs.judged(Verdict(Accelerator.TCG, "kvm does not work here: so"), folder / "verdicts")
    assert found.level is Level.ADVICE
    assert "kvm does not work here: so" in found.message
    assert fix in found.fix


def test_emulation_that_was_asked_for_is_well() -> None:
    kept = Path("/verdicts")
    assert programs.judged(Verdict(Accelerator.TCG, "asked for"), kept).level is Level.OK
    assert programs.judged(Verdict(Accelerator.KVM, "proved by a boot in 0.2 s"), kept).level is Level.OK


async def judged(
    home: Home, config: InstanceConfig, wanted: str, image: Image | None, last: InstanceState, running: bool
) -> Finding:
    qemu = Qemu(Path("/nowhere/qemu"), "x", True)
    return await programs.accelerator(
        qemu, replace(config, accelerator=wanted), image, home, last, running=running
    )


async def test_before_there_is_an_image_only_the_device_is_looked_at(
    home: Home, config: InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "obstacle", lambda: "")
    assert (await judged(home, config, "auto", None, NEWS, False)).level is Level.OK
    monkeypatch.setattr(probe, "obstacle", lambda: "kvm does not work here: it is not there")
    assert (await judged(home, config, "auto", None, NEWS, False)).level is Level.ADVICE
    found = await judged(home, config, "kvm", None, NEWS, False)
    assert (found.level, found.exit_code) == (Level.PROBLEM, ExitCode.DEPENDENCY)
    assert (await judged(home, config, "tcg", None, NEWS, False)).level is Level.OK


async def test_an_accelerator_that_was_asked_for_and_does_not_work(
    home: Home, config: InstanceConfig, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    image = an_image(home, monkeypatch)
    qemu = Qemu(program(path, "qemu", "echo QEMU 7.2"), "x", True)
    wanted = replace(config, accelerator="hvf" if programs.sys.platform == "linux" else "kvm")
    found = await programs.accelerator(qemu, wanted, image, home, NEWS, running=False)
    assert (found.level, found.exit_code) == (Level.PROBLEM, ExitCode.DEPENDENCY)


async def test_what_runs_is_told_and_not_probed(home: Home, config: InstanceConfig) -> None:
    last = InstanceState(accelerator="kvm", accelerator_reason="proved by a boot in 0.2 s")
    found = await judged(home, config, "auto", None, last, True)
    assert (found.level, found.message) == (Level.OK, "kvm: proved by a boot in 0.2 s")


# --- the image -------------------------------------------------------------------------------------


def test_an_image_that_is_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    image = an_image(home, monkeypatch)
    assert programs.image(home)[0] is image
    assert programs.image(home)[1][0].level is Level.OK


def test_an_image_that_cannot_be_built(home: Home, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, (finding,) = programs.image(home)
    assert found is None
    assert finding.fix == "sudo apt-get install mmdebstrap tar e2fsprogs"
    assert finding.exit_code == ExitCode.DEPENDENCY
    for name in programs.TO_BUILD:
        program(path, name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    _, (finding,) = programs.image(home)
    assert (finding.level, finding.exit_code) == (Level.PROBLEM, ExitCode.RESOURCES)
    assert "uidmap" in finding.fix


@pytest.mark.parametrize(
    ("tools", "uid"), [({"unshare": "exit 0", "newuidmap": ""}, 1000), ({"sudo": ""}, 1000), ({}, 0)]
)
def test_an_image_that_the_next_start_builds(
    home: Home, path: Path, monkeypatch: pytest.MonkeyPatch, tools: dict[str, str], uid: int
) -> None:
    for name in programs.TO_BUILD:
        program(path, name)
    for name, body in tools.items():
        program(path, name, body or "exit 1")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    _, (finding,) = programs.image(home)
    assert finding.level is Level.OK
    assert ("needs sudo" in finding.message) == ("sudo" in tools)


# --- docker ----------------------------------------------------------------------------------------


@pytest.fixture
def cli(path: Path, home: Home) -> Callable[..., None]:
    def make(*plugins: str) -> None:
        program(path, "docker", 'echo "Docker version 28.1"')
        folder = Path(os.environ["DOCKER_CONFIG"]) / "cli-plugins"
        folder.mkdir(parents=True, exist_ok=True)
        for plugin in plugins:
            program(folder, plugin)

    return make


async def test_docker(
    home: Home, path: Path, cli: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs.docker_tools, "SYSTEM_PLUGIN_DIRS", ())
    monkeypatch.setattr(programs.docker_tools, "can_install", lambda: False)
    (finding,) = await programs.docker(home, home.instance())
    assert finding.message == "docker, compose, buildx of the docker command line are missing"
    assert (finding.level, finding.exit_code) == (Level.ADVICE, 0)
    monkeypatch.setattr(programs.docker_tools, "can_install", lambda: True)
    (finding,) = await programs.docker(home, home.instance())
    assert finding.level is Level.OK
    cli("docker-compose")
    (finding,) = await programs.docker(home, home.instance())
    assert finding.message.startswith("buildx of the docker command line is missing;")
    cli("docker-buildx")
    (finding,) = await programs.docker(home, home.instance())
    assert finding.message == f"{path}/docker, with compose and buildx"


async def test_what_keeps_docker_from_the_vm(
    home: Home, cli: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("docker-compose", "docker-buildx")
    monkeypatch.setenv("DOCKER_HOST", "ssh://elsewhere")
    monkeypatch.setenv("DOCKER_CONTEXT", "other")
    (Path(os.environ["DOCKER_CONFIG"]) / "config.json").write_text("{,}")
    host, config = await programs.docker(home, home.instance())
    assert host.level is config.level is Level.ADVICE
    assert host.fix == "unset DOCKER_HOST DOCKER_CONTEXT"
    assert "is not valid JSON" in config.message
    (Path(os.environ["DOCKER_CONFIG"]) / "config.json").write_text(json.dumps({"currentContext": "x"}))
    assert len(await programs.docker(home, home.instance())) == 1
