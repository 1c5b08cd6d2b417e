from __future__ import annotations

import os
from pathlib import Path

import pytest

from fileserver.root import QUOTA_REMEMBERED, Fullness
from fileserver.tree import Stage
from protocol.files import ROOT, GetAttributes, List, Lookup, MakeSymlink, Read, Rename
from tests.fileserver.served import Served, attr, ordinary_user, serving


def stage(share: Served) -> Stage:
    return share.tree.describe().stage


def test_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    with serving(tmp_path / "later") as share:
        assert stage(share) is Stage.MISSING
        assert share.tree.describe().reason == f"{tmp_path}/later does not exist"
        assert share.refused(GetAttributes, ROOT) == "ENOENT"
        assert share.refused(Lookup, ROOT, b"x") == "ENOENT"
        assert not share.tree.check_root()
        (tmp_path / "later").mkdir()
        assert share.tree.check_root()
        assert (stage(share), share.tree.describe().reason) == (Stage.SERVING, "")
        assert attr(share.ask(GetAttributes, ROOT)).ino == os.stat(tmp_path / "later").st_ino


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with serving(tmp_path / "f") as share:
        assert stage(share) is Stage.NOT_A_DIRECTORY
        assert share.refused(GetAttributes, ROOT) == "ENOTDIR"


@pytest.mark.parametrize("path", ["link", "link/below"])
def test_a_symlink_is_not_followed_not_even_at_first(tmp_path: Path, path: str) -> None:
    """A guest may have put it there before this process came to be."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    with serving(tmp_path / path) as share:
        assert stage(share) is Stage.NOT_A_DIRECTORY
        assert share.refused(GetAttributes, ROOT) == "ENOTDIR"
        (tmp_path / "link").unlink()
        (tmp_path / "real").rename(tmp_path / "link")
        assert share.tree.check_root()
        assert attr(share.ask(GetAttributes, ROOT)).ino == os.stat(tmp_path / path).st_ino


def test_a_symlink_that_a_guest_puts_in_its_place_leads_nowhere(tmp_path: Path) -> None:
    """One share in another: through the outer one, a guest replaces the inner one, or what it is in."""
    (tmp_path / "home" / "work" / "inner").mkdir(parents=True)
    (tmp_path / "secret" / "inner").mkdir(parents=True)
    with serving(tmp_path / "home" / "work" / "inner") as inner, serving(tmp_path / "home") as outer:
        outer.ask(Rename, outer.node("work"), b"inner", ROOT, b"gone")
        outer.ask(MakeSymlink, outer.node("work"), b"inner", os.fsencode(tmp_path / "secret"))
        assert inner.tree.check_root()
        assert stage(inner) is Stage.NOT_A_DIRECTORY
        assert inner.refused(Lookup, ROOT, b"inner") == "ENOTDIR"
        outer.ask(Rename, ROOT, b"work", ROOT, b"away")
        outer.ask(MakeSymlink, ROOT, b"work", os.fsencode(tmp_path / "secret"))
        inner.tree.check_root()
        assert stage(inner) is Stage.NOT_A_DIRECTORY
        assert inner.refused(GetAttributes, ROOT) == "ENOTDIR"


def test_a_replaced_root_is_adopted_and_old_nodes_are_stale(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d" / "f").write_text("old")
    with serving(root) as share:
        file, directory = share.node("d/f"), share.node("d")
        assert share.bytes(Read, file, 0, 3) == b"old"
        os.rename(root, tmp_path / "away")
        (root / "d").mkdir(parents=True)
        (root / "d" / "f").write_text("new")
        assert share.tree.check_root()
        assert not share.tree.check_root()
        assert stage(share) is Stage.SERVING
        assert share.refused(Read, file, 0, 3) == "ESTALE"
        assert share.refused(List, directory, 1, 0) == "ESTALE"
        fresh = share.node("d/f")
        assert fresh > file
        assert share.bytes(Read, fresh, 0, 3) == b"new"
        share.forget(file)
        share.forget(directory, 2)
        share.restart()
        assert share.bytes(Read, fresh, 0, 3) == b"new"


def test_a_deleted_root_and_one_that_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").write_text("f")
    with serving(root) as share:
        node = share.node("f")
        os.rename(root, tmp_path / "away")
        assert share.tree.check_root()
        assert stage(share) is Stage.MISSING
        assert share.refused(GetAttributes, ROOT) == "ENOENT"
        assert share.bytes(Read, node, 0, 1) == b"f", "what is held goes on working"
        os.rename(tmp_path / "away", root)
        assert share.tree.check_root()
        assert stage(share) is Stage.SERVING
        assert share.node("f") == node


def test_what_is_not_held_below_a_missing_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("f", "g"):
        (root / name).touch()
    with serving(root, max_descriptors=1) as share:
        node = share.node("f")
        share.node("g")
        os.rename(root, tmp_path / "away")
        share.tree.check_root()
        assert share.refused(GetAttributes, node) == "ENOENT"
        assert share.tree.describe().lost == 0
        os.rename(tmp_path / "away", root)
        share.tree.check_root()
        assert share.ask(GetAttributes, node)


@pytest.mark.parametrize("mode", [0o000, 0o600, 0o300])
def test_permission_taken_away(mode: int) -> None:
    with ordinary_user() as place:
        root = place / "root"
        root.mkdir()
        with serving(root) as share:
            assert stage(share) is Stage.SERVING
            root.chmod(mode)
            assert share.tree.check_root()
            assert (stage(share), share.tree.describe().reason) == (Stage.DENIED, f"{root} may not be read")
            assert "EACCES" in (share.refused(List, ROOT, 1, 0), share.refused(Lookup, ROOT, b"x"))
            root.chmod(0o700)
            assert share.tree.check_root()
            assert stage(share) is Stage.SERVING


def test_permission_on_the_way_taken_away() -> None:
    with ordinary_user() as place:
        (place / "way" / "root").mkdir(parents=True)
        with serving(place / "way" / "root") as share:
            (place / "way").chmod(0)
            assert share.tree.check_root()
            assert stage(share) is Stage.DENIED
            assert share.refused(GetAttributes, ROOT) == "EACCES"
            (place / "way").chmod(0o700)


def test_a_quota_counts_for_a_while(tmp_path: Path) -> None:
    with serving(tmp_path) as share:
        fullness = Fullness()
        fullness.refused(100.0)
        core = share.tree._core
        fullness.check(core, 101.0)
        assert fullness.full
        fullness.check(core, 100.0 + QUOTA_REMEMBERED)
        assert not fullness.full


def test_a_full_disk_counts_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fullness = Fullness()
    fullness.refused(100.0)
    with serving(tmp_path) as share:
        real = os.fstatvfs
        parts = list(os.statvfs(tmp_path))
        parts[4] = 0  # f_bavail
        monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result(parts))
        fullness.check(share.tree._core, 1e9)
        assert fullness.full
        monkeypatch.setattr(os, "fstatvfs", real)
        fullness.check(share.tree._core, 1e9)
        assert not fullness.full
