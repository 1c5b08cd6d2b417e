from __future__ import annotations

import os
from pathlib import Path

from fileserver.foreign import LOOK_AGAIN, ForeignDevices, devices_of, is_fuse

MOUNTINFO = b"""\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
90 22 0:53 / /mnt/a\\040b rw,nosuid master:2 propagate_from:1 - fuse.agentctl agentctl-7 rw
91 22 0:54 / /mnt/n rw - nfs4 server:/x rw
92 22 0:55 / /mnt/f rw - fuse x rw
93 22 8:1 / /mnt/ntfs rw - fuseblk /dev/sda1 rw
94 22 0:56 / /sys/fs/fuse/connections rw - fusectl fusectl rw
"""


def test_devices_of_fuse() -> None:
    assert devices_of(is_fuse, MOUNTINFO) == {os.makedev(0, 53), os.makedev(0, 55), os.makedev(8, 1)}


def test_a_mount_that_comes_is_known_soon(tmp_path: Path) -> None:
    now = 100.0
    file = tmp_path / "mountinfo"
    file.write_bytes(MOUNTINFO.splitlines()[0] + b"\n")
    devices = ForeignDevices(is_fuse, file, lambda: now)
    assert os.makedev(0, 53) not in devices
    file.write_bytes(MOUNTINFO)
    assert os.makedev(254, 0) not in devices
    now += LOOK_AGAIN
    assert os.makedev(0, 53) in devices
    assert os.makedev(0, 54) not in devices
    assert "something else" not in devices
    # Another mount has the number now.
    file.write_bytes(MOUNTINFO.replace(b"- fuse.agentctl agentctl-7", b"- overlay overlay"))
    assert os.makedev(0, 53) in devices
    now += LOOK_AGAIN
    assert os.makedev(0, 53) not in devices
    assert os.makedev(0, 55) in devices


def test_only_those_that_are_meant(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTINFO)
    devices = ForeignDevices(lambda kind: kind == b"fuse.agentctl", tmp_path / "mountinfo")
    assert [minor for minor in range(50, 60) if os.makedev(0, minor) in devices] == [53]
    assert os.makedev(0, 53) not in ForeignDevices(is_fuse, tmp_path / "none")


def test_of_this_machine() -> None:
    assert os.stat("/proc").st_dev not in ForeignDevices(is_fuse)
