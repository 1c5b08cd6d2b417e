"""What filesystems are believed, and that what is known of a device is forgotten."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from fileserver import linux
from fileserver.devices import KERNEL_FILESYSTEMS, Device, Devices, described, tells
from fileserver.signatures import COARSE_NS, NEVER_NS, UNSETTLED_NS

EXT4, OVERLAY, HFS_PLUS = 0xEF53, 0x794C7630, 0x482B
XFS, BTRFS, TMPFS = 0x58465342, 0x9123683E, 0x01021994
NFS, SMB2, FUSE, CEPH, NINE_P, FAT, HFS = (
    0x6969,
    0xFE534D42,
    0x65735546,
    0x00C36400,
    0x01021997,
    0x4D44,
    0x4244,
)


@pytest.fixture
def status(tmp_path: Path) -> linux.Status:
    descriptor = os.open(tmp_path, os.O_PATH)
    status = linux.fstatx(descriptor)
    os.close(descriptor)
    return status


def test_local_disks_have_fine_time_stamps() -> None:
    assert described(EXT4) == Device(births=True, unsettled_ns=UNSETTLED_NS, accounts=True)
    assert described(OVERLAY) == Device(births=False, unsettled_ns=UNSETTLED_NS)
    assert described(HFS_PLUS).unsettled_ns == COARSE_NS > 2 * 10**9


@pytest.mark.parametrize("filesystem", [NFS, SMB2, FUSE, CEPH, NINE_P, FAT, HFS, 0x12345678])
def test_time_stamps_that_prove_nothing(filesystem: int) -> None:
    assert described(filesystem).unsettled_ns == NEVER_NS


@pytest.mark.parametrize(
    "filesystem", [NFS, SMB2, FUSE, CEPH, NINE_P, OVERLAY, HFS_PLUS, 0x12345678, *KERNEL_FILESYSTEMS]
)
def test_filesystems_on_which_things_happen_without_a_word(filesystem: int) -> None:
    assert not tells(filesystem)
    assert not described(filesystem).accounts


def test_filesystems_whose_changes_are_all_told() -> None:
    assert all(tells(filesystem) for filesystem in (EXT4, XFS, BTRFS, TMPFS))
    assert all(described(filesystem).accounts for filesystem in (EXT4, XFS, BTRFS, TMPFS))


def test_a_device_is_asked_once_until_it_is_forgotten(
    status: linux.Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another filesystem's by then."""
    kinds = iter([EXT4, FUSE, EXT4])
    monkeypatch.setattr(linux, "filesystem_type", lambda descriptor: next(kinds))
    devices = Devices()
    assert not devices.is_key((status.device, status.ino, status.birth_ns()), status)
    assert devices.key(status, 0) == (status.device, status.ino, status.birth_ns())
    assert devices.is_key(devices.key(status, 0), status)
    assert not devices.is_key((status.device, status.ino + 1, status.birth_ns()), status)
    assert devices.of(status.device, 0).unsettled_ns == UNSETTLED_NS
    devices.forget()
    assert devices.of(status.device, 0).unsettled_ns == NEVER_NS
    assert devices.of(status.device + 1, 0).unsettled_ns == UNSETTLED_NS


def test_a_number_that_is_given_out_again_is_another_file_s(tmp_path: Path) -> None:
    devices, keys, numbers = Devices(), [], set()
    for _ in range(20):
        (tmp_path / "f").touch()
        descriptor = os.open(tmp_path / "f", os.O_PATH)
        status = linux.fstatx(descriptor)
        keys.append(devices.key(status, descriptor))
        numbers.add(status.ino)
        os.close(descriptor)
        (tmp_path / "f").unlink()
        time.sleep(0.005)  # a time of birth is that of the last tick
    assert len(set(keys)) == 20
    if len(numbers) == 20:
        pytest.skip("this filesystem gives no number out again")


def test_times_of_birth_on_overlayfs(status: linux.Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "filesystem_type", lambda descriptor: OVERLAY)
    devices = Devices()
    assert devices.key(status, 0) == (status.device, status.ino, 0)
    assert devices.is_key((status.device, status.ino, 0), status)


def test_what_is_the_kernel_s_is_refused_again_and_again() -> None:
    descriptor = os.open("/proc", os.O_PATH)
    devices, status = Devices(), linux.fstatx(descriptor)
    for _ in range(2):
        with pytest.raises(OSError) as refused:
            devices.key(status, descriptor)
        assert refused.value.errno == errno.EACCES
    os.close(descriptor)
    assert EXT4 not in KERNEL_FILESYSTEMS
