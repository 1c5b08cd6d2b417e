from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fileserver import names, snapshots
from protocol.files import (
    ATTR,
    DIRENT,
    ROOT,
    Create,
    CreateUnnamed,
    GetAttributes,
    List,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Read,
    ReadLink,
    RemoveDirectory,
    Rename,
    Renamed,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, attr, serving

NOREPLACE, EXCHANGE = 1, 2


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as share:
        yield share


def test_lookup_gives_what_is_there(share: Served) -> None:
    (share.path / "d").mkdir()
    (share.path / "d" / "f").write_bytes(b"12345")
    os.chmod(share.path / "d" / "f", 0o640)
    expected = os.stat(share.path / "d" / "f")
    found = attr(share.entry("d/f"))
    assert (found.ino, found.size, found.mode, found.nlink) == (expected.st_ino, 5, 0o100640, 1)
    assert found.mtime * 10**9 + found.mtimensec == expected.st_mtime_ns
    assert share.refused(Lookup, ROOT, b"missing") == "ENOENT"
    assert share.refused(Lookup, share.node("d/f"), b"x") == "ENOTDIR"


def test_the_same_file_is_the_same_node_by_any_name(share: Served) -> None:
    (share.path / "a").touch()
    os.link(share.path / "a", share.path / "b")
    assert share.node("a") == share.node("b") == share.node("a")
    assert attr(share.entry("a")).nlink == 2


@pytest.mark.parametrize("name", [b"\xff\xfe\x80", b"n" * 255, b" ", b"-rf", b"a\nb", "ü".encode(), b"..."])
def test_any_name_that_a_file_may_have(share: Served, name: bytes) -> None:
    node = share.ask(MakeDirectory, ROOT, name, 0o755).node
    assert share.node(name) == node
    assert os.listdir(os.fsencode(share.path)) == [name]
    share.ask(Rename, ROOT, name, ROOT, b"x")
    share.ask(Rename, ROOT, b"x", ROOT, name)
    share.ask(RemoveDirectory, ROOT, name)
    assert os.listdir(share.path) == []


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o000, 0o4755, 0o2770, 0o1777])
def test_made_files_have_exactly_the_mode_asked_for(share: Served, mode: int) -> None:
    share.ask(MakeDirectory, ROOT, b"d", mode)
    share.ask(MakeNode, ROOT, b"n", mode)
    share.ask(Create, ROOT, b"c", mode, os.O_RDWR)
    made = [stat.S_IMODE(os.lstat(share.path / name).st_mode) for name in "dnc"]
    assert made == [mode & 0o1777, mode, mode]  # mkdir(2) takes no more


def test_making_fifos_and_sockets_but_no_devices(share: Served) -> None:
    made = {b"fifo": stat.S_IFIFO, b"socket": stat.S_IFSOCK, b"file": stat.S_IFREG}
    for name, kind in made.items():
        assert stat.S_IFMT(attr(share.ask(MakeNode, ROOT, name, kind | 0o600)).mode) == kind
    assert share.refused(MakeNode, ROOT, b"tty", stat.S_IFCHR | 0o600) == "EPERM"
    assert share.refused(MakeNode, ROOT, b"disk", stat.S_IFBLK | 0o600) == "EPERM"
    assert share.refused(MakeNode, ROOT, b"link", stat.S_IFLNK | 0o600) == "EINVAL"
    assert sorted(os.listdir(share.path)) == ["fifo", "file", "socket"]


def test_what_exists_is_not_made_again(share: Served) -> None:
    (share.path / "x").touch()
    node = share.node("x")
    assert share.refused(MakeDirectory, ROOT, b"x", 0o755) == "EEXIST"
    assert share.refused(MakeNode, ROOT, b"x", 0o755) == "EEXIST"
    assert share.refused(MakeSymlink, ROOT, b"x", b"y") == "EEXIST"
    assert share.refused(MakeLink, node, ROOT, b"x") == "EEXIST"
    assert share.refused(Create, ROOT, b"x", 0o644, os.O_RDWR | os.O_EXCL) == "EEXIST"


def test_create_takes_an_existing_file_as_it_is(share: Served) -> None:
    (share.path / "x").write_text("content")
    entry = share.ask(Create, ROOT, b"x", 0o600, os.O_RDWR)
    assert entry.node == share.node("x")
    assert (share.path / "x").read_text() == "content"


def test_create_truncates_what_somebody_else_has_just_made(share: Served) -> None:
    """The guest's kernel believes that the file is new, and would not."""
    (share.path / "x").write_text("longer than what will be written")
    entry = share.ask(Create, ROOT, b"x", 0o600, os.O_WRONLY | os.O_TRUNC)
    assert entry.node == share.node("x")
    assert attr(entry).size == 0
    assert (share.path / "x").read_text() == ""


def test_create_over_what_is_no_file(share: Served) -> None:
    (share.path / "d").mkdir()
    os.mkfifo(share.path / "fifo")
    (share.path / "link").symlink_to("/etc/created-through-a-link")
    assert share.refused(Create, ROOT, b"d", 0o644, os.O_RDWR) == "EISDIR"
    assert share.refused(Create, ROOT, b"fifo", 0o644, os.O_RDWR) == "ESTALE"
    assert share.refused(Create, ROOT, b"link", 0o644, os.O_RDWR) == "ESTALE"
    assert not os.path.exists("/etc/created-through-a-link")


def test_symlinks_are_read_and_never_followed(share: Served) -> None:
    node = share.ask(MakeSymlink, ROOT, b"link", b"/etc/\xff").node
    assert share.ask(ReadLink, node).data == b"/etc/\xff"
    assert share.refused(Lookup, node, b"passwd") == "ENOTDIR"
    assert share.refused(ReadLink, ROOT) == "EINVAL"
    assert share.refused(MakeSymlink, ROOT, b"l2", b"") == "ENOENT"
    assert share.refused(MakeSymlink, ROOT, b"l3", b"a\0b") == "EINVAL"
    assert share.refused(MakeSymlink, ROOT, b"l4", b"t" * 5000) == "ENAMETOOLONG"


def test_a_hard_link_of_a_symlink_is_of_the_link(share: Served) -> None:
    node = share.ask(MakeSymlink, ROOT, b"link", b"nowhere").node
    assert share.ask(MakeLink, node, ROOT, b"second").node == node
    assert os.readlink(share.path / "second") == "nowhere"


def test_hard_links(share: Served) -> None:
    (share.path / "d").mkdir()
    node = share.ask(Create, ROOT, b"a", 0o644, os.O_RDWR).node
    linked = share.ask(MakeLink, node, share.node("d"), b"b")
    assert (linked.node, attr(linked).nlink) == (node, 2)
    share.ask(Unlink, ROOT, b"a")
    share.ask(Write, node, 0, payload=b"through the other")
    assert (share.path / "d" / "b").read_bytes() == b"through the other"
    assert share.refused(MakeLink, share.node("d"), ROOT, b"d2") == "EPERM"


def test_an_unnamed_file_gets_a_name(share: Served) -> None:
    node = share.ask(CreateUnnamed, ROOT, 0o640, os.O_RDWR).node
    share.ask(Write, node, 0, payload=b"data")
    assert os.listdir(share.path) == []
    assert attr(share.ask(GetAttributes, node)).nlink == 0
    assert share.ask(MakeLink, node, ROOT, b"named").node == node
    assert (share.path / "named").read_bytes() == b"data"
    assert stat.S_IMODE(os.stat(share.path / "named").st_mode) == 0o640
    exclusive = share.ask(CreateUnnamed, ROOT, 0o640, os.O_RDWR | os.O_EXCL).node
    assert share.refused(MakeLink, exclusive, ROOT, b"never") == "ENOENT"


def test_removing(share: Served) -> None:
    (share.path / "d").mkdir()
    (share.path / "d" / "f").touch()
    directory = share.node("d")
    assert share.refused(Unlink, ROOT, b"d") == "EISDIR"
    assert share.refused(RemoveDirectory, ROOT, b"d") == "ENOTEMPTY"
    assert share.refused(RemoveDirectory, directory, b"f") == "ENOTDIR"
    assert share.refused(Unlink, directory, b"g") == "ENOENT"
    share.ask(Unlink, directory, b"f")
    share.ask(RemoveDirectory, ROOT, b"d")
    assert os.listdir(share.path) == []
    assert share.refused(MakeDirectory, directory, b"x", 0o755) == "ENOENT"


def test_an_unlinked_file_lives_until_it_is_forgotten(tmp_path: Path) -> None:
    with serving(tmp_path, max_descriptors=2) as share:
        node = share.ask(Create, ROOT, b"f", 0o600, os.O_RDWR).node
        share.ask(Write, node, 0, payload=b"kept")
        share.ask(Unlink, ROOT, b"f")
        share.tree.close_idle(float("inf"))
        for index in range(20):  # more files than descriptors
            share.ask(MakeNode, ROOT, b"%d" % index, 0o600)
        assert share.bytes(Read, node, 0, 100) == b"kept"
        assert attr(share.ask(GetAttributes, node)).nlink == 0
        share.forget(node)
        assert share.refused(GetAttributes, node) == "ESTALE"


def test_a_file_renamed_over_lives_until_it_is_forgotten(share: Served) -> None:
    (share.path / "old").write_text("old")
    (share.path / "new").write_text("new")
    old, new = share.node("old"), share.node("new")
    share.ask(Rename, ROOT, b"new", ROOT, b"old")
    assert share.node("old") == new
    assert share.bytes(Read, old, 0, 10) == b"old"
    assert share.bytes(Read, new, 0, 10) == b"new"
    assert share.refused(Lookup, ROOT, b"new") == "ENOENT"


def test_rename_flags(share: Served) -> None:
    (share.path / "a").write_text("a")
    (share.path / "b").write_text("b")
    a, b = share.node("a"), share.node("b")
    assert share.refused(Rename, ROOT, b"a", ROOT, b"b", NOREPLACE) == "EEXIST"
    assert share.refused(Rename, ROOT, b"a", ROOT, b"b", 4) == "EINVAL"
    share.ask(Rename, ROOT, b"a", ROOT, b"b", EXCHANGE)
    assert (share.node("a"), share.node("b")) == (b, a)
    assert share.refused(Rename, ROOT, b"a", ROOT, b"missing", EXCHANGE) == "ENOENT"
    share.ask(Rename, ROOT, b"a", ROOT, b"c", NOREPLACE)
    assert sorted(os.listdir(share.path)) == ["b", "c"]


def test_whether_a_rename_was_of_files(share: Served) -> None:
    """Of what no longer has the new name the guest knows nothing: if that was a directory, so is what has it now."""
    (share.path / "f").write_text("f")
    (share.path / "g").write_text("g")
    (share.path / "d").mkdir()
    node, directory = share.node("f"), share.node("d")
    assert share.ask(Rename, ROOT, b"f", ROOT, b"g") == Renamed(node, files=True)
    assert share.ask(Rename, ROOT, b"d", ROOT, b"e") == Renamed(directory, replaced=directory)
    assert share.ask(Rename, ROOT, b"g", ROOT, b"e", EXCHANGE) == Renamed(node, replaced=directory)


def test_whose_name_it_was(share: Served) -> None:
    """Of no other file have attributes changed. Where that is not certain nothing is said."""
    for name in ("f", "g", "h", "unknown"):
        (share.path / name).write_text(name)
    f, g, h = (share.node(name) for name in "fgh")
    assert share.ask(Rename, ROOT, b"f", ROOT, b"g").replaced == g
    assert share.ask(Rename, ROOT, b"g", ROOT, b"new").replaced == f, "nothing was there"
    assert share.ask(Rename, ROOT, b"new", ROOT, b"unknown").replaced == 0
    assert share.ask(Unlink, ROOT, b"h").node == h
    (share.path / "later").touch()
    assert share.ask(Unlink, ROOT, b"later").node == 0


def test_rename_errors_are_the_kernel_s(share: Served) -> None:
    (share.path / "d" / "sub").mkdir(parents=True)
    (share.path / "full" / "x").mkdir(parents=True)
    (share.path / "f").touch()
    directory, sub = share.node("d"), share.node("d/sub")
    assert share.refused(Rename, ROOT, b"d", sub, b"x") == "EINVAL"
    assert share.refused(Rename, ROOT, b"f", ROOT, b"d") == "EISDIR"
    assert share.refused(Rename, ROOT, b"d", ROOT, b"f") == "ENOTDIR"
    assert share.refused(Rename, ROOT, b"d", ROOT, b"full") == "ENOTEMPTY"
    assert share.refused(Rename, ROOT, b"none", directory, b"x") == "ENOENT"


@pytest.mark.parametrize("flags", [0, EXCHANGE])
def test_what_is_in_a_moved_directory_is_found_again(tmp_path: Path, flags: int) -> None:
    with serving(tmp_path, max_descriptors=1) as share:
        (share.path / "a" / "b").mkdir(parents=True)
        (share.path / "a" / "b" / "f").write_text("f")
        (share.path / "c" / "t").mkdir(parents=True)
        file, target = share.node("a/b/f"), share.node("c")
        if flags:
            share.node("c/t")
        else:
            os.rmdir(share.path / "c" / "t")
        share.ask(Rename, ROOT, b"a", target, b"t", flags)
        assert share.bytes(Read, file, 0, 10) == b"f"
        share.restart()
        assert share.bytes(Read, file, 0, 10) == b"f"
        assert share.tree.describe().lost == 0


def test_renaming_within_hard_links_of_one_file_keeps_both(share: Served) -> None:
    (share.path / "a").touch()
    os.link(share.path / "a", share.path / "b")
    node = share.node("a")
    share.node("b")
    share.ask(Rename, ROOT, b"a", ROOT, b"b")
    assert sorted(os.listdir(share.path)) == ["a", "b"]
    assert share.node("a") == share.node("b") == node


# --- directories ----------------------------------------------------------------------------------------


def test_a_listing_is_complete_and_in_the_order_of_positions(share: Served) -> None:
    expected = {b"%d" % index for index in range(1000)} | {b"\xff", b"n" * 255}
    for name in expected:
        os.mkdir(os.fsencode(share.path) + b"/" + name)
    listed = share.listed(ROOT)
    assert {name for _, _, _, name in listed} == expected
    assert len(listed) == len(expected)
    positions = [off for _, off, _, _ in listed]
    assert positions == sorted(set(positions))
    assert positions[0] > 0
    assert positions[-1] < 1 << 63
    inodes = {name: ino for ino, _, _, name in listed}
    assert inodes[b"7"] == os.stat(share.path / "7").st_ino
    assert {kind for _, _, kind, _ in listed} == {4}


def test_a_listing_is_of_one_moment(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PIECE", 100)
    for index in range(50):
        (share.path / str(index)).touch()
    first = share.tree.perform(share.call(List, ROOT, 5, 0))
    for index in range(50):
        (share.path / str(index)).unlink()
    (share.path / "late").touch()
    after = _last_position(first.payload)
    assert len(share.tree.perform(share.call(List, ROOT, 5, after)).payload) == len(first.payload)
    assert share.names(ROOT, handle=6) == [b"late"]


def test_a_position_is_good_without_the_snapshot(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PIECE", 100)
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOTS", 0)
    for index in range(50):
        (share.path / str(index)).touch()
    assert sorted(share.names(ROOT)) == sorted(b"%d" % index for index in range(50))


def test_a_listing_with_attributes(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_LISTED_WITH_ATTRIBUTES", 2)
    for index in range(5):
        (share.path / str(index)).write_bytes(b"x" * index)
    sizes, after, end = {}, 0, False
    while not end:
        outcome = share.tree.perform(share.call(List, ROOT, 1, after, True))
        cut = outcome.value.dirents
        records, attributes = _names(outcome.payload[:cut]), outcome.payload[cut:]
        assert len(attributes) == ATTR.size * len(records) <= ATTR.size * 2
        sizes |= {name: ATTR.unpack_from(attributes, at * ATTR.size)[1] for at, name in enumerate(records)}
        after, end = _last_position(outcome.payload[:cut]), outcome.value.end
    assert sizes == {b"%d" % index: index for index in range(5)}


def test_what_went_meanwhile_has_no_attributes(share: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_LISTED_WITH_ATTRIBUTES", 1)
    for name in ("a", "b"):
        (share.path / name).touch()
    first = share.tree.perform(share.call(List, ROOT, 1, 0, True))
    for name in ("a", "b"):
        (share.path / name).unlink()
    after = _last_position(first.payload[: first.value.dirents])
    second = share.tree.perform(share.call(List, ROOT, 1, after, True))
    assert second.payload[second.value.dirents :] == bytes(ATTR.size)


def test_only_directories_are_listed(share: Served) -> None:
    (share.path / "f").touch()
    assert share.refused(List, share.node("f"), 1, 0) == "ENOTDIR"
    assert share.refused(List, ROOT, 1, -1) == "EINVAL"
    assert share.names(ROOT) == [b"f"]


def _last_position(block: bytes) -> int:
    at = 0
    while at < len(block):
        _, off, length, _ = DIRENT.unpack_from(block, at)
        at += DIRENT.size + length + -length % 8
    return off


def _names(block: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(block):
        _, _, length, _ = DIRENT.unpack_from(block, at)
        found.append(block[at + DIRENT.size : at + DIRENT.size + length])
        at += DIRENT.size + length + -length % 8
    return found
