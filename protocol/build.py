"""Which build this is.

Both sides of a VM's link run the same sources: the guest's are delivered by the host at each boot. The
digest in the hello says whether that is so.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

# The packages that run in the guest.
GUEST_PACKAGES: Final = ("protocol", "fileserver", "guest_agent")


@cache
def digest() -> str:
    """The digest of the sources this process was started from (of those next to this package)."""
    return digest_of(Path(__file__).resolve().parent.parent)


def digest_of(root: Path) -> str:
    """16 hex digits: sha256 over path and content of every ``*.py`` of ``GUEST_PACKAGES`` below ``root``."""
    total = hashlib.sha256()
    sources = [path for package in GUEST_PACKAGES for path in (root / package).rglob("*.py")]
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        content = path.read_bytes()
        # Lengths first, so that no two different trees read the same.
        total.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]
