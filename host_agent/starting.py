"""What whoever starts an instance does, whatever it is: start its keeper, follow its host agent, and end all of it if
that goes wrong.

The law: whoever asks for an instance that another command is just starting gets that one; a ^C ends what this command
started and nothing else; and what fails leaves nothing running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, replace

import trio

from host_agent import groups, keeper, state
from host_agent.client import ConnectionLost, connected
from host_agent.errors import ExitCode, UserError
from host_agent.paths import InstancePaths
from protocol.api import Event, GetStatus, InstanceStatus, Stage, StopInstance, Subscribe
from protocol.errors import AgentctlProtocolError
from protocol.link import Link, Service

Progress = Callable[[str], None]

#: A host agent answers this long after its keeper was started, also on a machine that is very busy, seconds.
AGENT_START_TIME = 30.0


class Ending(UserError):
    """The instance is about to be gone; soon it can be started."""


async def running(paths: InstancePaths, progress: Progress) -> InstanceStatus | None:
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
        raise Ending(
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


@dataclass(frozen=True, slots=True)
class UpResult:
    """The instance after a start. ``warnings`` and ``note`` (or "") are sentences for the user."""

    status: InstanceStatus
    started: bool
    warnings: tuple[str, ...]
    note: str = ""


def start(
    paths: InstancePaths,
    progress: Progress,
    what: str,
    *,
    keep_if: Collection[ExitCode],
    answers: int | None = None,
) -> InstanceStatus:
    """Start it, with ``paths.up_lock`` held and its configuration written, and wait until it runs.

    ``what`` is its other side, for people. A start that ends with one of ``keep_if`` is left for a look. ``answers``:
    a descriptor for the host agent (``remote.answers``).
    """
    fresh = state.InstanceState(
        wanted=True,
        started_at=time.time(),
        previous_context=state.load(paths.state).previous_context,
    )
    lock = state.try_lock(paths.lock)
    if lock is None:
        raise UserError(
            f"instance {paths.name} is being started by another command", "try again", ExitCode.BUSY
        )
    try:
        try:
            state.save(paths.state, fresh)
            keeper.spawn(paths, lock, answers=answers)
        finally:
            # The keeper has it now; an open file description is locked as long as any descriptor of it lives.
            os.close(lock)
        return groups.run(_follow_start, paths, progress)
    except KeyboardInterrupt:
        progress(f"interrupted; stopping {what}")
        with _interrupts_ignored():
            groups.run(abandon, paths)
        raise
    except UserError as error:
        if error.exit_code not in keep_if:
            groups.run(abandon, paths)
        raise


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


async def abandon(paths: InstancePaths, force: bool = True) -> None:
    """End an instance that was just being started, whatever it takes; without ``force`` what is to be kept is."""
    state.save(paths.state, replace(state.load(paths.state), wanted=False))
    with contextlib.suppress(UserError, AgentctlProtocolError):
        async with connected(paths, patience=AGENT_START_TIME) as link:
            await link.request(StopInstance(force), timeout=30)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
