from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from host_agent import disks
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from provision.image import Image, Manifest

MIB = 1 << 20

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


@pytest.fixture
def image(tmp_path: Path) -> Image:
    (tmp_path / "root.img").write_bytes(b"\0" * MIB)
    return Image(tmp_path, Manifest("d", "trixie", "amd64", "6.12", [], 0, {}, {}))


@needs_qemu_img
def test_the_disks_of_a_boot(instance: InstancePaths, image: Image) -> None:
    disks.prepare(instance, image, 64 * MIB)
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", instance.root_overlay], capture_output=True, check=True
    )
    info = json.loads(told.stdout)
    assert (info["format"], info["virtual-size"]) == ("qcow2", MIB)
    assert Path(info["backing-filename"]) == image.root
    assert info["backing-filename-format"] == "raw"
    assert instance.data_disk.stat().st_size == 64 * MIB
    assert instance.data_disk.stat().st_blocks * 512 < MIB, "a new disk takes next to no room"
    assert b"agentctl-data" in instance.data_disk.read_bytes()[1024:2048], "the label of its superblock"
    with tarfile.open(instance.agent_drive) as drive:
        assert "guest_agent/__main__.py" in drive.getnames()
    for path in (instance.root_overlay, instance.data_disk, instance.agent_drive):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@needs_qemu_img
def test_the_next_boot_has_a_fresh_root_and_the_same_data(instance: InstancePaths, image: Image) -> None:
    disks.prepare(instance, image, 64 * MIB)
    instance.root_overlay.write_bytes(b"what the last boot wrote")
    with instance.data_disk.open("r+b") as disk:
        disk.write(b"precious")
    disks.prepare(instance, image, 128 * MIB)
    assert instance.root_overlay.read_bytes().startswith(b"QFI\xfb")
    assert instance.data_disk.stat().st_size == 128 * MIB
    assert instance.data_disk.read_bytes().startswith(b"precious")


def test_a_data_disk_is_never_shortened(tmp_path: Path) -> None:
    disk = tmp_path / "data.img"
    disks.make_data_disk(disk, 64 * MIB)
    with pytest.raises(UserError, match="never shrinks") as caught:
        disks.grow_data_disk(disk, 32 * MIB)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert caught.value.hint == "--disk 64MiB or more"
    assert disk.stat().st_size == 64 * MIB


def test_a_data_disk_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    """A power cut in mke2fs: what it left has another name, so it is no data disk yet."""
    disk = tmp_path / "data.img"
    (tmp_path / "data.img.new").write_bytes(b"half a filesystem")
    disks.make_data_disk(disk, 64 * MIB)
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", disk], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"data.img"}


def test_an_existing_data_disk_is_never_made_again(tmp_path: Path) -> None:
    disk = tmp_path / "data.img"
    disk.write_bytes(b"precious")
    disks.make_data_disk(disk, 64 * MIB)
    assert disk.read_bytes() == b"precious"


def test_a_data_disk_for_which_there_is_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mke2fs").write_text("#!/bin/sh\necho 'mke2fs: No space left on device' >&2\nexit 1\n")
    (programs / "mke2fs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="No space left") as caught:
        disks.make_data_disk(tmp_path / "d" / "data.img", 64 * MIB)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert list((tmp_path / "d").iterdir()) == []


def test_without_qemu_img_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="qemu-img is missing") as caught:
        disks.make_overlay(tmp_path / "root.qcow2", tmp_path / "root.img")
    assert caught.value.exit_code is ExitCode.DEPENDENCY
    assert "qemu-utils" in caught.value.hint


@needs_qemu_img
def test_what_qemu_img_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not make the root overlay: .*missing\.img") as caught:
        disks.make_overlay(tmp_path / "root.qcow2", tmp_path / "missing.img")
    assert caught.value.exit_code is ExitCode.RESOURCES


def test_a_full_disk_is_a_sentence(
    instance: InstancePaths, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disks, "make_overlay", full)
    with pytest.raises(
        UserError, match="cannot write the disks of instance default: No space left"
    ) as caught:
        disks.prepare(instance, image, 64 * MIB)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert "free some space" in caught.value.hint
