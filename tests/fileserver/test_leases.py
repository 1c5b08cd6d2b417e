"""Who has a file open for writing, as the kernel knows it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fileserver.leases import Writers, writers
from tests.fileserver.stranger import Stranger

# Says a word for each stage, and goes on when it is told to.
_MAPPER = textwrap.dedent(
    """
    import mmap, sys
    with open("a", "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    print("mapped, and closed", flush=True)
    sys.stdin.readline()
    memory.close()
    print("not even mapped", flush=True)
    sys.stdin.readline()
    """
)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[int]:
    """A descriptor of the file ``a``."""
    (tmp_path / "a").write_text("content")
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_a_writer_counts_for_as_long_as_it_has_the_file_open(reader: int, tmp_path: Path) -> None:
    assert writers(reader) is Writers.NONE
    with Stranger(tmp_path) as stranger:
        stranger("exec 7<a")
        assert writers(reader) is Writers.NONE
        stranger("exec 8>>a")
        assert writers(reader) is Writers.SOME
        stranger("exec 8>&-")
        assert writers(reader) is Writers.NONE


def test_one_of_ours_counts_as_well(reader: int, tmp_path: Path) -> None:
    with (tmp_path / "a").open("ab"):
        assert writers(reader) is Writers.SOME
    assert writers(reader) is Writers.NONE


def test_a_file_that_is_mapped_still_has_a_writer(reader: int, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _MAPPER]
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as mapper:
        assert mapper.stdin is not None
        assert mapper.stdout is not None
        assert mapper.stdout.readline() == "mapped, and closed\n"
        assert writers(reader) is Writers.SOME
        mapper.stdin.write("\n")
        assert mapper.stdout.readline() == "not even mapped\n"
        assert writers(reader) is Writers.NONE
        mapper.stdin.write("\n")


def test_whoever_opens_the_file_meanwhile_is_let_in_and_we_live(reader: int, tmp_path: Path) -> None:
    """A broken lease is told by SIGIO, if nobody has said otherwise, which would end this process."""
    with subprocess.Popen(
        ["sh", "-c", "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); : >>a; done"], cwd=tmp_path
    ) as opener:
        while opener.poll() is None:
            assert writers(reader) is not Writers.UNKNOWN
    assert opener.returncode == 0
    assert fcntl.fcntl(reader, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    assert writers(reader) is Writers.NONE


def test_what_has_no_leases(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert writers(descriptor) is Writers.UNKNOWN
    os.close(descriptor)
    with pytest.raises(OSError):
        writers(descriptor)


# Modules are imported before the privileges go: the user may not read them.
_AS_NOBODY = textwrap.dedent(
    """
    import os, sys
    from fileserver.leases import writers
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    print(*(writers(os.open(path, os.O_RDONLY)).name for path in sys.argv[1:]))
    """
)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file of somebody else's")
def test_a_file_of_somebody_else_s(place: Path) -> None:
    place.chmod(0o755)
    theirs, mine = place / "theirs", place / "mine"
    for path in (theirs, mine):
        path.write_text("x")
        path.chmod(0o644)
    os.chown(mine, 65534, 65534)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, theirs, mine],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("UNKNOWN NONE\n", "")


def test_several_threads_ask_by_one_descriptor(reader: int) -> None:
    """Two first READs of a file: the lease is the open file description's, so one gives it back for both."""
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(writers, reader) for _ in range(20_000)]
    assert {answer.result() for answer in answers} == {Writers.NONE}
