"""How much there is to copy, as far as it can be seen beside the copy."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from protocol.treeparts import PREFIX
from protocol.treesurvey import Survey


def test_all_files_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "deep" / "er" / "b").write_bytes(bytes(20))
    os.link(tmp_path / "a", tmp_path / "deep" / "a")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "deep" / "way out").symlink_to("/usr")
    (tmp_path / os.fsdecode(PREFIX + b"x")).write_bytes(bytes(7))
    (tmp_path / "deep" / "er" / "sparse").touch()
    os.truncate(tmp_path / "deep" / "er" / "sparse", 5000)
    named = [str(tmp_path / "deep" / "er" / "b"), str(tmp_path / "nowhere"), str(tmp_path / "link")]
    with Survey([str(tmp_path), *named]) as survey:
        total = None
        while total is None:
            total = survey.take()
    assert total == 100 + 20 + 5000 + 20
    assert survey.take() is None, "it is told once"


def test_it_ends_with_the_copy(tmp_path: Path) -> None:
    before = threading.active_count()
    with Survey(["/"]):
        pass
    assert threading.active_count() == before
