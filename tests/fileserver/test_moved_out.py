"""``confinement``: what a program of the host moves out of a share is out of reach, whoever still holds it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fileserver import confinement, linux
from protocol.files import (
    ROOT,
    Create,
    CreateUnnamed,
    List,
    Lookup,
    MakeDirectory,
    MakeLink,
    MakeNode,
    MakeSymlink,
    Read,
    RemoveDirectory,
    Rename,
    Unlink,
    Write,
)
from tests.fileserver.served import Served, serving


@pytest.fixture(params=[1, 1000], ids=["not held", "held"])
def share(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    """Of the folder ``root``; nothing is believed for any time."""
    monkeypatch.setattr(confinement, "VALID", 0.0)
    below = tmp_path / "root" / "d" / "below"
    below.mkdir(parents=True)
    (below / "f").write_text("f")
    (below / "empty").mkdir()
    with serving(tmp_path / "root", max_descriptors=request.param) as share:
        yield share


def looks(share: Served, directory: int, file: int) -> list[Callable[[], str]]:
    """Everything that looks at a name in a directory, or makes one."""
    return [
        lambda: share.refused(Lookup, directory, b"f"),
        lambda: share.refused(List, directory, 1, 0),
        lambda: share.refused(Create, directory, b"new", 0o644, os.O_RDWR),
        lambda: share.refused(CreateUnnamed, directory, 0o600, os.O_RDWR),
        lambda: share.refused(MakeNode, directory, b"new", 0o644),
        lambda: share.refused(MakeDirectory, directory, b"new", 0o755),
        lambda: share.refused(MakeSymlink, directory, b"new", b"f"),
        lambda: share.refused(MakeLink, file, directory, b"new"),
        lambda: share.refused(Unlink, directory, b"f"),
        lambda: share.refused(RemoveDirectory, directory, b"empty"),
        lambda: share.refused(Rename, directory, b"f", ROOT, b"taken"),
        lambda: share.refused(Rename, ROOT, b"mine", directory, b"put"),
        lambda: share.refused(Rename, ROOT, b"mine", directory, b"f", linux.RENAME_EXCHANGE),
    ]


@pytest.mark.parametrize("path", ["d", "d/below"])
def test_nothing_is_found_or_made_in_it(share: Served, tmp_path: Path, path: str) -> None:
    directory = share.node("d/below")
    mine = share.ask(Create, ROOT, b"mine", 0o644, os.O_RDWR).node
    (share.path / path).rename(tmp_path / "out")
    there = tmp_path / "out" if path == "d/below" else tmp_path / "out" / "below"
    assert [look() for look in looks(share, directory, mine)] == ["ESTALE"] * 13
    assert sorted(os.listdir(there)) == ["empty", "f"]
    assert sorted(os.listdir(share.path)) == (["d", "mine"] if path == "d/below" else ["mine"])


def test_what_comes_back_is_there_again(share: Served, tmp_path: Path) -> None:
    directory = share.node("d/below")
    for _ in range(2):
        (share.path / "d").rename(tmp_path / "out")
        assert share.refused(Lookup, directory, b"f") == "ESTALE"
        (tmp_path / "out").rename(share.path / "d")
        assert share.names(directory) != []
        assert share.bytes(Read, share.ask(Lookup, directory, b"f").node, 0, 9) == b"f"


def test_a_directory_that_is_held_may_be_moved_about_in_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confinement, "VALID", 0.0)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    with serving(tmp_path) as share:
        directory = share.node("a/b")
        (tmp_path / "a" / "b").rename(tmp_path / "c" / "moved")
        share.ask(Create, directory, b"f", 0o644, os.O_RDWR)
        (tmp_path / "c").rename(tmp_path / "e")
        assert share.names(directory) == [b"f"]
    assert (tmp_path / "e" / "moved" / "f").exists()


def test_a_name_that_only_begins_as_the_share_s(share: Served, tmp_path: Path) -> None:
    directory = share.node("d")
    (tmp_path / "root-not").mkdir()
    (share.path / "d").rename(tmp_path / "root-not" / "d")
    assert share.refused(Lookup, directory, b"below") == "ESTALE"


def test_what_was_open_goes_on(share: Served, tmp_path: Path) -> None:
    """As it does for a program of the host."""
    file = share.node("d/below/f")
    share.ask(Write, file, 0, payload=b"written")
    (share.path / "d").rename(tmp_path / "out")
    assert share.bytes(Read, file, 0, 9) == b"written"


def test_a_share_that_is_renamed_itself_goes_on_until_that_is_noticed(share: Served, tmp_path: Path) -> None:
    directory = share.node("d")
    share.path.rename(tmp_path / "elsewhere")
    assert share.refused(Lookup, directory, b"below") == "0"
    share.tree.check_root()
    assert share.refused(Lookup, directory, b"below") == "ENOENT"
    (tmp_path / "elsewhere").rename(share.path)
    share.tree.check_root()
    assert share.refused(Lookup, directory, b"below") == "0"


def test_the_share_is_renamed_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "VALID", 0.0)
    (tmp_path / "a" / "d").mkdir(parents=True)
    with serving(tmp_path / "a") as share:
        directory = share.node("d")
        (tmp_path / "a" / "d").rename(
            tmp_path / "a" / "moved"
        )  # there is no other way to it than its descriptor
        path_of, renames = linux.path_of, iter(["b"])

        def renamed_after(descriptor: int) -> bytes:
            path = path_of(descriptor)
            if name := next(renames, None):
                (tmp_path / "a").rename(tmp_path / name)
            return path

        monkeypatch.setattr(linux, "path_of", renamed_after)
        assert share.names(directory) == []
        assert (tmp_path / "b" / "moved").exists()


def test_a_deleted_directory_is_empty(share: Served) -> None:
    directory = share.node("d/below")
    shutil.rmtree(share.path / "d")
    for answer in (
        share.refused(Lookup, directory, b"f"),
        share.refused(MakeDirectory, directory, b"n", 0o755),
    ):
        assert answer in ("ENOENT", "ESTALE")


def test_a_share_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "VALID", 0.0)
    with serving(Path("/")) as share:
        assert b"passwd" in share.names(share.node("etc"))


def test_an_answer_stays_valid_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    asked: list[int] = []
    path_of, now = linux.path_of, 1000.0

    def counted(descriptor: int) -> bytes:
        asked.append(descriptor)
        return path_of(descriptor)

    monkeypatch.setattr(linux, "path_of", counted)
    monkeypatch.setattr(confinement.time, "monotonic", lambda: now)
    with serving(tmp_path) as share:
        directory = share.node("d")
        for _ in range(50):
            share.names(directory)
        assert len(asked) == 2
        now += confinement.VALID
        share.names(directory)
        assert len(asked) == 4
        for _ in range(50):
            share.names(ROOT)
        assert len(asked) == 4, "the root needs no look"


DEPTH = 20


def descend(top: Path, share: Served | None = None) -> tuple[int, int]:
    """Directories whose path has 5,000 bytes; the last one's descriptor and its node."""
    descriptor, node = os.open(top, os.O_PATH), ROOT
    for _ in range(DEPTH):
        name = b"n" * 250
        if share is not None:
            node = share.ask(MakeDirectory, node, name, 0o755).node
        below = os.open(name, os.O_PATH, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    return descriptor, node


def test_a_path_that_is_too_long_for_the_kernel(share: Served, tmp_path: Path) -> None:
    descriptor, node = descend(share.path, share)
    with pytest.raises(OSError, match="too long"):
        linux.path_of(descriptor)
    share.ask(Create, node, b"f", 0o644, os.O_RDWR)
    assert share.names(node) == [b"f"]
    (share.path / ("n" * 250)).rename(tmp_path / "out")
    assert share.refused(Lookup, node, b"f") == "ESTALE"
    assert share.refused(Create, node, b"g", 0o644, os.O_RDWR) == "ESTALE"
    os.close(descriptor)
    shutil.rmtree(tmp_path / "out")


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "--bind", source, target], capture_output=True).returncode
    ):
        pytest.skip("needs to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


def test_what_is_mounted_below_the_share_is_in_it(share: Served, tmp_path: Path) -> None:
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x" / "f").touch()
    with bound(tmp_path / "other", share.path / "d" / "below"):
        directory = share.node("d/below/x")
        assert share.names(directory) == [b"f"]
        share.ask(MakeDirectory, directory, b"made", 0o755)
        (tmp_path / "other" / "x").rename(tmp_path / "x")
        assert share.refused(Lookup, directory, b"f") == "ESTALE", "nor is what is moved out of the mount"
        (tmp_path / "x").rename(tmp_path / "other" / "x")
        assert share.ask(Lookup, directory, b"f")


def test_what_was_mounted_again_is_found_anew(share: Served, tmp_path: Path) -> None:
    """The descriptor that is held is of a mount that is gone."""
    (tmp_path / "other" / "x").mkdir(parents=True)
    mounted = share.path / "d" / "below"
    with bound(tmp_path / "other", mounted):
        directory = share.node("d/below/x")
    assert share.refused(MakeDirectory, directory, b"made", 0o755) == "ESTALE"
    with bound(tmp_path / "other", mounted):
        share.ask(MakeDirectory, directory, b"made", 0o755)
        descriptors = share.tree.describe().descriptors
        assert share.names(directory) == [b"made"]
        assert share.tree.describe().descriptors == descriptors
        with share.tree._core.reach.use(directory) as node:
            assert linux.path_of(node.descriptor) == os.fsencode(mounted / "x")
