"""The files that are benchmarked: made on the host, the same bytes in every run.

The law: a function of ``Sizes`` alone. No clock, no locale, no random seed of the process; git commits at a
fixed time. Whatever two peers are asked to read, both have the same of.

    DIRECTORY/common/source      text in a source tree's proportions      (grep)
    DIRECTORY/common/copied      the same, for nobody else to look at     (cp)
    DIRECTORY/common/modules     Python modules that one of them imports  (import)
    DIRECTORY/common/many        small files in many folders              (find, ls, stat)
    DIRECTORY/common/big         one file of random bytes                 (cat)
    DIRECTORY/common/text        one file of the sources' words           (cat)
    DIRECTORY/PEER/repository    a git repository, committed              (git; its index is written, so one each)
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
FILES_PER_FOLDER = 25

#: Sizes of source files in bytes come from a log-normal distribution; this is its median, and most of a
#: tree's bytes are in a few files of ten times as much.
SOURCE_MEDIAN = 6000

# Git's own environment and nobody's configuration; a fixed time, so that the objects have fixed names.
_GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z",
    "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@localhost",
    "GIT_COMMITTER_NAME": "bench",
    "GIT_COMMITTER_EMAIL": "bench@localhost",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. Counts are files, operations or modules; ``big``, ``text`` and ``written`` are bytes."""

    source: int = 800
    modules: int = 500
    many: int = 5000
    repository: int = 5000
    big: int = 64 * MIB
    text: int = 32 * MIB
    written: int = 64 * MIB
    unpacked: int = 2000
    stats: int = 10_000
    appends: int = 1000
    opens: int = 1000

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


FULL = Sizes()

#: In emulation a message takes milliseconds instead of 30 us, and sshfs needs six to make a file: with the full
#: sizes five rounds would take hours, with these ten minutes. All of it is linear, so ratios stay.
EMULATED = Sizes(
    source=100, modules=30, many=250, repository=100, big=32 * MIB, text=8 * MIB, written=32 * MIB,
    unpacked=100, stats=250, appends=200, opens=100,
)  # fmt: skip


def make(directory: Path, peers: Sequence[str], sizes: Sizes) -> None:
    """Make everything that is read, below ``directory``, which must be empty. Needs git."""
    common = directory / "common"
    _make_source(common / "source", sizes.source)
    shutil.copytree(common / "source", common / "copied")
    _make_modules(common / "modules", sizes.modules)
    _make_many(common / "many", sizes.many)
    _make_big(common / "big", sizes.big)
    _make_text(common / "text", sizes.text)
    template = directory / "repository"
    _make_repository(template, sizes.repository)
    for peer in peers:
        (directory / peer).mkdir()
        shutil.copytree(template, directory / peer / "repository", symlinks=True)
    shutil.rmtree(template)


def _make_source(directory: Path, count: int) -> None:
    generator = random.Random("source")
    words = _words(generator)
    for index in range(count):
        size = min(int(generator.lognormvariate(0, 1) * SOURCE_MEDIAN), 20 * SOURCE_MEDIAN)
        lines, length = [], 0
        while length < size:
            lines.append(" ".join(generator.choices(words, k=8)))
            length += len(lines[-1]) + 1
        _write(_place(directory, index, "c"), "\n".join(lines).encode())


def _make_modules(directory: Path, count: int) -> None:
    """Packages of 25 modules each, and ``everything.py``, which imports them all."""
    names = []
    for index in range(count):
        path = _place(directory, index, "py")
        body = "".join(f"def function_{n}(value):\n    return value + {n}\n\n\n" for n in range(10))
        _write(path, body.encode())
        names.append(f"{path.parent.name}.{path.stem}")
    _write(directory / "everything.py", "".join(f"import {name}\n" for name in names).encode())


def _make_many(directory: Path, count: int) -> None:
    for index in range(count):
        _write(_place(directory, index, "txt"), f"file {index}\n".encode())


def _make_big(path: Path, size: int) -> None:
    generator = random.Random("big")
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(generator.randbytes(min(MIB, size - start)))


def _make_text(path: Path, size: int) -> None:
    generator = random.Random("text")
    words = _words(generator)
    with path.open("wb") as file:
        left = size
        while left:
            line = (" ".join(generator.choices(words, k=8)) + "\n").encode()
            left -= file.write(line[:left])


def _words(generator: random.Random) -> list[str]:
    return [
        "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=n))
        for n in range(2, 10)
        for _ in range(200)
    ]


def _make_repository(directory: Path, count: int) -> None:
    for index in range(count):
        _write(_place(directory, index, "txt"), f"file {index}\n".encode() * (index % 50 + 1))
    for arguments in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-q", "-m", "everything")):
        # Packed at once: a loose object for each file would only make the copies slow.
        command = ["git", "-c", "core.bigFileThreshold=1", "-C", str(directory), *arguments]
        environment = {"PATH": os.environ.get("PATH", os.defpath), **_GIT_ENVIRONMENT}
        subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL)


def _place(directory: Path, index: int, suffix: str) -> Path:
    return directory / f"folder_{index // FILES_PER_FOLDER:03}" / f"file_{index:05}.{suffix}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
