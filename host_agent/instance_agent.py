"""What the host agent of every instance is, whatever is on its other side: a VM of ours, a machine over SSH.

The laws: the planes (control link, ports, sockets, mounts) live from before there is an other side until after it has
gone, so that nothing here depends on when it comes; whatever was opened is closed in the order in which it was
opened, reversed, on every way out; and a bug ends the agent and nothing else, since its successor takes over what it
finds. What the other side is, how it comes to be and how it ends, is for the subclass to say.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import trio

from host_agent import agentlog, groups, hints, keeper, kind, owners, state
from host_agent.api_server import Answers, ApiServer
from host_agent.cleanup import clean_up, remember
from host_agent.client import hello
from host_agent.configuration import config as configuration
from host_agent.errors import UserError
from host_agent.events import EventLog
from host_agent.file_service import FileService
from host_agent.forwarders import Connections, ForwardRunner
from host_agent.guest_link import GuestLink
from host_agent.paths import Home, InstancePaths
from host_agent.port_rules import PortRules
from host_agent.process import ProcessIdentity
from host_agent.socket_forwards import SocketForwards
from host_agent.view_service import ViewService
from protocol import build
from protocol.api import (
    Disk,
    Forwards,
    GetGuestInfo,
    GetGuestUsage,
    GuestInfo,
    GuestUsage,
    InstanceStatus,
    Listeners,
    Mounts,
    MountSpec,
    MountState,
    PortSettings,
    SocketForward,
    Stage,
    StopInstance,
    Usage,
)
from protocol.bulk import Bulk
from protocol.errors import AgentctlProtocolError
from protocol.lane import Lane
from protocol.link import Link, Service

#: How long `status` waits for the guest's part of the answer, seconds.
GUEST_INFO_TIME = 2.0


class InstanceAgent(ABC):
    """One run of an instance. A subclass calls ``_serve`` at the end of its own ``__init__``."""

    def __init__(
        self,
        home: Home,
        paths: InstancePaths,
        lock: int,
        store: Sequence[int] = (),
        *,
        answers: int | None = None,
        bulk: Bulk | None = None,
        packed: bool = False,
    ) -> None:
        """``store`` are the keeper's sockets for the descriptor store, ``answers`` what it keeps for us besides;
        ``bulk`` is the control plane's; ``packed``: the files go a long way (``GuestLink``)."""
        self._home = home
        self._paths = paths
        self._lock = lock
        self._store = store
        self._answers = answers
        self._host = configuration.Host.measure()
        self._config, damage = configuration.load_running(paths, self._host)
        self._events = EventLog()
        if damage:
            self._events.say("config", damage)
        self._stage = Stage.STARTING
        self._detail = ""
        self._hint = ""
        self._forced = trio.Event()
        self._work = trio.CancelScope()
        self._over = trio.Event()
        self._lane = Lane()
        self._service = Service()
        self._service.on_notice(Listeners, self._on_listeners)
        self._guest = GuestLink(
            paths.control_socket,
            hello("agentctl-host"),
            self._service,
            on_up=self._guest_up,
            on_down=self._guest_down,
            bulk=bulk,
            lane=self._lane,
        )
        self._carried = Connections()
        self._forwards = ForwardRunner(
            self._guest.dial,
            self._events.publish,
            dial_now=self._guest.dial_now,
            lane=self._lane,
            carried=self._carried,
        )
        self._ports = PortRules(self._config.ports, self._forwards.change_rules, self._remember_ports)
        self._files = FileService(
            home,
            paths,
            self._config.mounts,
            self._events.say,
            self._remember_mounts,
            store=store,
            packed=packed,
        )
        self._view = ViewService(paths, self._events.say, self._serve_view, packed=packed)

    def _serve(
        self,
        own_sockets: Sequence[SocketForward],
        *,
        disk: Callable[[], Awaitable[Disk]],
        change_disk: Callable[[int], Awaitable[Disk]],
        compact_disk: Callable[[], Awaitable[Disk]],
    ) -> None:
        """What is asked over the instance's socket; ``own_sockets`` are agentctl's on the other side."""
        self._sockets = SocketForwards(
            self._config.sockets, self._guest.dial, self._remember_sockets, self._carried, own_sockets
        )
        self._sockets.register(self._service)
        answers = Answers(
            status=self.status,
            forwards=lambda: Forwards(self._forwards.rows()),
            stop=self.stop,
            dial=self._guest.dial,
            mounts=self._files.report,
            add_mounts=self._files.add,
            remove_mounts=self._remove_mounts,
            port_settings=lambda: self._ports.settings,
            change_ports=self._ports.change,
            sockets=self._sockets.report,
            change_sockets=self._sockets.change,
            owners=lambda: owners.ask(self._guest.current),
            disk=disk,
            change_disk=change_disk,
            compact_disk=compact_disk,
            usage=self.usage,
            reload=self.reload,
            view=self._view.report,
            start_view=self._view.start,
            end_view=self._view.end,
        )
        self._api = ApiServer(self._paths.agent_socket, answers, self._events)

    async def run(self, keeper_pipe: int) -> None:
        """Live until the instance is over, whatever ends it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._api.run)
            nursery.start_soon(self._lane.run)
            nursery.start_soon(self._watch_keeper, keeper_pipe)
            await nursery.start(self._watch_signals)
            try:
                with groups.collapsed():
                    await self._live()
                self._end(Stage.STOPPED, "stopped")
            except UserError as error:
                self._fail(error)
            await self._api.farewell(self._detail)
            nursery.cancel_scope.cancel()

    async def _live(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._forwards.run)
            await nursery.start(self._sockets.run)
            await self._start_beside(nursery)
            nursery.start_soon(self._guest.run)
            # Until the very end: what stops on the other side may still be writing.
            nursery.start_soon(self._files.run)
            nursery.start_soon(self._view.run)
            # Not `finally`: if this agent has a bug, the other side stays, and the next agent takes it over.
            try:
                with self._work, groups.collapsed():
                    await self._work_until_it_ends()
                await self._view.end()
                await self._shut_down()
            except UserError:
                await self._clean_up()
                raise
            await self._clean_up()
            nursery.cancel_scope.cancel()

    # --- what the other side is -------------------------------------------------------------------

    @abstractmethod
    async def _start_beside(self, nursery: trio.Nursery) -> None:
        """Start what runs beside the planes, for as long."""

    @abstractmethod
    async def _work_until_it_ends(self) -> None:
        """Bring the other side up, and serve until it ends by itself. Raises ``UserError``; cancelled by a stop."""

    @abstractmethod
    async def _shut_down(self) -> None:
        """End it, after a stop or if it has ended by itself."""

    @abstractmethod
    async def _guest_up(self, link: Link) -> None:
        """A session begins; nobody else uses it yet."""

    @abstractmethod
    async def _serve_view(self, wanted: bool) -> None:
        """Have the other side serve its files for a view, or no more. Raises ``UserError``."""

    @abstractmethod
    async def status(self) -> InstanceStatus:
        """The instance as it is now; what the other side has to say is left out if it does not answer soon."""

    async def _remove_mounts(self, guest_paths: Sequence[str]) -> Mounts:
        """Mount them no longer. Raises ``UserError`` where that cannot be, ``OSError`` if it cannot be kept."""
        return await self._files.remove(guest_paths)

    @abstractmethod
    async def reload(self) -> list[str]:
        """Have now what the file wants to run in the guest; what that did, in sentences.

        Raises ``UserError`` for a file that is not understood, and ``OSError`` if it cannot be kept.
        """

    async def _clean_up(self) -> None:
        if warning := await trio.to_thread.run_sync(clean_up, self._paths):
            self._events.say("docker-context", warning)

    # --- the guest's side -------------------------------------------------------------------------

    def _guest_down(self) -> None:
        self._forwards.link_lost()
        self._sockets.link_lost()
        self._events.say("guest-lost", "the guest agent is gone; waiting for it")

    async def _on_listeners(self, notice: Listeners) -> None:
        await self._forwards.on_listeners(notice)

    # --- ends -------------------------------------------------------------------------------------

    async def stop(self, request: StopInstance) -> None:
        """Stop the instance; returns when it is over."""
        if request.force:
            self._forced.set()
        remember(self._paths, stopping=True)
        self._enter(Stage.STOPPING, "stopping")
        self._work.cancel()
        await self._over.wait()

    def _fail(self, error: UserError) -> None:
        remember(
            self._paths,
            wanted=False,
            failure=error.message,
            hint=error.hint,
            failure_code=int(error.exit_code),
        )
        self._enter(Stage.FAILED, error.message)
        self._events.say("failed", error.message, hint=error.hint, code=str(int(error.exit_code)))
        self._over.set()

    def _end(self, stage: Stage, detail: str) -> None:
        remember(self._paths, wanted=False, failure="", hint="", failure_code=0)
        self._enter(stage, detail)
        self._over.set()

    # --- what is known ----------------------------------------------------------------------------

    def _enter(self, stage: Stage, detail: str, hint: str = "") -> None:
        if self._stage in (Stage.STOPPING,) and stage not in (Stage.STOPPED, Stage.FAILED):
            return
        self._stage, self._detail, self._hint = stage, detail, hint
        self._events.say("stage", detail, stage=stage.value)

    async def _status(self, current: state.InstanceState, link: Link | None) -> InstanceStatus:
        """What is the same of all; what only a VM has is empty."""
        rows = self._files.current().mounts
        return InstanceStatus(
            name=self._paths.name,
            stage=self._stage,
            detail=self._detail,
            hint=self._hint,
            accelerator="",
            cpus=0,
            memory=0,
            disk=0,
            image="",
            qemu_pid=0,
            agent_pid=os.getpid(),
            started_at=current.started_at,
            restarts=current.boot_restarts,
            guest_connected=link is not None,
            guest_digest=link.peer.digest if link else "",
            host_digest=build.digest(),
            docker_socket="",
            docker_context="",
            guest=await _guest_info(link) if link else None,
            agent_sessions=self._guest.sessions,
            agent_restarts=current.agent_restarts,
            mounts=len(rows),
            mounts_working=sum(row.state is MountState.MOUNTED for row in rows),
            file_server_pid=self._files.pid,
            file_server_restarts=self._files.restarts,
        )

    async def usage(self) -> Usage:
        """What it uses now; the guest's part is left out if it does not answer soon, or is of an older version."""
        traffic, link = self._guest.traffic, self._guest.current
        guest: GuestUsage | None = None
        if link is not None:
            with suppress(AgentctlProtocolError):
                guest = await link.request(GetGuestUsage(), timeout=GUEST_INFO_TIME)
        return Usage(traffic.received, traffic.sent, guest)

    def _remember_mounts(self, specs: tuple[MountSpec, ...]) -> None:
        self._remember(mounts=specs)

    def _remember_sockets(self, sockets: tuple[SocketForward, ...]) -> None:
        self._remember(sockets=sockets)

    def _remember_ports(self, settings: PortSettings) -> None:
        self._remember(
            rules=tuple(settings.rules),
            lan=settings.lan,
            privileged_offset=settings.privileged_offset,
        )

    def _remember(self, **changes: Any) -> None:
        self._config = configuration.save_changes(self._paths, self._config, **changes)
        with suppress(OSError):  # a full disk; what people have is in their file
            configuration.save_kept(self._paths.running_config, self._config)

    # --- watching ---------------------------------------------------------------------------------

    async def _watch_keeper(self, pipe: int) -> None:
        """Start a new keeper whenever ours dies: its end of the pipe is closed by its death."""
        while True:
            await trio.lowlevel.wait_readable(pipe)
            os.close(pipe)
            pipe, writer = os.pipe()
            self._events.say("keeper", "the keeper died; starting another")
            await trio.to_thread.run_sync(
                partial(
                    keeper.spawn,
                    self._paths,
                    self._lock,
                    adopt=os.getpid(),
                    alive=writer,
                    store=self._store,
                    answers=self._answers,
                )
            )
            os.close(writer)

    async def _watch_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Asked to end (a logout, a shutdown of the host): the other side is shut down in good order."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            task_status.started()
            async for _ in received:
                remember(self._paths, stopping=True)
                self._enter(Stage.STOPPING, "stopping on a signal")
                self._work.cancel()


async def _guest_info(link: Link) -> GuestInfo | None:
    try:
        return await link.request(GetGuestInfo(), timeout=GUEST_INFO_TIME)
    except AgentctlProtocolError:
        return None


def raise_descriptor_limit() -> None:
    """Every forwarded connection takes two descriptors; the usual soft limit of 1,024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a keeper gives to its host agent: descriptors of the instance's lock, of its end of the pipe, of the store,
    and of answers."""

    lock: int
    keeper: int
    store: Sequence[int] = ()
    answers: int | None = None


def main(make: Callable[[Home, InstancePaths, Inherited], InstanceAgent]) -> NoReturn:
    """The program: the agent that ``make`` makes of what the keeper says on the command line."""
    parser = argparse.ArgumentParser(prog="agentctl-host")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--lock-fd", type=int, required=True)
    parser.add_argument("--keeper-fd", type=int, required=True)
    parser.add_argument("--store-fds", type=keeper.read, default=())
    parser.add_argument("--answers-fd", type=int)
    words = parser.parse_args()
    inherited = Inherited(words.lock_fd, words.keeper_fd, words.store_fds, words.answers_fd)
    raise_descriptor_limit()
    os.umask(0o077)
    paths = InstancePaths(words.directory)
    hints.choose(paths.name)
    kind.choose(attached=paths.attached.exists())
    agentlog.log_to(paths.agent_log)
    if identity := ProcessIdentity.of(os.getpid()):
        identity.write(paths.agent_identity)
    agent = make(Home(words.directory.parent.parent), paths, inherited)
    groups.run(agent.run, inherited.keeper)
    _leave()


def _leave() -> NoReturn:
    """End at once: the instance counts as alive as long as we do, and who stops it waits for that.

    To take the interpreter down costs 0.15 s of processor time, seconds on a machine that is busy, and it would wait
    for threads that somebody has left behind.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
