"""A copy is what was copied; half of one leaves nothing, and a lying one goes nowhere else."""

from __future__ import annotations

import errno
import io
import os
import socket
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from protocol import treecopy, treereceive
from protocol.errors import DecodeError
from protocol.treecopy import Cut, Entry, Kind, encode
from protocol.treeparts import folder_mark
from protocol.treereceive import CannotReceive, Receiver
from protocol.treeresume import folder_identity
from protocol.treesend import Sender, top_name
from tests.descriptors import open_descriptors

AS_USER = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@dataclass
class Told:
    """What could not be copied, path and reason."""

    problems: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, path: str, reason: str) -> None:
        self.problems.append((path, reason))


def sent(*sources: Path | str, told: Told | None = None) -> bytes:
    stream = io.BytesIO()
    sender = Sender(stream, told or Told())
    for source in sources:
        sender.send(str(source))
    sender.finish()
    return stream.getvalue()


def received(data: bytes, destination: Path | str, *, single: bool = True) -> list[tuple[str, str]]:
    told = Told()
    Receiver(io.BytesIO(data), str(destination), told, single=single).run()
    return told.problems


def content(text: bytes) -> bytes:
    return treecopy.piece_head(len(text)) + text + treecopy.WHOLE


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that is below, with what is to be kept of it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        what: object = None
        if stat.S_ISREG(status.st_mode):
            what = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        mode = None if stat.S_ISLNK(status.st_mode) else status.st_mode
        found[str(path.relative_to(root))] = (mode, status.st_mtime_ns, what)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "deep" / "deeper").mkdir(parents=True)
    (root / "file").write_bytes(b"text\n" * 100_000)
    (root / "empty").touch()
    (root / "deep" / "program").write_text("#!/bin/sh\n")
    (root / "deep" / "program").chmod(0o751)
    os.link(root / "file", root / "deep" / "deeper" / "other name")
    (root / "link").symlink_to("deep/program")
    (root / "dangling").symlink_to("/nowhere")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe\n")).write_text("no text")
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, 1_000_000_007 * (number - 3)), follow_symlinks=False)
    (root / "deep" / "deeper").chmod(0o700)
    return root


def test_a_tree_is_what_it_was(source: Path, tmp_path: Path) -> None:
    assert received(sent(source), tmp_path / "copy") == []
    assert tree(tmp_path / "copy") == tree(source)
    assert (tmp_path / "copy").stat().st_mtime_ns == source.stat().st_mtime_ns
    copied = (tmp_path / "copy" / "file").stat()
    assert copied.st_ino == (tmp_path / "copy" / "deep" / "deeper" / "other name").stat().st_ino
    # And once more over what is there, which is replaced file by file.
    (tmp_path / "copy" / "file").write_text("old")
    (tmp_path / "copy" / "own").write_text("stays")
    assert received(sent(source), tmp_path / "copy") == []
    assert received(sent(f"{source}/."), tmp_path / "copy") == []
    after = tree(tmp_path / "copy")
    assert after.pop("own")[2] == b"stays"
    assert {name: what for name, what in after.items() if not name.startswith("source")} == tree(source)


def test_where_it_goes_is_as_with_cp(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    file = source / "file"
    assert received(sent(file), there) == []
    assert received(sent(file), there / "renamed") == []
    assert received(sent(source / "deep"), there / "folder/") == []
    assert received(sent(file, source / "link"), there, single=False) == []
    assert received(sent(f"{source}/deep/."), there / "content") == []
    assert sorted(path.name for path in there.iterdir()) == ["content", "file", "folder", "link", "renamed"]
    assert os.readlink(there / "link") == "deep/program"
    assert (there / "content" / "program").exists()
    assert (there / "folder" / "program").exists()
    with pytest.raises(CannotReceive, match="missing: No such file"):
        received(sent(file, file), there / "missing", single=False)
    with pytest.raises(CannotReceive, match="missing: No such file"):
        received(sent(file), there / "missing" / "name")
    with pytest.raises(CannotReceive, match="file: Not a directory"):
        received(sent(file), there / "file" / "name")
    assert received(sent(file), f"{there}/missing/") == [(f"{there}/missing", "Not a directory")]


def test_who_names_a_link_means_what_it_leads_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "to file").symlink_to("target")
    (tmp_path / "target").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to("folder")
    assert received(sent(source / "empty"), tmp_path / "to file") == []
    assert received(sent(source / "empty"), tmp_path / "to folder") == []
    assert (tmp_path / "to file").is_symlink()
    assert (tmp_path / "target").read_text() == ""
    assert (tmp_path / "folder" / "empty").exists()
    (tmp_path / "through").symlink_to("source")
    assert received(sent(f"{tmp_path}/through/"), tmp_path / "followed") == []
    assert tree(tmp_path / "followed") == tree(source)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/b", b"b"),
        ("b/", b"b"),
        (".", b"."),
        ("/", b"."),
        ("a/..", b"."),
        ("a/.", b"."),
        ("\udcff", b"\xff"),
    ],
)
def test_what_something_is_called_where_it_arrives(path: str, name: bytes) -> None:
    assert top_name(path) == name


def test_holes_stay_holes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"x")
        file.truncate(16 << 20)
    if (tmp_path / "sparse").stat().st_blocks * 512 >= 1 << 20:
        pytest.skip("this filesystem has no holes")
    data = sent(tmp_path / "sparse")
    assert len(data) < 1 << 20
    assert received(data, tmp_path / "copy") == []
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20


def test_what_cannot_be_read_is_told_and_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(source)  # its whole path may be too long
        listener.bind("socket")
        told = Told()
        data = sent(source, tmp_path / "missing", told=told)
    assert sorted(told.problems) == [
        (f"{tmp_path}/missing", "No such file or directory"),
        (f"{source}/pipe", "a pipe, which cannot be copied"),
        (f"{source}/socket", "a socket, which cannot be copied"),
    ]
    assert received(data, tmp_path / "copy") == []
    assert {"pipe", "socket"} & {path.name for path in (tmp_path / "copy").iterdir()} == set()


@AS_USER
def test_what_is_not_permitted_is_told_too(source: Path, tmp_path: Path) -> None:
    (source / "empty").chmod(0)
    (source / "deep" / "deeper").chmod(0)
    told = Told()
    data = sent(source, told=told)
    (source / "deep" / "deeper").chmod(0o700)
    assert {path for path, _ in told.problems} == {f"{source}/empty", f"{source}/deep/deeper"}
    (tmp_path / "copy" / "deep").mkdir(parents=True)
    (tmp_path / "copy" / "deep").chmod(0o500)
    assert received(sent(source / "deep"), tmp_path / "copy") == [
        (f"{tmp_path}/copy/deep/deeper", "Permission denied"),
        (f"{tmp_path}/copy/deep/program", "Permission denied"),
    ]
    assert received(data, tmp_path / "other") == []


def test_a_file_that_shrinks_or_cannot_be_read_to_its_end_is_not_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "file").write_text("old")
    real, calls = os.read, 0

    def read(descriptor: int, size: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size)

    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", read)
        data = sent(source / "file", source / "empty", told=told)
    assert told.problems == [(f"{source}/file", "Input/output error")]
    assert received(data, tmp_path / "copy", single=False) == []
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == {
        "file": "old",
        "empty": "",
    }


@pytest.mark.parametrize("part", [1, 2, 3, 5, 9])
def test_a_copy_that_is_cut_off_leaves_no_half_of_a_file(source: Path, tmp_path: Path, part: int) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "file").write_text("old")
    data = sent(f"{source}/.")
    with pytest.raises(Cut):
        received(data[: len(data) * part // 10], tmp_path / "copy")
    whole, copied = tree(source), tree(tmp_path / "copy")
    for name, (_, _, text) in copied.items():
        assert text in (whole[name][2], b"old"), name


def test_a_full_disk_ends_it_and_leaves_nothing_half_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(treereceive.os, "write", write)
    with pytest.raises(CannotReceive, match=r"copy/deep/deeper/other name: No space left on device"):
        received(sent(source), tmp_path / "copy")
    # The folder is not complete, which the next attempt is to know.
    assert [path for path in tree(tmp_path / "copy") if "agentctl" in path] == [
        folder_mark(b"source", folder_identity(str(source))).decode()
    ]


def test_what_cannot_be_written_is_told_and_the_rest_is_copied(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "file").mkdir(parents=True)  # where a file is to be
    (copy / "deep").write_text("")  # where a folder is to be
    os.mkfifo(copy / "empty")  # what is no file is not replaced
    problems = dict(received(sent(f"{source}/."), copy))
    assert problems.pop(f"{copy}/deep") == "Not a directory"
    assert problems.pop(f"{copy}/empty") == "what is there is no file, and is not replaced"
    assert set(problems) == {f"{copy}/file"}
    assert stat.S_ISFIFO((copy / "empty").stat().st_mode)
    assert os.readlink(copy / "link") == "deep/program"
    assert [path for path in tree(copy) if "agentctl" in path] == []


def test_a_lying_sender_goes_nowhere_else(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "old link").symlink_to(outside)
    for name in (b"old link", b"new link"):
        data = b"".join(
            [
                encode(Entry(Kind.SYMLINK, b"new link", target=bytes(outside))),
                encode(Entry(Kind.ENTER, name, 0o700)),
                encode(Entry(Kind.FILE, b"stolen", 0o600)) + content(b"x"),
                encode(Entry(Kind.LEAVE)),
                encode(Entry(Kind.FILE, b"after", 0o6755)) + content(b"y"),
                encode(Entry(Kind.END)),
            ]
        )
        (problem,) = received(data, inside, single=False)
        assert problem[0] == f"{inside}/{name.decode()}"
    assert list(outside.iterdir()) == []
    assert stat.S_IMODE((inside / "after").stat().st_mode) == 0o755, "set-id bits are an owner's to give"


def test_links_to_what_was_not_sent_are_refused(tmp_path: Path) -> None:
    data = encode(Entry(Kind.HARDLINK, b"a", number=7)) + encode(Entry(Kind.END))
    assert "could not be copied" in received(data, tmp_path, single=False)[0][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (encode(Entry(Kind.LEAVE)), Cut),
        (encode(Entry(Kind.ENTER, b"a", 0o700)) + encode(Entry(Kind.END)), Cut),
        (encode(Entry(Kind.FILE, b"a")) + b"\x7f" * 8, DecodeError),
        (b"", Cut),
    ],
)
def test_nonsense_ends_it(tmp_path: Path, data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        received(data, tmp_path, single=False)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_dot_is_the_destination_and_no_file(tmp_path: Path) -> None:
    data = encode(Entry(Kind.FILE, b".", 0o644)) + content(b"x") + encode(Entry(Kind.END))
    assert received(data, tmp_path, single=False) == [(str(tmp_path), "not a name")]


def test_descriptors_are_given_back(source: Path, tmp_path: Path) -> None:
    before = len(open_descriptors())
    data = sent(source)
    received(data, tmp_path / "copy")
    with pytest.raises(Cut):
        received(data[:-200], tmp_path / "copy")
    assert len(open_descriptors()) == before
