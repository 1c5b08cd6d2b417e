from __future__ import annotations

import json
import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from host_agent import config, sizes
from host_agent.config import GIB, MIB, Host, InstanceConfig, Wishes
from host_agent.errors import ExitCode, UserError
from protocol.api import MountSpec

HOST = Host(cpus=8, memory=16 * GIB)
ASKED = InstanceConfig(cpus=4, memory=4 * GIB, disk=60 * GIB, accelerator="auto", identity=str(uuid.uuid4()))


def test_the_first_configuration_is_one_that_the_host_can_honour() -> None:
    for cpus in (1, 2, 64):
        for memory in (GIB, 2 * GIB, 7 * GIB + 12345, 512 * GIB):
            host = Host(cpus, memory)
            chosen = InstanceConfig.default(host)
            config.check(chosen, host)
            assert chosen.memory % MIB == 0
            assert chosen.cpus <= 4
            assert chosen.memory <= 4 * GIB


def test_the_host_is_measured() -> None:
    host = Host.measure()
    assert host.cpus == os.cpu_count()
    assert host.memory > 256 * MIB


def test_a_configuration_is_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config.save(path, ASKED)
    assert config.load(path, HOST) == ASKED


def test_without_a_file_there_is_a_default_with_an_identity_of_its_own(tmp_path: Path) -> None:
    first, second = (config.load(tmp_path / "config.json", HOST) for _ in range(2))
    assert replace(first, identity="") == replace(second, identity="")
    assert uuid.UUID(first.identity) != uuid.UUID(second.identity)


def test_mounts_are_kept_and_a_file_without_them_means_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    path = tmp_path / "config.json"
    chosen = (
        MountSpec("/srv/a", "/a", read_only=True),
        MountSpec("/srv/b", "/b", host_locks=True, real_path="/disk/b"),
    )
    config.save(path, replace(ASKED, mounts=chosen))
    kept = config.load(path, HOST).mounts
    assert kept == chosen
    assert [spec.real_path for spec in kept] == ["", "/disk/b"]
    config.save(path, replace(ASKED, mounts=()))
    assert config.load(path, HOST).mounts == ()
    old = json.loads(path.read_bytes())
    del old["mounts"]
    path.write_text(json.dumps(old))
    assert config.load(path, HOST).mounts == (MountSpec("/home/someone", "/home/someone"),)
    assert config.load(tmp_path / "none", HOST).mounts == (MountSpec("/home/someone", "/home/someone"),)


def test_mounts_of_before_real_paths_were_kept_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config.save(path, replace(ASKED, mounts=(MountSpec("/srv/a", "/a", real_path="/disk/a"),)))
    old = json.loads(path.read_bytes())
    del old["mounts"][0]["real_path"]
    path.write_text(json.dumps(old))
    (spec,) = config.load(path, HOST).mounts
    assert (spec.host_path, spec.guest_path, spec.real_path) == ("/srv/a", "/a", "")


def test_a_mount_that_could_not_be_is_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config.save(path, replace(ASKED, mounts=(MountSpec("/srv/a", "/etc"),)))
    with pytest.raises(UserError, match="is damaged.*/etc cannot be a mount"):
        config.load(path, HOST)


def test_flags_change_what_they_name() -> None:
    wishes = Wishes(cpus=2, disk=80 * GIB)
    assert wishes.applied(ASKED) == replace(ASKED, cpus=2, disk=80 * GIB)
    assert Wishes().applied(ASKED) == ASKED
    # A zero is something that was asked for, to be refused and not to be overlooked.
    assert Wishes(cpus=0).applied(ASKED).cpus == 0
    assert Wishes(mounts=()).applied(ASKED).mounts == ()


def test_shared_memory_is_usual_and_its_absence_remembered(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    without = Wishes(bulk=False).applied(ASKED)
    assert (ASKED.bulk, without.bulk) == (True, False)
    config.save(path, without)
    assert Wishes().applied(config.load(path, HOST)).bulk is False
    assert Wishes(bulk=True).applied(config.load(path, HOST)).bulk is True
    old = json.loads(path.read_bytes())
    del old["bulk"]
    path.write_text(json.dumps(old))
    assert config.load(path, HOST).bulk is True


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"cpus": 4}',
        b"\x00" * 100,
        b'{"cpus": "4", "memory": 1, "disk": 1, "accelerator": "auto", "identity": "'
        + ASKED.identity.encode()
        + b'"}',
        b'{"cpus": 4, "memory": 1, "disk": 1, "accelerator": "auto", "identity": "me"}',
    ],
)
def test_a_damaged_file_is_named_and_not_guessed_at(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is damaged") as caught:
        config.load(path, HOST)
    assert f"rm {path}" in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("asked", "sentence", "hint"),
    [
        (replace(ASKED, cpus=0), "a VM needs at least 1 cpu; asked for 0", "--cpus 1 to 8"),
        (replace(ASKED, cpus=-3), "a VM needs at least 1 cpu; asked for -3", "--cpus 1 to 8"),
        (replace(ASKED, cpus=9), "this machine has 8 cpus; asked for 9", "--cpus 1 to 8"),
        (
            replace(ASKED, memory=100 * MIB),
            "a VM needs at least 512 MiB of memory; asked for 100 MiB",
            "--memory 512MiB to 15872MiB",
        ),
        (
            replace(ASKED, memory=64 * GIB),
            "this machine has 16 GiB of memory and needs some itself; asked for 64 GiB",
            "--memory 512MiB to 15872MiB",
        ),
        (replace(ASKED, disk=GIB), "the disk needs at least 2 GiB; asked for 1 GiB", "--disk 2GiB or more"),
        (replace(ASKED, disk=1 << 60), "the disk can have 15 TiB; asked for", "--disk 2GiB to 15TiB"),
        (replace(ASKED, accelerator="warp"), "'warp' is not an accelerator", "one of auto, kvm, hvf, tcg"),
    ],
)
def test_what_the_host_cannot_honour_is_refused(asked: InstanceConfig, sentence: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        config.check(asked, HOST)
    assert caught.value.message.startswith(sentence)
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code is ExitCode.RESOURCES


def test_the_limits_that_a_hint_names_are_allowed() -> None:
    for memory in ("512MiB", "15872MiB"):
        config.check(replace(ASKED, memory=sizes.parse(memory)), HOST)
    config.check(replace(ASKED, cpus=8, disk=config.MAX_DISK), HOST)


def disk_of(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_disk_never_shrinks(tmp_path: Path) -> None:
    disk = disk_of(tmp_path / "data.img", 60 * GIB + 512)
    with pytest.raises(UserError, match="never shrinks; asked for 60 GiB") as caught:
        config.check_disk(ASKED, disk)
    assert caught.value.exit_code is ExitCode.RESOURCES
    # The size in the hint is one that would be taken.
    size = caught.value.hint.removeprefix("--disk ").split()[0]
    config.check_disk(replace(ASKED, disk=sizes.parse(size)), disk)


def test_a_disk_may_grow_or_be_new(tmp_path: Path) -> None:
    config.check_disk(ASKED, disk_of(tmp_path / "data.img", 2 * GIB))
    config.check_disk(ASKED, tmp_path / "none.img")


def test_a_full_host_is_noticed_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100 * MIB

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match="100 MiB are free where") as caught:
        config.check_disk(ASKED, tmp_path / "data.img")
    assert caught.value.exit_code is ExitCode.RESOURCES


def test_a_disk_that_was_kept_is_as_large_as_it_is(tmp_path: Path) -> None:
    disk = disk_of(tmp_path / "data.img", 100 * GIB)
    assert config.with_kept_disk(ASKED, Wishes(), disk).disk == 100 * GIB
    # Asked for by name, a smaller one is refused by check_disk instead of being overlooked.
    assert config.with_kept_disk(ASKED, Wishes(disk=60 * GIB), disk).disk == 60 * GIB
    assert config.with_kept_disk(ASKED, Wishes(), tmp_path / "none.img") == ASKED
