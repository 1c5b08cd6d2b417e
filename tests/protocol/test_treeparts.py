"""Parts are one copy's at a time, and go when nobody has gone on with them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.treeparts import KEPT_FOR, PREFIX, Part, Parts, folder_mark

WEEK = KEPT_FOR


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def made(folder: int, target: bytes = b"name", source: bytes = b"00aa", content: bytes = b"begun") -> Part:
    part = Parts().make(folder, target, source)
    assert part is not None
    os.write(part.descriptor, content)
    return part


def test_what_was_left_is_found_by_who_copies_the_same(folder: int) -> None:
    made(folder).close()
    part = Parts().find(folder, b"name", b"00aa")
    assert part is not None
    assert part.size == 5
    part.close()
    assert Parts().find(folder, b"another", b"00aa") is None


def test_one_of_another_source_goes(folder: int, tmp_path: Path) -> None:
    made(folder).close()
    made(folder, b"another").close()
    (tmp_path / os.fsdecode(folder_mark(b"name", b"id"))).touch()
    assert Parts().find(folder, b"name", b"00bb") is None
    assert len(list(tmp_path.iterdir())) == 2, "the other file's and the folder's stay"


def test_two_copies_never_share_one(folder: int, tmp_path: Path) -> None:
    first = made(folder)
    assert Parts(patience=0).find(folder, b"name", b"00aa") is None
    assert Parts(patience=0).make(folder, b"name", b"00aa") is None
    assert Parts(patience=0).find(folder, b"name", b"00bb") is None
    assert first.size == 5
    assert len(list(tmp_path.iterdir())) == 1
    first.close()


def test_where_files_cannot_be_locked_there_are_no_parts(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("protocol.treeparts.fcntl.flock", flock)
    assert Parts().make(folder, b"name", b"00aa") is None
    assert list(tmp_path.iterdir()) == []


def test_what_has_its_name_by_now_is_no_part(folder: int, tmp_path: Path) -> None:
    """It is renamed between being opened and being locked: whoever waits must not write into the whole file."""
    first = made(folder)
    (tmp_path / os.fsdecode(first.name)).rename(tmp_path / "name")
    again = Parts().make(folder, b"name", b"00aa")
    assert again is not None
    assert again.size == 0
    assert (tmp_path / "name").read_bytes() == b"begun"
    first.close()
    again.close()


def test_what_nobody_went_on_with_goes_after_a_week(folder: int, tmp_path: Path) -> None:
    made(folder, b"old").close()
    made(folder, b"held")
    names = [".agentctl-cp-0123-0", os.fsdecode(folder_mark(b"x", b"id")), ".agentctl-other", "own"]
    for name in names:
        (tmp_path / name).touch()
    for path in tmp_path.iterdir():
        os.utime(path, (0, time.time() - 100))
    (tmp_path / os.fsdecode(PREFIX + b"link")).symlink_to("own")
    Parts(lambda: time.time() + WEEK - 200).find(folder, b"name", b"00aa")
    assert len(list(tmp_path.iterdir())) == 7
    Parts(lambda: time.time() + WEEK).find(folder, b"name", b"00aa")
    left = {path.name for path in tmp_path.iterdir()}
    assert {".agentctl-other", "own", ".agentctl-part-link"} <= left
    assert len(left) == 4, "the one that is being written stays, too"
