"""How a tree is served that is no folder of the host's: as a view of a guest's is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fileserver import linux
from fileserver.manner import Manner, is_new
from fileserver.tree import Tree
from protocol.files import (
    ROOT,
    Create,
    Entry,
    List,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
)
from tests.fileserver.served import Journal

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def tree(path: Path, manner: Manner, **options: object) -> Tree:
    return Tree(str(path), read_only=False, recorder=Journal(), manner=manner, **options)  # type: ignore[arg-type]


def entry(made: object) -> Entry:
    assert isinstance(made, Entry)
    return made


@only_root
def test_what_is_made_belongs_to_the_owner_of_the_root(tmp_path: Path) -> None:
    os.chown(tmp_path, 999, 998)
    served = tree(tmp_path, Manner(inherit=True))
    served.perform(Create(1, 0, ROOT, b"file", 0o600, os.O_RDWR))
    made = entry(served.perform(MakeDirectory(1, 0, ROOT, b"folder", 0o700)).value)
    served.perform(MakeSymlink(1, 0, made.node, b"link", b"../file"))
    served.perform(MakeNode(1, 0, made.node, b"fifo", stat.S_IFIFO | 0o600))
    names = ["file", "folder", "folder/link", "folder/fifo"]
    assert {((tmp_path / name).lstat().st_uid, (tmp_path / name).lstat().st_gid) for name in names} == {
        (999, 998)
    }
    served.close()


@only_root
def test_what_was_there_before_is_not_given_away(tmp_path: Path) -> None:
    os.chown(tmp_path, 999, 998)
    (tmp_path / "mine").write_text("")
    served = tree(tmp_path, Manner(inherit=True))
    known = entry(served.perform(Lookup(1, 0, ROOT, b"mine")).value)
    served.perform(MakeLink(1, 0, known.node, ROOT, b"other"))
    served.perform(Create(1, 0, ROOT, b"mine", 0o600, os.O_RDWR))
    assert (tmp_path / "mine").stat().st_uid == 0
    served.close()


def test_who_has_not_just_made_it_has_not_made_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    made = linux.fstatx(descriptor)
    assert is_new(made, os.geteuid())
    assert not is_new(made, os.geteuid() + 1)
    os.link(tmp_path / "a", tmp_path / "b")
    assert not is_new(linux.fstatx(descriptor), os.geteuid())
    os.close(descriptor)


def test_without_that_it_stays_the_servers(tmp_path: Path) -> None:
    served = tree(tmp_path, Manner())
    served.perform(Create(1, 0, ROOT, b"file", 0o600, os.O_RDWR))
    assert (tmp_path / "file").stat().st_uid == os.geteuid()
    served.close()


def test_a_root_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    served = tree(
        Path("/the/name/of/it"), Manner(open_root=lambda: os.open(tmp_path, os.O_PATH | os.O_CLOEXEC))
    )
    folder = entry(served.perform(Lookup(1, 0, ROOT, b"folder")).value)
    served.perform(Create(1, 0, folder.node, b"new", 0o600, os.O_RDWR))
    assert (tmp_path / "folder/new").exists()
    served.close()


def test_what_is_on_a_foreign_device_is_shown_empty(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("")
    foreign: set[int] = set()
    served = tree(tmp_path, Manner(is_foreign=foreign.__contains__))
    foreign.add(tmp_path.stat().st_dev)
    folder = entry(served.perform(Lookup(1, 0, ROOT, b"folder")).value)
    listing = served.perform(List(1, 0, folder.node, 1, 0))
    assert listing.payload == b""
    with pytest.raises(PermissionError):
        served.perform(Lookup(1, 0, folder.node, b"file"))
    served.close()
