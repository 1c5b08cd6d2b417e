"""The guest agent's drive: a tar of the packages that run there on a raw disk, no filesystem.

It is written at each start, so the two agents are always of one build, and it needs no tool that makes
filesystems, on any host. Equal sources make equal bytes: no times, no owners.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

#: Disks are read in sectors; QEMU pads a shorter file, but says so on stderr.
SECTOR = 512

_PACKAGES = ("protocol", "fileserver", "guest_agent")


def sources(root: Path) -> Iterator[Path]:
    """The Python files of the bundle below ``root``, in a stable order."""
    for package in _PACKAGES:
        yield from sorted((root / package).rglob("*.py"))


def build(root: Path | None = None) -> bytes:
    """The drive's content, a whole number of sectors, for the packages below ``root``.

    ``root`` defaults to where this package is installed.
    """
    root = root or Path(__file__).parent.parent
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sources(root):
            info = tarfile.TarInfo(str(path.relative_to(root)))
            content = path.read_bytes()
            info.size = len(content)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(content))
    content = buffer.getvalue()
    return content + bytes(-len(content) % SECTOR)
