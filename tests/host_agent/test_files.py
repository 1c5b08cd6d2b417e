from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from host_agent.files import parse_record, write_atomically


def test_a_file_is_written_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"newer", mode=0o644)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["fsync", "fchmod"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    count: int = 0
    ratio: float = 0.0
    on: bool = False
    previous: str | None = None


def test_a_record_is_read_with_its_defaults() -> None:
    assert parse_record(Record, b'{"name": "a", "ratio": 2, "previous": "b"}') == Record(
        "a", 0, 2, False, "b"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"name"',
        b'{"name": "a"',
        b"{}",
        b'{"name": 5}',
        b'{"name": "a", "count": "5"}',
        b'{"name": "a", "count": true}',
        b'{"name": "a", "count": 1.5}',
        b'{"name": "a", "on": 1}',
        b'{"name": "a", "previous": 1}',
        b'{"name": "a", "unknown": 1}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_record(Record, content)
