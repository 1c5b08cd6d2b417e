"""Removing an instance. The law: the data disk goes only when it is named, and last."""

from __future__ import annotations

import contextlib
import os

from host_agent import docker_context, host_side, state
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from host_agent.view.leftover import remove_leftover


def remove(paths: InstancePaths, *, data: bool) -> tuple[str, ...]:
    """Remove the files of a stopped instance, and with ``data`` its disk. Raises ``UserError`` if it runs.

    A kept disk is found again by the next ``up``. Returns what is left elsewhere on this machine, in sentences.
    """
    with state.locked(paths.up_lock) as ours:
        if not ours or state.is_locked(paths.lock):
            raise UserError(
                f"another command is at work on instance {paths.name}",
                "try again when it is done",
                ExitCode.BUSY,
            )
        docker_context.delete(docker_context.config_dir(os.environ), docker_context.context_name(paths.name))
        left = host_side.undo(paths)
        remove_leftover(
            paths
        )  # before anything in its folder is touched: what is seen there are the guest's files
        paths.config_draft.unlink(missing_ok=True)
        kept = {paths.up_lock} if data else {paths.up_lock, paths.data_disk}
        for path in sorted(paths.directory.iterdir(), key=lambda path: path == paths.data_disk):
            if path not in kept:
                path.unlink()
        paths.up_lock.unlink()
    if data:
        # Another `up` may have come the moment the lock was let go of; then the folder is its own.
        with contextlib.suppress(OSError):
            paths.directory.rmdir()
    return left
