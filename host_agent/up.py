"""``agentctl up``: from whatever state the instance is in to one that runs, with progress on the way.

The law: whoever asks for an instance that another ``up`` is just starting gets that one; a ^C ends what
this ``up`` started and nothing else; and what fails leaves nothing running.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from host_agent import (
    applying,
    docker_context,
    docker_tools,
    ending,
    groups,
    host_side,
    mounts,
    starting,
    state,
)
from host_agent.boot import find_qemu
from host_agent.client import RESTART_TIME, connected
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Host, InstanceConfig, Wishes
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from host_agent.starting import Progress, UpResult
from protocol.api import GetStatus, InstanceStatus
from provision import image as images
from provision import recipe as recipes
from provision.errors import ProvisionError

#: What applies what flags asked for: of an instance that ran already, they are not remembered.
_AGAIN = "agentctl stop, then agentctl up with the same flags"


def run(home: Home, paths: InstancePaths, wishes: Wishes, progress: Progress) -> UpResult:
    """Bring the instance up. Raises ``UserError``, or ``KeyboardInterrupt`` with everything undone."""
    home.ensure()
    paths.ensure()
    while True:
        asked = _asked(home, paths, wishes)
        try:
            running = groups.run(starting.running, paths, progress)
        except starting.Ending:
            # It is just ending: its socket has gone and its processes have not.
            if groups.run(ending.lock_is_free, paths):
                continue
            raise
        if running is not None:
            return _told(asked, _joined(paths, running, asked.config))
        with state.locked(paths.up_lock) as ours:
            if ours:
                # Another up may have finished between our look and our lock.
                if state.is_locked(paths.lock):
                    continue
                ask = partial(_asked, home, paths, wishes)
                return _told(asked, _start(home, paths, ask, progress))
        progress("another agentctl command is starting this instance; waiting for it")
        while state.is_locked(paths.up_lock):
            time.sleep(0.2)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is wanted: the file with the flags' wishes. ``folders`` has what is to be said of folders."""

    config: InstanceConfig
    folders: mounts.WithDirectory


def _asked(home: Home, paths: InstancePaths, wishes: Wishes) -> _Asked:
    """Raises ``UserError`` for what cannot be."""
    host = Host.measure()
    config = wishes.applied(configuration.load(paths, host))
    config = configuration.with_kept_disk(config, wishes, paths.data_disk)
    configuration.check(config, host)
    configuration.check_ports(config.ports)
    # Where a folder really is, is looked up when it is chosen: of one that was written into the file, that is now.
    config = replace(config, mounts=mounts.resolved(config.mounts))
    folders = _folders(home, wishes, config)
    return _Asked(replace(config, mounts=folders.specs), folders)


def _told(asked: _Asked, result: UpResult) -> UpResult:
    """``result`` with what is to be said of folders, first."""
    warnings = (*filter(None, [asked.folders.warning]), *result.warnings)
    return replace(result, warnings=warnings, note=asked.folders.note)


def _folders(home: Home, wishes: Wishes, config: InstanceConfig) -> mounts.WithDirectory:
    """What the VM is to see. Folders that were named are what is wanted, and no other is added to them."""
    directory = mounts.here()
    if wishes.mounts is None:
        return mounts.with_directory(config.mounts, directory, home.root)
    if directory is None or mounts.share_of(config.mounts, directory):
        return mounts.WithDirectory(config.mounts)
    return mounts.WithDirectory(
        config.mounts,
        warning=f"the VM does not see this folder, {directory}; to add it: agentctl up --mount . (and the others)",
    )


def _joined(paths: InstancePaths, running: InstanceStatus, config: InstanceConfig) -> UpResult:
    warnings = (*_environment_warnings(paths, config), *applying.apply(paths, running, config, _AGAIN))
    if config.disk != running.disk:
        running = groups.run(_status, paths)
    return UpResult(running, started=False, warnings=warnings)


async def _status(paths: InstancePaths) -> InstanceStatus:
    async with connected(paths, patience=RESTART_TIME) as link:
        return await link.request(GetStatus())


def _environment_warnings(paths: InstancePaths, config: InstanceConfig) -> tuple[str, ...]:
    if config.runtime == recipes.CONTAINERD:
        return ()
    name = docker_context.context_name(paths.name)
    warning = docker_context.override_warning(os.environ, name, paths.docker_socket)
    return (warning,) if warning else ()


def _start(home: Home, paths: InstancePaths, ask: Callable[[], _Asked], progress: Progress) -> UpResult:
    """Start it, with ``paths.up_lock`` held."""
    configuration.check_disk(ask().config, paths.data_disk)
    find_qemu()
    try:
        image = images.ensure(home.images, recipes.load(runtime=ask().config.runtime), progress)
    except ProvisionError as error:
        raise UserError(error.message, error.hint, ExitCode.RESOURCES) from None
    progress(f"image {image.manifest.digest}, Debian {image.manifest.suite}")
    warnings = (*_tools(home, ask().config, progress), *host_side.arrange(paths, ask().config))
    # Of the file as it is now: `forward add` may have changed it before we had the lock, and people edit it.
    configuration.update(paths, lambda: ask().config)
    # A VM without Docker is left for a look inside; one that somebody else stops is theirs.
    status = starting.start(paths, progress, "the VM", keep_if=(ExitCode.DOCKER, ExitCode.BUSY))
    return UpResult(
        status,
        started=True,
        warnings=(
            *warnings,
            *_slowness(status),
            *status.warnings,
            *_environment_warnings(paths, ask().config),
            *groups.run(applying.mounts_after_start, paths),
        ),
    )


def _slowness(status: InstanceStatus) -> tuple[str, ...]:
    """Emulation that nobody asked for costs a factor of ten; the reason is often quickly mended."""
    if status.accelerator != "tcg" or status.accelerator_reason in ("", "asked for"):
        return ()
    return (f"the VM is emulated, which is slow: {status.accelerator_reason}",)


def _tools(home: Home, config: InstanceConfig, progress: Progress) -> tuple[str, ...]:
    return () if config.runtime == recipes.CONTAINERD else groups.run(_docker_tools, home, progress)


async def _docker_tools(home: Home, progress: Progress) -> tuple[str, ...]:
    """A docker CLI and its plugins where the host has none; without them the VM still is of use."""
    said = ""

    def report(message: str, fraction: float) -> None:
        # apt reports many times a second; a line that says nothing new is not a line.
        nonlocal said
        if message != said:
            said = message
            progress(message)

    try:
        await docker_tools.ensure(home.tools, progress=report)
    except (UserError, OSError) as error:
        hint = getattr(error, "hint", "")
        return (f"the docker command line is not complete: {error}" + (f" ({hint})" if hint else ""),)
    return ()
