"""The folder of a view before and after: empty, and nothing mounted on it. Each end of a run looks at it.

The law: nothing here ever removes what is in a folder. What might be there are the guest's own files.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.view import unmounting

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A view that somebody asked for."""

    path: str
    owner: str


def read_wanted(record: Path) -> Wanted | None:
    """What was written down; None if nothing was, or it cannot be read."""
    try:
        path, owner = json.loads(record.read_bytes())
        return Wanted(str(path), str(owner))
    except (OSError, ValueError, TypeError):
        return None


def prepare(path: Path, paths: InstancePaths) -> None:
    """An empty folder for a view. Blocks. Raises ``UserError``."""
    source = unmounting.source_of(paths.name)
    unmounting.unmount(str(path), source)  # of one whose processes were all killed
    for view in unmounting.views():
        if view.path == str(path):
            raise UserError(
                f"{path} has a view of another instance ({view.source.split(':')[1]})",
                "name another folder",
                ExitCode.USAGE,
            )
    try:
        if path == paths.view:
            path.mkdir(mode=0o700, exist_ok=True)
        if not path.is_dir():
            raise UserError(
                f"{path} is not a folder", "make it first, or leave it to agentctl", ExitCode.USAGE
            )
        if any(path.iterdir()):
            raise UserError(
                f"{path} is not empty", "name an empty folder, or none: agentctl view", ExitCode.USAGE
            )
        if not os.access(path, os.W_OK):
            raise UserError(f"you may not write to {path}", "name a folder of your own", ExitCode.USAGE)
    except OSError as error:
        raise UserError(f"{path} cannot be used: {error.strerror}", "name another", ExitCode.USAGE) from None


def clean(path: str, paths: InstancePaths) -> None:
    """Nothing is mounted at ``path`` any more; our own folder goes as well. Blocks for a moment."""
    if not unmounting.unmount(path, unmounting.source_of(paths.name)):
        logger.error("the view at %s cannot be unmounted", path)
        return
    if path == str(paths.view):
        with suppress(OSError):
            paths.view.rmdir()


def remove_leftover(paths: InstancePaths) -> None:
    """What a run has left of a view, undone; by whoever has the instance's lock."""
    wanted = read_wanted(paths.view_record)
    for path in {str(paths.view), *([wanted.path] if wanted else [])}:
        clean(path, paths)
