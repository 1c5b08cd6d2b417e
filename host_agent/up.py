"""``agentctl up``: from whatever state the instance is in to one that runs, with progress on the way.

The law: whoever asks for an instance that another ``up`` is just starting gets that one; a ^C ends what
this ``up`` started and nothing else; and what fails leaves nothing running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import trio

from host_agent import (
    applying,
    docker_context,
    docker_tools,
    ending,
    groups,
    host_side,
    keeper,
    mounts,
    state,
)
from host_agent.boot import find_qemu
from host_agent.client import RESTART_TIME, ConnectionLost, connected
from host_agent.configuration import config as configuration
from host_agent.configuration.config import Host, InstanceConfig, Wishes
from host_agent.errors import ExitCode, UserError
from host_agent.paths import Home, InstancePaths
from protocol.api import (
    Event,
    GetStatus,
    InstanceStatus,
    Stage,
    StopInstance,
    Subscribe,
)
from protocol.errors import AgentctlProtocolError
from protocol.link import Link, Service
from provision import image as images
from provision import recipe as recipes
from provision.errors import ProvisionError

Progress = Callable[[str], None]

#: A host agent answers this long after its keeper was started, also on a machine that is very busy, seconds.
AGENT_START_TIME = 30.0


#: What applies what flags asked for: of an instance that ran already, they are not remembered.
_AGAIN = "agentctl stop, then agentctl up with the same flags"


@dataclass(frozen=True, slots=True)
class UpResult:
    """The instance after ``up``. ``warnings`` and ``note`` (or "") are sentences for the user."""

    status: InstanceStatus
    started: bool
    warnings: tuple[str, ...]
    note: str = ""


def run(home: Home, paths: InstancePaths, wishes: Wishes, progress: Progress) -> UpResult:
    """Bring the instance up. Raises ``UserError``, or ``KeyboardInterrupt`` with everything undone."""
    home.ensure()
    paths.ensure()
    while True:
        asked = _asked(home, paths, wishes)
        try:
            running = groups.run(_running, paths, progress)
        except _Ending:
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


class _Ending(UserError):
    """The instance is about to be gone; soon it can be started."""


async def _running(paths: InstancePaths, progress: Progress) -> InstanceStatus | None:
    """The instance if it runs already, or when another command has it running; None if it does not."""
    if not state.is_locked(paths.lock):
        return None
    living = False
    try:
        async with _following(paths, progress, AGENT_START_TIME) as (link, outcome):
            status = await link.request(GetStatus())
            living = status.stage not in (Stage.STOPPED, Stage.FAILED)
            if living and status.stage is not Stage.RUNNING:
                await _joined_start(status, link, outcome)
            return await link.request(GetStatus())
    except UserError as error:
        if living:
            raise _recorded_failure(paths) or error from None
        raise _Ending(
            f"instance {paths.name} does not answer", "end it: agentctl stop --force", ExitCode.BUSY
        ) from None


async def _joined_start(status: InstanceStatus, link: Link, outcome: _Outcome) -> None:
    if status.stage is Stage.STOPPING:
        raise UserError(
            f"instance {status.name} is just stopping", "try again in a few seconds", ExitCode.BUSY
        )
    if status.stage is Stage.DOCKER and status.hint:
        raise UserError(status.detail, status.hint, ExitCode.DOCKER)
    await outcome.wait(link)


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
    current = state.load(paths.state)
    fresh = state.InstanceState(
        wanted=True, started_at=time.time(), previous_context=current.previous_context
    )
    lock = state.try_lock(paths.lock)
    if lock is None:
        raise UserError(
            f"instance {paths.name} is being started by another command", "try again", ExitCode.BUSY
        )
    try:
        try:
            state.save(paths.state, fresh)
            keeper.spawn(paths, lock)
        finally:
            # The keeper has it now; an open file description is locked as long as any descriptor of it lives.
            os.close(lock)
        status = groups.run(_follow_start, paths, progress)
    except KeyboardInterrupt:
        progress("interrupted; stopping the VM")
        with _interrupts_ignored():
            groups.run(abandon, paths)
        raise
    except UserError as error:
        # A VM without Docker is left for a look inside; one that somebody else stops is theirs.
        if error.exit_code not in (ExitCode.DOCKER, ExitCode.BUSY):
            groups.run(abandon, paths)
        raise
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


async def _follow_start(paths: InstancePaths, progress: Progress) -> InstanceStatus:
    while True:
        try:
            async with _following(paths, progress, AGENT_START_TIME) as (link, outcome):
                await outcome.wait(link)
                return await link.request(GetStatus())
        except ConnectionLost as error:
            # The agent may have failed and gone before it could tell us; it left its reason behind. One that
            # was killed is started again by its keeper, and goes on where it was.
            if not (state.is_locked(paths.lock) and state.load(paths.state).wanted):
                raise _recorded_failure(paths) or error from None
        except UserError as error:
            raise _recorded_failure(paths) or error from None


class _Outcome:
    """How a start ends, learnt from the instance's events."""

    def __init__(self, paths: InstancePaths, progress: Progress) -> None:
        self._paths = paths
        self._progress = progress
        self._done = trio.Event()
        self._error: UserError | None = None

    async def on_event(self, event: Event) -> None:
        await trio.lowlevel.checkpoint()
        if event.kind == "failed":
            code = ExitCode.of(event.fields.get("code", ""))
            self._finish(UserError(event.message, event.fields.get("hint", ""), code))
        elif event.kind == "docker-failed":
            self._finish(UserError(event.message, event.fields.get("hint", ""), ExitCode.DOCKER))
        elif event.kind == "stage" and event.fields.get("stage") == Stage.STOPPING:
            self._finish(
                UserError(f"instance {self._paths.name} was stopped while it started", "", ExitCode.BUSY)
            )
        elif event.kind == "stage" and event.fields.get("stage") == Stage.RUNNING:
            self._finish(None)
        else:
            self._progress(event.message)

    def _finish(self, error: UserError | None) -> None:
        if not self._done.is_set():
            self._error = error
            self._done.set()

    async def wait(self, link: Link) -> None:
        await link.request(Subscribe())
        await self._done.wait()
        if self._error is not None:
            raise self._error


@contextlib.asynccontextmanager
async def _following(
    paths: InstancePaths, progress: Progress, patience: float
) -> AsyncIterator[tuple[Link, _Outcome]]:
    outcome = _Outcome(paths, progress)
    service = Service()
    service.on_notice(Event, outcome.on_event)
    async with connected(paths, service, patience=patience) as link:
        yield link, outcome


def _recorded_failure(paths: InstancePaths) -> UserError | None:
    current = state.load(paths.state)
    if current.wanted or not current.failure:
        return None
    return UserError(current.failure, current.hint, ExitCode.of(current.failure_code))


async def abandon(paths: InstancePaths) -> None:
    """End an instance that was just being started, whatever it takes."""
    state.save(paths.state, replace(state.load(paths.state), wanted=False))
    with contextlib.suppress(UserError, AgentctlProtocolError):
        async with connected(paths, patience=AGENT_START_TIME) as link:
            await link.request(StopInstance(force=True), timeout=30)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
