from __future__ import annotations

import errno
import stat

import pytest

from host_agent.view.attributes import Owner, Ownership, inode, unpack
from protocol.files import ATTR

ME = Ownership(Owner.ME, 1000, 1001)
GUEST = Ownership(Owner.GUEST, 1000, 1001)


def packed(mode: int = stat.S_IFREG | 0o644, size: int = 5, seconds: int = 7) -> bytes:
    return ATTR.pack(11, size, 8, seconds, 8, 9, 1, 2, 3, mode, 1, 999, 998, 0, 4096, 0)


def test_times_are_nanoseconds_also_before_1970() -> None:
    assert unpack(packed()).atime == 7 * 10**9 + 1
    assert unpack(packed(seconds=(1 << 64) - 2)).atime == -2 * 10**9 + 1


@pytest.mark.parametrize(
    "raw", [b"", packed()[:-1], packed(mode=0o644), packed(mode=0o170000), packed(size=1 << 63)]
)
def test_what_no_file_has_is_an_error(raw: bytes) -> None:
    with pytest.raises(OSError) as failed:
        unpack(raw)
    assert failed.value.errno == errno.EIO


def test_the_guests_users_are_me_or_themselves() -> None:
    assert ME.shown(999, 998) == (1000, 1001)
    assert GUEST.shown(999, 998) == (999, 998)


def test_what_is_mine_stays_mine_and_can_be_nobody_elses() -> None:
    assert ME.meant(1000, -1) is None
    assert ME.meant(-1, 1001) is None
    with pytest.raises(PermissionError):
        ME.meant(0, -1)
    assert GUEST.meant(0, -1) == (0, -1)
    assert GUEST.meant(-1, -1) is None


def test_files_of_two_places_are_different_ones() -> None:
    assert inode(1, 42) != inode(2, 42)
    assert inode(1, 42) == inode(1, 42)
    assert 0 < inode(3, 2**64 - 1) < 2**64
