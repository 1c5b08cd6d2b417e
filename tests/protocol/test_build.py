from __future__ import annotations

from pathlib import Path

from protocol import build


def tree(root: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return build.digest_of(root)


def test_it_depends_on_paths_and_contents_of_the_guests_sources(tmp_path: Path) -> None:
    files = {"protocol/a.py": "1", "guest_agent/b.py": "2", "guest_agent/sub/c.py": "3"}
    digest = tree(tmp_path / "one", files)
    assert len(digest) == 16
    assert tree(tmp_path / "two", dict(reversed(files.items()))) == digest
    assert tree(tmp_path / "three", {**files, "protocol/a.py": "x"}) != digest
    assert tree(tmp_path / "four", {**files, "protocol/d.py": ""}) != digest
    assert tree(tmp_path / "five", {"protocol/a.py": "12", "guest_agent/b.py": ""}) != tree(
        tmp_path / "six", {"protocol/a.py": "1", "guest_agent/b.py": "2"}
    )


def test_nothing_else_counts(tmp_path: Path) -> None:
    files = {"protocol/a.py": "1"}
    digest = tree(tmp_path / "one", files)
    others = {"host_agent/x.py": "", "protocol/__pycache__/a.pyc": "", "protocol/notes.txt": ""}
    assert tree(tmp_path / "two", {**files, **others}) == digest


def test_our_own_digest_is_that_of_the_tree_we_run_from() -> None:
    assert build.digest() == build.digest_of(Path(build.__file__).resolve().parent.parent)
    assert build.digest() is build.digest()
