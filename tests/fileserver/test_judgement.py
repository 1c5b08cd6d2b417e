"""Each call is begun by a server that is killed: before it was done, after it was done, or half-way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.api import Done
from protocol.files import (
    ROOT,
    SET_SIZE,
    Allocate,
    CopyRange,
    Create,
    CreateUnnamed,
    FileCall,
    Forget,
    GetAttributes,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Removed,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    Renamed,
    SetAttributes,
    SetXattr,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, attr, refused, serving

EXCHANGE = 2


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "d").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "f").write_text("f")
    (tmp_path / "g").write_text("g")
    with serving(tmp_path) as share:
        for name in ("d", "empty", "f", "g"):
            share.node(name)
        yield share


def again(
    share: Served, call: FileCall[Any], payload: bytes = b"", *, done: bool, meanwhile: Any = None
) -> Any:
    """The answer of a server that was started after one was killed which had, or had not, ``done`` the call."""
    precondition = share.tree.precondition(call)
    if done:
        share.tree.perform(call, payload)
    share.restart()
    if meanwhile is not None:
        meanwhile()
    return share.tree.perform_again(call, payload, precondition).value


def made(share: Served) -> list[FileCall[Any]]:
    return [
        share.call(MakeDirectory, ROOT, b"new", 0o755),
        share.call(MakeNode, ROOT, b"new", 0o644),
        share.call(MakeSymlink, ROOT, b"new", b"target"),
        share.call(MakeLink, share.node("f"), ROOT, b"new"),
        share.call(Create, ROOT, b"new", 0o444, os.O_RDWR | os.O_EXCL),
        share.call(Create, ROOT, b"new", 0o444, os.O_RDWR),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("done", [False, True])
def test_making(share: Served, index: int, done: bool) -> None:
    call = made(share)[index]
    entry = again(share, call, done=done)
    assert entry.node == share.node("new")
    assert attr(entry).ino == os.lstat(share.path / "new").st_ino


@pytest.mark.parametrize("index", range(5))
def test_what_existed_before_still_is_in_the_way(share: Served, index: int) -> None:
    (share.path / "new").mkdir()
    call = made(share)[index]
    assert refused(lambda: again(share, call, done=False)) == "EEXIST"


@pytest.mark.parametrize("index", range(5))
def test_something_else_that_came_meanwhile_is_in_the_way(share: Served, index: int) -> None:
    call = made(share)[index]
    other = share.path / "new"
    meanwhile = (lambda: other.symlink_to("elsewhere")) if index != 2 else other.touch
    assert refused(lambda: again(share, call, done=False, meanwhile=meanwhile)) == "EEXIST"


@pytest.mark.parametrize("done", [False, True])
def test_removing(share: Served, done: bool) -> None:
    f, empty = share.node("f"), share.node("empty")
    assert again(share, share.call(Unlink, ROOT, b"f"), done=done) == Removed(node=0 if done else f)
    call = share.call(RemoveDirectory, ROOT, b"empty")
    assert again(share, call, done=done) == Removed(node=0 if done else empty)
    assert sorted(os.listdir(share.path)) == ["d", "g"]


def test_what_was_never_there_is_not_removed(share: Served) -> None:
    assert refused(lambda: again(share, share.call(Unlink, ROOT, b"none"), done=False)) == "ENOENT"


def test_a_removal_does_not_hit_what_came_afterwards(share: Served) -> None:
    keep = share.path / "kept"
    os.link(share.path / "f", keep)  # so that the inode number is not used again
    again(
        share,
        share.call(Unlink, ROOT, b"f"),
        done=True,
        meanwhile=lambda: (share.path / "f").write_text("new"),
    )
    assert (share.path / "f").read_text() == "new"


@pytest.mark.parametrize("done", [False, True])
def test_renaming(share: Served, done: bool) -> None:
    node, directory = share.node("f"), share.node("d")
    assert again(share, share.call(Rename, ROOT, b"f", directory, b"new"), done=done) == Renamed(
        node, files=not done, replaced=0 if done else node
    )
    assert (share.path / "d" / "new").read_text() == "f"
    assert share.ask(GetAttributes, node)
    assert share.ask(Lookup, directory, b"new").node == node


@pytest.mark.parametrize("done", [False, True])
def test_renaming_over(share: Served, done: bool) -> None:
    node = share.node("f")
    again(share, share.call(Rename, ROOT, b"f", ROOT, b"g"), done=done)
    assert (share.path / "g").read_text() == "f"
    assert not (share.path / "f").exists()
    assert share.node("g") == node


@pytest.mark.parametrize("done", [False, True])
def test_exchanging(share: Served, done: bool) -> None:
    f, g = share.node("f"), share.node("g")
    again(share, share.call(Rename, ROOT, b"f", ROOT, b"g", EXCHANGE), done=done)
    assert [(share.path / name).read_text() for name in "fg"] == ["g", "f"]
    assert (share.node("f"), share.node("g")) == (g, f)


def test_a_rename_that_was_done_but_not_recorded(share: Served) -> None:
    """Killed between the system call and the journal: the table still has the old names."""
    f, g, directory = share.node("f"), share.node("g"), share.node("d")
    call = share.call(Rename, ROOT, b"f", directory, b"new")
    swap = share.call(Rename, ROOT, b"g", directory, b"new", EXCHANGE)
    before = share.tree.precondition(call)
    share.restart()
    os.rename(share.path / "f", share.path / "d" / "new")
    assert share.tree.perform_again(call, b"", before).value == Renamed(f)
    assert share.ask(GetAttributes, f)

    before = share.tree.precondition(swap)
    share.restart()
    os.rename(share.path / "g", share.path / "swap")
    os.rename(share.path / "d" / "new", share.path / "g")
    os.rename(share.path / "swap", share.path / "d" / "new")
    assert share.tree.perform_again(swap, b"", before).value == Renamed(g)
    assert (share.path / "g").read_text() == "f"
    assert all(share.ask(GetAttributes, node) for node in (f, g))
    assert share.tree.describe().lost == 0


def test_a_rename_of_what_is_missing(share: Served) -> None:
    assert refused(lambda: again(share, share.call(Rename, ROOT, b"no", ROOT, b"x"), done=False)) == "ENOENT"


@pytest.mark.parametrize("done", [False, True])
def test_appending(share: Served, done: bool) -> None:
    written = again(share, share.call(Write, share.node("f"), 0, True), b"-appended", done=done)
    assert (share.path / "f").read_text() == "f-appended"
    assert (written.size, written.offset, attr(written).size) == (9, 1, 10)
    assert share.ask(Lookup, ROOT, b"f").stale, "a successor does not know what the guest was given"


def test_an_append_that_was_cut_off_half_way(share: Served) -> None:
    call = share.call(Write, share.node("f"), 0, True)
    before = share.tree.precondition(call)
    (share.path / "f").write_text("f-app")
    written = share.tree.perform_again(call, b"-appended", before).value
    assert (share.path / "f").read_text() == "f-appended"
    assert (written.size, written.offset) == (9, 1)


def test_an_append_among_others(share: Served) -> None:
    call = share.call(Write, share.node("f"), 0, True)
    before = share.tree.precondition(call)
    (share.path / "f").write_text("f host -appended host again")
    assert share.tree.perform_again(call, b"-appended", before).value.offset == 7
    assert (share.path / "f").read_text() == "f host -appended host again"


def test_an_append_of_the_host_only(share: Served) -> None:
    call = share.call(Write, share.node("f"), 0, True)
    before = share.tree.precondition(call)
    (share.path / "f").write_text("f host")
    assert share.tree.perform_again(call, b"-appended", before).value.offset == 6
    assert (share.path / "f").read_text() == "f host-appended"


@pytest.mark.parametrize("done", [False, True])
def test_xattrs(share: Served, done: bool) -> None:
    node = share.node("f")
    assert again(share, share.call(SetXattr, node, b"user.a", b"1", 1), done=done) == Done()
    assert os.getxattr(share.path / "f", "user.a") == b"1"
    assert again(share, share.call(RemoveXattr, node, b"user.a"), done=done) == Done()
    assert os.listxattr(share.path / "f") == []


def test_xattrs_that_were_in_the_way_before(share: Served) -> None:
    node = share.node("f")
    os.setxattr(share.path / "f", "user.a", b"1")
    create = share.call(SetXattr, node, b"user.a", b"1", 1)
    assert refused(lambda: again(share, create, done=False)) == "EEXIST"
    remove = share.call(RemoveXattr, node, b"user.none")
    assert refused(lambda: again(share, remove, done=False)) == "ENODATA"


@pytest.mark.parametrize("done", [False, True])
def test_lookups_are_given_back_once(share: Served, done: bool) -> None:
    node = share.node("f")
    share.node("f")
    again(share, share.call(Forget, 0, [node, 777], [2, 1]), done=done)
    assert share.journal.records[node].lookups == 1
    share.forget(node)
    assert share.refused(GetAttributes, node) == "ESTALE"


def test_what_has_the_same_effect_twice(share: Served) -> None:
    f, g = share.node("f"), share.node("g")
    again(share, share.call(Write, f, 1), b"xyz", done=True)
    again(share, share.call(SetAttributes, f, SET_SIZE, size=3), done=True)
    again(share, share.call(CopyRange, f, 0, g, 0, 3), done=True)
    again(share, share.call(Allocate, f, 0, 0, 5), done=True)
    assert (share.path / "f").read_bytes() == b"fxy\0\0"
    assert (share.path / "g").read_bytes() == b"fxy"
    assert again(share, share.call(CreateUnnamed, ROOT, 0o600, os.O_RDWR), done=True).node


def test_no_precondition_of_what_will_fail(share: Served) -> None:
    calls = [
        share.call(Unlink, 999, b"f"),
        share.call(Unlink, ROOT, b".."),
        share.call(Write, 999, 0, True),
        share.call(SetXattr, 999, b"user.a", b"1"),
        share.call(Rename, 999, b"a", ROOT, b"b"),
    ]
    assert [share.tree.precondition(call) for call in calls] == [b""] * 5
    assert refused(lambda: share.tree.perform_again(calls[0], b"", b"")) == "ESTALE"
    assert refused(lambda: share.tree.perform_again(calls[1], b"", b"")) == "EINVAL"
