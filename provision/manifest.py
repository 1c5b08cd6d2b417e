"""What an image says of itself, written as its last file: an image without one is none."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from provision.recipe import Recipe

#: The file that makes a directory an image.
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is made of. ``built_at`` is in seconds since the epoch, ``packages`` name=version."""

    digest: str
    suite: str
    architecture: str
    kernel_release: str
    cmdline: list[str]
    built_at: int
    sha256: dict[str, str]
    packages: dict[str, str]


def read(directory: Path) -> Manifest:
    """The manifest of the image in ``directory``. Raises ``OSError``, ``ValueError`` or ``TypeError``."""
    return Manifest(**json.loads((directory / MANIFEST).read_bytes()))


def packages(root: Path) -> dict[str, str]:
    """The packages of the root filesystem at ``root`` and their versions."""
    lines = (root / "usr/lib/agentctl/packages").read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines)


def write(work: Path, recipe: Recipe, release: str, packages: dict[str, str]) -> None:
    """Write the manifest of what is in ``work``, and bring all of it to the disk."""
    manifest = Manifest(
        digest=recipe.digest,
        suite=recipe.suite,
        architecture=recipe.architecture,
        kernel_release=release,
        cmdline=list(recipe.cmdline),
        built_at=int(time.time()),
        sha256={name: _sha256(work / name) for name in ("kernel", "initrd", "root.img")},
        packages=packages,
    )
    with (work / MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
    for path in work.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _sha256(path: Path) -> str:
    """Of the file's data extents only, each with its offset: hashing 15 GiB of holes takes a minute."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for start, end in _data_extents(file.fileno()):
            digest.update(b"%d %d\n" % (start, end))
            file.seek(start)
            while start < end:
                block = file.read(min(1 << 20, end - start))
                digest.update(block)
                start += len(block)
    return digest.hexdigest()


def _data_extents(descriptor: int) -> Iterator[tuple[int, int]]:
    offset = 0
    while True:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return
        offset = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, offset
