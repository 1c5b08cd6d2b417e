"""The process that shows the guest's files here (``host_agent.view``): kept running while they are looked at.

The laws:
- It never outlives the host agent, since the end of its control socket is its own end; and when it has ended, however
  that was, its path is a plain folder again before anything else is done.
- What was asked for is written down, so a host agent that comes after a killed one shows it again; it ends with the
  instance. Who unmounts by other means has ended it as well.
- One at a time: the guest's side has one port for it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import trio

from host_agent import agentlog, file_server_process
from host_agent.client import hello
from host_agent.errors import ExitCode, UserError
from host_agent.files import write_atomically
from host_agent.groups import collapsed
from host_agent.paths import InstancePaths
from host_agent.process import describe_exit
from host_agent.view import PROGRAM, library
from host_agent.view.control import GetViewState, ViewChanged, ViewState
from host_agent.view.leftover import Wanted, clean, prepare, read_wanted
from protocol.api import View, ViewStage
from protocol.errors import AgentctlProtocolError, LinkClosed
from protocol.link import Link, Service
from protocol.session import Role

logger = logging.getLogger(__name__)

#: Before it is started again, doubling, seconds.
FIRST_DELAY = 0.1
MOST_DELAY = 5.0

#: One that lived as long as this was sound, seconds.
SOUND_LIFE = 10.0

#: Short lives in a row after which it is given up.
MANY_FAILURES = 3

#: How long whoever asks for it waits until it can be looked at, seconds; the process says before what it waits for.
START_TIME = 90.0

#: How long its own answer is waited for, seconds.
ANSWER_TIME = 2.0

LOGS_HINT: Final = "see: agentctl logs view"

#: Has the other side serve its files, or serve them no more. Raises ``UserError``.
Serve = Callable[[bool], Awaitable[None]]


class Say(Protocol):
    """``EventLog.say``."""

    def __call__(self, kind: str, message: str, **fields: str) -> None: ...


class ViewService:
    """One instance's."""

    def __init__(
        self,
        paths: InstancePaths,
        say: Say,
        serve: Serve,
        program: Sequence[str] = PROGRAM,
        *,
        packed: bool = False,
    ) -> None:
        """``packed`` as for ``GuestLink``."""
        self._paths = paths
        self._say = say
        self._serve = serve
        self._program = program
        self._packed = packed
        self._wanted = read_wanted(paths.view_record)
        self._served = self._wanted is not None
        self._life_is_on = False
        self._state = ViewState()
        self._link: Link | None = None
        self._life = trio.CancelScope()
        self._failures = 0
        self._trouble = ""
        self._news = trio.Event()
        self._changing = trio.Lock()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody looks, or is about to."""
        return self._wanted is not None

    # --- what is asked -------------------------------------------------------------------------------

    async def report(self) -> View:
        """How it is now."""
        await trio.lowlevel.checkpoint()
        if self._link is not None:
            with suppress(AgentctlProtocolError):
                self._learn(await self._link.request(GetViewState(), timeout=ANSWER_TIME))
        return self._current()

    async def start(self, path: str, owner: str) -> View:
        """Show the files at ``path``, or where there is one already, just that. Raises ``UserError``."""
        wanted = Wanted(path, owner)
        async with self._changing:
            if self._wanted is not None and self._wanted != wanted:
                raise UserError(
                    f"the files are shown at {self._wanted.path} already",
                    "there can be one view of an instance; end that first: agentctl view --end",
                    ExitCode.USAGE,
                )
            if self._wanted is None:
                await trio.to_thread.run_sync(library.check)
                await trio.to_thread.run_sync(prepare, Path(path), self._paths)
                await self._serve(True)
                self._served = True
                self._want(wanted)
            await self._settle()
            if self._trouble or not self._state.mounted:
                reason = self._trouble or "the view does not come up"
                await self._end()
                raise UserError(reason, LOGS_HINT, ExitCode.GUEST)
        return await self.report()

    async def end(self) -> View:
        """Show them no more; also if they are not. The folder is empty then."""
        self._forget()  # whoever waits for it to come up waits no more
        async with self._changing:
            await self._end()
        return self._current()

    async def _end(self) -> None:
        self._forget()
        self._life.cancel()
        while self._life_is_on:
            await self._news.wait()
        await self._serve_no_more()

    async def _serve_no_more(self) -> None:
        if self._served:
            self._served = False
            with suppress(UserError):
                await self._serve(False)

    async def _settle(self) -> None:
        with trio.move_on_after(START_TIME):
            while self._wanted is not None and not self._state.mounted and not self._trouble:
                await self._news.wait()

    def _current(self) -> View:
        wanted, state = self._wanted, self._state
        if wanted is None:
            return View(ViewStage.OFF, str(self._paths.view), "me")
        stage = ViewStage.MOUNTED if state.mounted else ViewStage.STARTING
        reason = "" if state.connected or not state.mounted else "the guest does not answer just now"
        return View(stage, wanted.path, wanted.owner, state.connected, reason, "", state.places)

    # --- one process after another -------------------------------------------------------------------

    async def run(self) -> None:
        """Show what is wanted, until cancelled; then nothing is mounted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agentlog.keep_bounded, self._paths.view_log)
            while True:
                while self._wanted is None:
                    await self._news.wait()
                await self._live_once(self._wanted)

    async def _live_once(self, wanted: Wanted) -> None:
        started = trio.current_time()
        status: int | None = None
        self._life_is_on = True
        self._life = trio.CancelScope()
        try:
            with self._life:
                status = await self._live(wanted)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(clean, wanted.path, self._paths)
            self._state = ViewState()
        if self._wanted is wanted and not self._life.cancel_called:
            self._lost(status, trio.current_time() - started)
        if self._wanted is None:
            await self._serve_no_more()
        self._life_is_on = False
        self._tell()
        if self._wanted is wanted:
            await trio.sleep(min(MOST_DELAY, FIRST_DELAY * 2**self._failures))

    def _lost(self, status: int | None, lived: float) -> None:
        """It has ended by itself."""
        if status == 0:
            self._say("view", "the view was unmounted")
            self._forget()
            return
        self._failures = 0 if lived >= SOUND_LIFE else self._failures + 1
        ending = describe_exit("the view", status)
        if self._failures < MANY_FAILURES and not self._trouble:
            self._say("view", f"{ending}; showing it again")
            return
        self._trouble = self._trouble or f"the view does not stay up: {ending}"
        self._say("view", self._trouble, hint=LOGS_HINT)
        self._forget()

    async def _live(self, wanted: Wanted) -> int | None:
        """One process, to its end; its exit status, None if it could not be started."""
        process: trio.Process | None = None
        try:  # the life before has taken our own folder along
            await trio.to_thread.run_sync(prepare, Path(wanted.path), self._paths)
        except UserError as error:
            self._trouble = f"the view could not be started: {error.message}"
            return None
        argv = [
            *self._program,
            wanted.path,
            *("--owner", wanted.owner),
            *("--guest-socket", str(self._paths.view_socket)),
            *("--name", self._paths.name),
            *(["--packed"] if self._packed else []),
        ]
        environment = dict(os.environ)
        if found := library.find_library():
            environment[library.LIBRARY_PATH] = found
        try:
            with collapsed():
                async with file_server_process.started(
                    argv, self._paths.view_log, environment=environment
                ) as (process, control):
                    async with trio.open_nursery():
                        await self._talk(control)
        except OSError as error:
            self._trouble = f"the view could not be started: {error.strerror or error}"
        except AgentctlProtocolError as error:
            logger.info("view lost: %s", error)
        return process.returncode if process else None

    async def _talk(self, control: trio.abc.Stream) -> None:
        """Hear how it does. Raises ``AgentctlProtocolError`` when it has gone."""
        service = Service()
        service.on_notice(ViewChanged, self._on_changed)
        link = Link(control, Role.CLIENT, service, hello("agentctl-host"))
        async with trio.open_nursery() as nursery:
            await nursery.start(_until_over, link)
            self._link = link
            try:
                self._learn(await link.request(GetViewState()))
                await trio.sleep_forever()
            finally:
                self._link = None

    async def _on_changed(self, notice: ViewChanged) -> None:
        await trio.lowlevel.checkpoint()
        self._learn(notice.state)

    def _learn(self, state: ViewState) -> None:
        if state.mounted and not self._state.mounted and self._wanted is not None:
            self._say("view", f"the guest's files are at {self._wanted.path}", path=self._wanted.path)
        self._state = state
        if state.reason:
            self._trouble = state.reason
        self._tell()

    # --- what is wanted ------------------------------------------------------------------------------

    def _want(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._failures, self._trouble = 0, ""
        with suppress(OSError):  # a full disk: it is only not shown again after a killed agent
            write_atomically(self._paths.view_record, json.dumps([wanted.path, wanted.owner]).encode())
        self._tell()

    def _forget(self) -> None:
        self._wanted = None
        self._paths.view_record.unlink(missing_ok=True)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


async def _until_over(link: Link, task_status: trio.TaskStatus[Link]) -> None:
    await link.run(task_status)
    raise LinkClosed("the view has ended")
