from __future__ import annotations

from pathlib import Path

import pytest

from host_agent.errors import UserError
from host_agent.view import library


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIBRARY_PATH, raising=False)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    (tmp_path / "fuse").touch()
    return tmp_path / "fuse"


def test_libfuse_3_is_taken_also_where_both_are(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "unmounter", lambda: "/usr/bin/fusermount3")
    assert library.check(device, {"fuse": "libfuse.so.2", "fuse3": "libfuse3.so.3"}.get) == "libfuse3.so.3"
    monkeypatch.setenv(library.LIBRARY_PATH, "/opt/libfuse3.so")
    assert library.find_library({"fuse3": "libfuse3.so.3"}.get) == "/opt/libfuse3.so"


def test_without_it_one_sentence_and_the_package(device: Path) -> None:
    with pytest.raises(UserError, match="libfuse 3") as said:
        library.check(device, {"fuse": "libfuse.so.2"}.get)
    assert "apt-get install fuse3" in said.value.hint


def test_without_the_device_the_module(tmp_path: Path) -> None:
    with pytest.raises(UserError) as said:
        library.check(tmp_path / "none", lambda name: "libfuse3.so.3")
    assert "modprobe fuse" in said.value.hint


def test_without_the_program_an_ordinary_user_is_told(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "unmounter", lambda: None)
    monkeypatch.setattr(library.os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="fusermount3"):
        library.check(device, lambda name: "libfuse3.so.3")
