from __future__ import annotations

import os
from pathlib import Path

import pytest

from fileserver.seals import Seals


def file(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def test_a_directory_and_all_that_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "secret").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    (tmp_path / "absolute").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "relative").symlink_to("../a/./b")
    seals = Seals([str(tmp_path / "absolute" / "relative" / "secret")])
    assert not seals
    assert seals.look()
    assert file(tmp_path / "a/b/secret") in seals
    held = ("", "absolute", "a", "a/relative", "a/b")
    assert [seals.is_on_the_way(file(tmp_path / path)) for path in held] == [True] * len(held)
    for path in ("beside", "a/b/secret"):
        assert not seals.is_on_the_way(file(tmp_path / path))
    assert file(tmp_path / "a/b") not in seals
    assert not seals.look(), "nothing is new"


def test_what_was_sealed_stays_so(tmp_path: Path) -> None:
    (tmp_path / "way" / "secret").mkdir(parents=True)
    seals = Seals([os.fsencode(tmp_path / "way" / "secret")])
    seals.look()
    way, secret = file(tmp_path / "way"), file(tmp_path / "way/secret")
    (tmp_path / "way").rename(tmp_path / "old")
    assert not seals.look()
    (tmp_path / "way" / "secret").mkdir(parents=True)
    assert seals.look()
    assert secret in seals
    assert file(tmp_path / "way/secret") in seals
    assert seals.is_on_the_way(way)
    assert seals.is_on_the_way(file(tmp_path / "way"))


@pytest.mark.parametrize("path", ["missing", "loop", "loop/x", "file/x"])
def test_what_is_not_there_seals_nothing_and_keeps_no_other_from_it(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    seals = Seals([str(tmp_path / path), str(tmp_path / "there")])
    assert seals.look()
    assert file(tmp_path / "there") in seals
    assert not seals.is_on_the_way(file(tmp_path / "loop"))


def test_a_path_is_absolute_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    monkeypatch.chdir(tmp_path)
    seals = Seals(["secret"])
    monkeypatch.chdir("/")
    assert seals.look()
    assert file(tmp_path / "secret") in seals
