from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.files import trees
from tests.bench.files.trees import Sizes

TINY = Sizes(source=30, modules=30, many=30, repository=30, big=3000, text=3000, written=3000, unpacked=5)


def digest(directory: Path) -> dict[str, str]:
    """Every file but git's index, which holds times of this machine."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "index"
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    trees.make(directory, ["agentctl", "ext4"], TINY)
    return directory


def test_the_same_sizes_make_the_same_files(made: Path, tmp_path: Path) -> None:
    trees.make(tmp_path, ["agentctl", "ext4"], TINY)
    assert digest(tmp_path) == digest(made)


def test_there_is_as_much_as_was_asked_for(made: Path) -> None:
    common = made / "common"
    assert len(list((common / "source").rglob("*.c"))) == TINY.source
    assert len(list((common / "many").rglob("*.txt"))) == TINY.many
    assert (common / "big").stat().st_size == TINY.big


def test_one_module_imports_all_others(made: Path) -> None:
    code = "import sys, everything; print(sum(name.startswith('folder_') and '.' in name for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=made / "common" / "modules", capture_output=True, check=True
    )
    assert int(done.stdout) == TINY.modules


@pytest.mark.parametrize("peer", ["agentctl", "ext4"])
def test_each_peer_has_a_clean_repository(made: Path, peer: str) -> None:
    repository = made / peer / "repository"
    command = ["git", "-c", "safe.directory=*", "-C", str(repository)]
    status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, check=True)
    files = subprocess.run([*command, "ls-files"], capture_output=True, check=True)
    assert status.stdout == b""
    assert files.stdout.count(b"\n") == TINY.repository


def test_sizes_go_to_the_guest_as_json() -> None:
    assert Sizes(**json.loads(TINY.to_json())) == TINY
