"""fio with verification, and stress-ng's filesystem stressors, on the mount."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.files.harness import Plane


def clear(plane: Plane) -> None:
    for path in plane.host.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(autouse=True)
def clean(plane: Plane) -> Iterator[None]:
    yield
    clear(plane)


JOBS = {
    "random writes of 4 KiB": ["--rw=randwrite", "--bs=4k", "--ioengine=psync"],
    "random mapped": ["--rw=randwrite", "--bs=4k", "--ioengine=mmap"],
    "sequential 128 KiB": ["--rw=write", "--bs=128k", "--ioengine=psync", "--size=32m", "--filesize=32m"],
    "uneven sizes, mixed": ["--rw=randrw", "--bsrange=512-64k", "--bs_unaligned=1", "--ioengine=pvsync"],
    "asynchronous, direct": ["--rw=randrw", "--bs=8k", "--ioengine=libaio", "--iodepth=16", "--direct=1"],
    "synced": ["--rw=randwrite", "--bs=4k", "--ioengine=psync", "--fsync=32", "--size=1m", "--filesize=1m"],
}


OF_LARGE_DATA = {name: JOBS[name] for name in ("random mapped", "sequential 128 KiB", "asynchronous, direct")}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_fio_reads_what_it_wrote(plane: Plane, job: list[str], pytestconfig: pytest.Config) -> None:
    fio(plane, job, pytestconfig)


@pytest.mark.parametrize("job", OF_LARGE_DATA.values(), ids=OF_LARGE_DATA)
def test_fio_without_memory(inline: Plane, job: list[str], pytestconfig: pytest.Config) -> None:
    fio(inline, job, pytestconfig)
    clear(inline)


def fio(plane: Plane, job: list[str], pytestconfig: pytest.Config) -> None:
    size = "64m" if pytestconfig.getoption("--long") else "4m"
    argv = ["fio", "--name=job", "--directory=.", f"--size={size}", f"--filesize={size}", "--numjobs=2", *job]
    argv += ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--group_reporting", "--fallocate=none"]
    finished = plane.run(argv, timeout=120)
    assert "err= 0" in finished.output
    assert "verify: bad" not in finished.output + finished.errors


STRESSORS = [
    "access", "chmod", "fallocate", "fcntl", "flock", "fpunch", "fstat", "getdent", "hdd", "io", "iomix",
    "locka", "lockf", "lockofd", "readahead", "revio", "seek", "sync-file", "utime", "xattr",
]  # fmt: skip
LONG_STRESSORS = [
    "chdir",
    "dentry",
    "dir",
    "dirdeep",
    "filename",
    "link",
    "mknod",
    "open",
    "rename",
    "symlink",
    "touch",
]
"""Those that end only when they have cleared away thousands of files."""


def test_stress_ng(plane: Plane, pytestconfig: pytest.Config) -> None:
    at_length = pytestconfig.getoption("--long")
    seconds = 300 if at_length else 6
    argv = ["stress-ng", "--temp-path", ".", "--verify", "--timeout", str(seconds), "--oomable"]
    sizes = {
        "hdd-bytes": "4m",
        "fallocate-bytes": "4m",
        "iomix-bytes": "4m",
        "seek-size": "1m",
        "readahead-bytes": "2m",
    }
    sizes |= {"sync-file-bytes": "2m", "fpunch-ops": "20", "filename-opts": "posix", "dirdeep-inodes": "200"}
    for option, value in sizes.items():
        argv += [f"--{option}", value]
    for stressor in STRESSORS + (LONG_STRESSORS if at_length else []):
        argv += [f"--{stressor}", "1"]
    finished = plane.run(argv, timeout=seconds + 150, status=None)
    said = finished.output + finished.errors
    assert [line for line in said.splitlines() if " fail: " in line or "unsuccessful" in line] == []
    assert finished.status == 0, said[-4000:]
