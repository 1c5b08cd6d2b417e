from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fileserver.owner import NOBODY, Owner
from protocol.files import SET_GID, SET_UID, GetAttributes, SetAttributes
from tests.fileserver.served import attr, serving

OWNER = Owner(7, 8, own=(1000, 100))


def test_what_is_ours_is_the_users_and_all_else_nobodys() -> None:
    assert OWNER.shown(1000, 100) == (7, 8)
    assert OWNER.shown(1000, 5) == (7, NOBODY)
    for uid in (0, 7, 8, 65534):
        assert OWNER.shown(uid, 100) == (NOBODY, 8)


def test_what_is_given_to_the_user_or_to_root_is_ours() -> None:
    assert OWNER.meant(7, 8) == (1000, 100)
    assert OWNER.meant(0, 0) == (1000, 100)
    assert OWNER.meant(7, -1) == (1000, -1)
    assert OWNER.meant(-1, 8) == (-1, 100)


@pytest.mark.parametrize("ids", [(1000, -1), (-1, 100), (NOBODY, -1), (7, 7)])
def test_nobody_else_is_given_anything(ids: tuple[int, int]) -> None:
    with pytest.raises(OSError) as caught:
        OWNER.meant(*ids)
    assert caught.value.errno == errno.EPERM


def test_a_tree_shows_its_files_so(tmp_path: Path) -> None:
    with serving(tmp_path) as share:
        (share.path / "f").touch()
        node = share.node("f")
        share.tree.show_as(Owner(7, 8))
        found = attr(share.ask(GetAttributes, node))
        assert (found.uid, found.gid) == (7, 8)
        share.ask(SetAttributes, node, SET_UID | SET_GID, uid=7, gid=8)
        assert share.refused(SetAttributes, node, SET_UID, uid=9) == "EPERM"
        status = (share.path / "f").stat()
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        share.tree.show_as(None)
        found = attr(share.ask(GetAttributes, node))
        assert (found.uid, found.gid) == (os.geteuid(), os.getegid())
