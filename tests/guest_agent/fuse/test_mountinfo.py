from __future__ import annotations

import os

import pytest

from guest_agent.fuse import mountinfo
from guest_agent.fuse.mountinfo import Mount

MOUNTINFO = rb"""22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
60 22 0:51 / /home/a\040b\134c rw,nosuid,nodev,relatime shared:9 master:3 - fuse.agentctl agentctl-77 rw,user_id=0
61 60 0:52 / /home/a\040b\134c/inner ro,nosuid,nodev - fuse.agentctl agentctl-78 rw,user_id=0,allow_other
62 22 0:51 /src /var/lib/docker/x rw - fuse.agentctl agentctl-77 rw
63 22 0:53 / /mnt/\377 rw - fuse.sshfs agentctl-79 rw
64 22 0:54 / /odd rw - fuse.agentctl agentctl-x rw
"""


def test_mountinfo_is_read_with_its_escapes_and_optional_fields() -> None:
    mounts = mountinfo.parse_mountinfo(MOUNTINFO)
    assert mounts[0] == Mount(1, "/", "/", False, "ext4", "/dev/vda1")
    assert mounts[1] == Mount(51, "/", "/home/a b\\c", False, "fuse.agentctl", "agentctl-77")
    assert mounts[2].read_only
    assert os.fsencode(mounts[4].path) == b"/mnt/\xff"


def test_ours_are_the_mounts_we_made_and_no_bind_mounts_of_them() -> None:
    ours = mountinfo.mounted_shares(mountinfo.parse_mountinfo(MOUNTINFO))
    assert [(mount.share, mount.device) for mount in ours] == [(77, 51), (78, 52)]


def test_this_machines_mountinfo_can_be_read() -> None:
    """In a chroot there need be none at the root."""
    assert any(mount.path == "/proc" for mount in mountinfo.read_mounts())


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/u/x", True), ("/home/u", False), ("/home/user", False), ("/home", False), ("/home/u/", False)],
)
def test_below_goes_by_whole_components(path: str, expected: bool) -> None:
    assert mountinfo.is_below(path, "/home/u") is expected
    share = Mount(1, "/", "/home/u", False, "fuse.agentctl", "agentctl-1")
    assert mountinfo.leads_through_a_share(path, [share]) is expected
