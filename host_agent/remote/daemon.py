"""The host agent of a machine that is attached: the process that makes it feel like localhost, over SSH.

    python -m host_agent.remote.daemon DIRECTORY --lock-fd FD --keeper-fd FD [--store-fds FD,...] [--answers-fd FD]

The composition root beside that of a VM. In QEMU's place there is a way to the machine, which serves the sockets that
QEMU would. The laws: a connection that is lost ends nothing, it is made again for as long as the instance is attached;
what the machine lacks is said once, with its fix, and the rest works; and a stop leaves nothing running there, unless
that was asked for.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import NoReturn, Protocol

import trio

from host_agent import docker_context, state
from host_agent.errors import ExitCode, UserError
from host_agent.forwarders import UnixForwarder
from host_agent.instance_agent import Inherited, InstanceAgent, main
from host_agent.paths import Home, InstancePaths
from host_agent.remote import answers, record
from host_agent.remote.machine import shown
from host_agent.remote.prompts import Asked, Remembered
from host_agent.remote.record import Attached
from host_agent.remote.way import Condition, Finished, Way
from host_agent.rules import IgnorePort
from protocol.api import Attachment, DialUnix, InstanceStatus, LinkState, Stage
from protocol.capabilities import Capabilities
from protocol.errors import LinkError
from protocol.link import Link

logger = logging.getLogger(__name__)

#: How long what runs on the machine waits for us when the connection is lost, seconds; longer than a laptop sleeps
#: between two meetings, and no longer than a forgotten machine should hold mounts that nobody serves.
GRACE = 600.0

#: The same for what serves a view: it holds nothing, and another one knows as much.
VIEW_GRACE = 30.0

#: How long the agent there may take to come up and answer, seconds; a machine that is slow compiles it first.
START_TIME = 90.0

#: How long a start waits for folders that are just being mounted, seconds.
MOUNT_TIME = 10.0

#: How long what runs on the machine may take to end, seconds.
END_TIME = 20.0

#: Opens a way to the machine that a record names, with somebody who can be asked; connects when it is asked to.
OpenWay = Callable[[Attached, Asked], AbstractAsyncContextManager[Way]]


class Installed(Protocol):
    """The agent is there: what the machine can do, and the words that run it."""

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def program(self) -> Sequence[str]: ...


#: Brings the agent to the machine, and says how far that is.
Install = Callable[[Way, Callable[[str], None]], Awaitable[Installed]]


class AttachedAgent(InstanceAgent):
    """One run of an attached instance, from the first connection to the last."""

    def __init__(
        self, home: Home, paths: InstancePaths, given: Inherited, open_way: OpenWay, install: Install
    ) -> None:
        super().__init__(home, paths, given.lock, given.store, answers=given.answers, packed=True)
        found = record.load(paths)
        if found is None:
            raise UserError(f"{paths.name} is not an attached instance", "attach it: agentctl attach")
        self._record = found
        self._open_way = open_way
        self._install = install
        self._way: Way | None = None
        self._condition = Condition(LinkState.CONNECTING, state.load(paths.state).started_at)
        self._news = trio.Event()
        self._installed: Installed | None = None
        self._beside: trio.Nursery | None = None
        self._carriers: trio.Nursery | None = None
        self._carrying_view: trio.CancelScope | None = None
        self._has_docker = False
        self._last_words = ""
        self._serve((), disk=_no_disk, change_disk=_no_disk, compact_disk=_no_disk)

    @property
    def _address(self) -> str:
        return self._record.address

    async def _start_beside(self, nursery: trio.Nursery) -> None:
        self._beside = nursery
        await nursery.start(self._keep_way)
        await nursery.start(self._hold_carriers)

    async def _hold_carriers(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._carriers:
            task_status.started()
            await trio.sleep_forever()

    async def _keep_way(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self._open_way(self._record, Remembered(answers.take(self._answers))) as self._way:
            self._way.on_change(self._on_condition)
            task_status.started()
            await trio.sleep_forever()

    # --- up ---------------------------------------------------------------------------------------

    async def _work_until_it_ends(self) -> None:
        if state.load(self._paths.state).stopping:
            # The agent before us was killed while it detached; that is what is still wanted.
            self._enter(Stage.STOPPING, "detaching")
            with trio.move_on_after(END_TIME):
                await self._reached()
            return
        self._enter(Stage.STARTING, f"connecting to {self._address}")
        await self._reached()
        await self._bring_agent()
        await self._carry()
        try:
            await self._guest.wait(START_TIME)
        except LinkError as error:
            await self._end_there()
            raise UserError(
                f"the agent on {self._address} does not answer: {shown(self._last_words) or error}",
                "see: agentctl logs",
                ExitCode.GUEST,
            ) from None
        await self._offer_docker()
        await self._files.settle(MOUNT_TIME)
        self._enter(Stage.RUNNING, "ready")
        await trio.sleep_forever()

    async def _reached(self) -> None:
        """Wait for the first connection. Raises ``UserError`` if there is none to be had; but the successor of a killed
        agent, whose instance did run, goes on trying."""
        assert self._way is not None
        try:
            await self._way.connect()
        except UserError:
            if state.load(self._paths.state).agent_restarts == 0 or self._condition.final:
                raise
            while (now := self._condition).state is not LinkState.CONNECTED:
                if now.final:
                    raise UserError(now.reason, now.hint, ExitCode.GUEST) from None
                await self._news.wait()

    async def _bring_agent(self) -> None:
        """Have the agent of this version there, and learn what the machine can do."""
        assert self._way is not None
        found = await self._install(self._way, lambda text: self._events.say("installing", text))
        self._installed = found
        before = self._record
        self._record = replace(before, program=shlex.join(found.program), home=found.capabilities.home)
        if self._record != before:
            with suppress(OSError):  # a full disk: the next start finds it out again
                record.save(self._paths, self._record)
        if port := found.capabilities.ssh_port:
            self._ports.add(IgnorePort(port, "the machine's own SSH server"))
        for problem in found.capabilities.problems:
            self._events.say("missing", problem.what, hint=problem.fix)

    async def _carry(self) -> None:
        """Serve the sockets that QEMU would, each with its agent over there."""
        assert self._carriers is not None
        assert self._way is not None
        grace = math.inf if self._record.keep else GRACE
        for plane, socket in (("control", self._paths.control_socket), ("files", self._paths.files_socket)):
            command = self._record.command("connect", plane, self._record.session, "--grace", f"{grace:g}")
            socket.unlink(missing_ok=True)
            await self._carriers.start(self._way.carry, socket, command, partial(self._ended, plane))
        if self._view.is_wanted:  # of an agent that was killed
            await self._serve_view(True)

    async def _serve_view(self, wanted: bool) -> None:
        """Nothing of it is there, and no connection is made for it, while nobody looks."""
        await trio.lowlevel.checkpoint()
        if not wanted:
            if self._carrying_view is not None:
                self._carrying_view.cancel()
                self._carrying_view = None
            return
        if self._carrying_view is not None:
            return
        if self._carriers is None or not self._record.program:
            raise UserError(
                f"{self._address} has not been reached yet", "see: agentctl status", ExitCode.NOT_RUNNING
            )
        self._carrying_view = trio.CancelScope()
        await self._carriers.start(self._carry_view, self._carrying_view)

    async def _carry_view(
        self, scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        assert self._way is not None
        command = self._record.command("connect", "view", self._record.session, "--grace", f"{VIEW_GRACE:g}")
        socket = self._paths.view_socket
        with scope:
            socket.unlink(missing_ok=True)
            await self._way.carry(socket, command, partial(self._ended, "view"), task_status)

    def _ended(self, plane: str, finished: Finished) -> None:
        """It is started again as soon as somebody connects; what it said may be why nobody gets an answer."""
        said = finished.err.decode(errors="replace").strip()
        logger.warning("%s ended there with status %s: %s", plane, finished.status, said or "without a word")
        if finished.status:
            self._last_words = said

    async def _offer_docker(self) -> None:
        """Docker's socket there as the instance's own, and a context that is there for who wants it."""
        assert self._beside is not None
        assert self._installed is not None
        socket = self._installed.capabilities.docker.socket
        if not socket:
            return
        paths = self._paths
        forwarder = UnixForwarder(paths.docker_socket, DialUnix(socket), self._guest.dial)
        await self._beside.start(forwarder.run)
        self._has_docker = True
        directory, name = docker_context.config_dir(os.environ), docker_context.context_name(paths.name)
        try:
            await trio.to_thread.run_sync(
                docker_context.create, directory, name, paths.docker_socket, f"Docker on {self._address}"
            )
        except OSError as error:
            self._events.say("docker-context", f"the docker context could not be written: {error}")
            return
        self._events.say("docker-context", f"docker --context {name} is Docker there", context=name)

    # --- the way ----------------------------------------------------------------------------------

    def _on_condition(self, condition: Condition) -> None:
        before, self._condition = self._condition.state, condition
        self._news.set()
        self._news = trio.Event()
        if condition.state is before is not LinkState.LOST:
            return
        message = {
            LinkState.CONNECTING: f"connecting to {self._address}",
            LinkState.CONNECTED: f"connected to {self._address}",
            LinkState.LOST: f"{self._address} is not reached: {condition.reason}",
        }[condition.state]
        explained = {"reason": condition.reason, "hint": condition.hint}
        self._events.say("machine", message, state=condition.state.value, **explained)
        came_back = condition.state is LinkState.CONNECTED and self._installed is not None
        if came_back and self._beside is not None:
            self._beside.start_soon(self._bring_agent_again)

    async def _bring_agent_again(self) -> None:
        """It may have been cleaned away meanwhile, or the machine is another one behind the same name."""
        try:
            await self._bring_agent()
        except UserError as error:
            self._events.say("installing", error.message, hint=error.hint)

    async def _guest_up(self, link: Link) -> None:
        await trio.lowlevel.checkpoint()
        self._sockets.link_up(link)
        self._events.say("guest-connected", f"the agent on {self._address} is connected")

    # --- ends -------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        if self._record.keep and not self._forced.is_set():
            self._let_go()
        else:
            await self._end_there()

    def _let_go(self) -> None:
        """Whoever connected once more would have what ends there started again."""
        if self._carriers is not None:
            self._carriers.cancel_scope.cancel()

    async def _end_there(self) -> None:
        self._let_go()
        if not self._record.program or self._way is None:
            return
        reason = f"it did not end within {END_TIME:.0f} s"
        with trio.move_on_after(END_TIME):
            try:
                if self._condition.state is not LinkState.CONNECTED:
                    raise UserError(self._condition.reason or "there is no connection")
                done = await self._way.run(
                    self._record.command("end", self._record.session), timeout=END_TIME
                )
                if done.status == 0:
                    return
                reason = shown(done.err.decode(errors="replace")) or f"status {done.status}"
            except UserError as error:
                reason = error.message
        ends = "goes on, as it was to be kept" if self._record.keep else f"ends by itself, in {GRACE:.0f} s"
        self._events.say("left-running", f"what runs on {self._address} {ends}: {reason}")

    # --- what is known ----------------------------------------------------------------------------

    async def status(self) -> InstanceStatus:
        current = state.load(self._paths.state)
        status = await self._status(current, self._guest.current)
        condition, can = self._condition, self._installed and self._installed.capabilities
        if condition.state is not LinkState.CONNECTED and self._stage is Stage.RUNNING:
            detail = f"{self._address} is not reached: {condition.reason or 'connecting again'}"
            status = replace(status, detail=detail, hint=condition.hint or self._what_helps())
        paths = self._paths
        return replace(
            status,
            docker_socket=str(paths.docker_socket) if self._has_docker else "",
            docker_context=docker_context.context_name(paths.name) if self._has_docker else "",
            warnings=[f"{each.what} ({each.fix})" if each.fix else each.what for each in can.problems]
            if can
            else [],
            runtime="",
            attached=Attachment(
                address=self._address,
                link=condition.state,
                since=condition.since,
                reason=condition.reason,
                hint=condition.hint,
                attempts=condition.attempts,
                user=can.user if can else "",
                python=can.python if can else "",
                mounting=can.mounts.how if can and can.mounts.ok else "",
                ports=can.ports if can else "",
                keep=self._record.keep,
                packs=self._guest.current is not None
                and "packed-copies" in self._guest.current.peer.capabilities,
            ),
        )

    def _what_helps(self) -> str:
        name = self._paths.name
        if self._condition.final:
            return f"it is not tried again; when that is mended: agentctl attach {name}"
        return f"it is tried again and again; to give up: agentctl detach {name}"

    async def reload(self) -> list[str]:
        """There is nothing of ours to run over there."""
        await trio.lowlevel.checkpoint()
        return []


async def _no_disk(*_: object) -> NoReturn:
    await trio.lowlevel.checkpoint()
    raise UserError("an attached machine has no disk of agentctl's", "see: agentctl exec df", ExitCode.USAGE)


if __name__ == "__main__":
    from host_agent.remote.over_ssh import install, open_way

    main(lambda home, paths, given: AttachedAgent(home, paths, given, open_way, install))
