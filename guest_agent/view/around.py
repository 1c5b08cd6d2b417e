"""Where things to see are, around this process: in a VM of ours, or on somebody's machine.

The law: what this user may not enter is not shown, so that what is shown can be looked into.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from guest_agent.data_disk import MOUNT
from guest_agent.view.places import Place, path_of

DATA: Final = "data"
MACHINE: Final = "machine"

KERNEL: Final = ("/proc", "/sys", "/dev")
"""Shown empty: what is read there are no files."""


def in_vm(data: Path = MOUNT) -> list[Place]:
    """The data disk, and the homes on it, of which there is one for each user. Blocks."""
    return [*_homes(data / "home"), Place(f"/{DATA}", str(data))]


def _homes(folder: Path) -> list[Place]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    paths = {name: path_of("home", name) for name in names}
    return [
        Place(path, str(folder / name), read_only=False, inherit=True)
        for name, path in paths.items()
        if path is not None
    ]


def on_machine(home: Path | None = None) -> list[Place]:
    """The user's home, and all that they may read."""
    home = Path.home() if home is None else home
    path = path_of("home", home.name) or "/home/user"
    return [
        Place(path, os.path.realpath(home), read_only=False, inherit=True),
        Place(f"/{MACHINE}", "/", hidden=KERNEL),
    ]


def enterable(
    places: Sequence[Place],
    may_enter: Callable[[str], bool] = lambda path: os.access(path, os.R_OK | os.X_OK),
) -> list[Place]:
    """Those that can be looked into. Blocks."""
    return [place for place in places if all(map(may_enter, place.layers or (place.source,)))]
