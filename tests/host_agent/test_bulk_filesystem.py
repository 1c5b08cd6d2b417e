"""The filesystem that is written field by field, judged by those who know ext4."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from host_agent import bulk_filesystem
from host_agent.bulk_filesystem import BLOCK, FILE_START, LABEL

MIB = 1 << 20
SIZES = [
    (64 * MIB, 48 * MIB + 2 * BLOCK),
    (128 * MIB, 126 * MIB),  # a whole group, and the file takes all that is behind its start
    (3 * MIB, BLOCK),
]

E2FSCK = shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin")
DEBUGFS = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin")


def device(path: Path, size: int, file_size: int) -> Path:
    """A device of zeros with the filesystem on it, sparse."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in bulk_filesystem.blocks(size, file_size):
            file.seek(offset)
            file.write(content)
    return path


def debugfs(disk: Path, command: str) -> str:
    assert DEBUGFS is not None
    done = subprocess.run(
        [DEBUGFS, "-R", command, disk], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.skipif(E2FSCK is None, reason="needs e2fsck")
@pytest.mark.parametrize(("size", "file_size"), SIZES)
def test_it_is_whole(tmp_path: Path, size: int, file_size: int) -> None:
    assert E2FSCK is not None
    disk = device(tmp_path / "disk", size, file_size)
    done = subprocess.run([E2FSCK, "-fn", disk], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{LABEL}: 12/16 files (0.0% non-contiguous)")


@pytest.mark.skipif(DEBUGFS is None, reason="needs debugfs")
def test_its_file_is_one_extent_of_written_blocks_at_a_huge_page(tmp_path: Path) -> None:
    size, file_size = SIZES[0]
    disk = device(tmp_path / "disk", size, file_size)
    with disk.open("r+b") as file:
        file.seek(FILE_START + file_size - 4)
        file.write(b"last")
    # An extent that is not written has the flag Uninit in its last column.
    extent = debugfs(disk, "ex slots").splitlines()[1]
    pages = file_size // BLOCK
    first = FILE_START // BLOCK
    assert extent.split("/")[2].split() == f"1 0 - {pages - 1} {first} - {first + pages - 1} {pages}".split()
    assert FILE_START % (2 * MIB) == 0
    content = tmp_path / "content"
    debugfs(disk, f"dump slots {content}")
    assert content.stat().st_size == file_size
    assert content.read_bytes().endswith(b"last")


@pytest.mark.skipif(DEBUGFS is None, reason="needs debugfs")
def test_only_root_gets_in(tmp_path: Path) -> None:
    disk = device(tmp_path / "disk", *SIZES[2])
    modes = {row.split()[-1]: row.split()[1:5] for row in debugfs(disk, "ls -l").splitlines() if row.strip()}
    assert modes["."] == ["40700", "(2)", "0", "0"]
    assert modes["slots"] == ["100600", "(1)", "0", "0"]


def test_the_file_itself_is_not_written() -> None:
    size, file_size = SIZES[0]
    assert (
        max(offset + len(content) for offset, content in bulk_filesystem.blocks(size, file_size))
        <= FILE_START
    )


@pytest.mark.parametrize(
    ("size", "file_size"),
    [
        (64 * MIB, 62 * MIB + BLOCK),
        (64 * MIB, BLOCK - 1),
        (64 * MIB + 1, BLOCK),
        (129 * MIB, BLOCK),
    ],
)
def test_what_does_not_fit_is_refused(size: int, file_size: int) -> None:
    with pytest.raises(ValueError):
        bulk_filesystem.blocks(size, file_size)
