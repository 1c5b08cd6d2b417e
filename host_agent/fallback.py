"""The control link of a VM goes over SSH while its virtio-serial port is lost, and returns.

    GuestLink ── asyncssh (a thread) ── QEMU's user network ── sshd ── ssh_door ··· stdio ···> the agent that runs

What carries the link, and when, ``control_path`` decides; this is what does it. The laws: nothing of SSH is there, nor
even imported, while the port works; who may come in is decided by what the VM said over that port (its host key) and
was told over it (the instance's key), never by what it shows later; and nothing here holds up the end of a VM.
"""

from __future__ import annotations

import logging
import math
import shlex
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Protocol

import trio

from host_agent import hostfwd, state
from host_agent.cleanup import remember
from host_agent.control_path import ControlPath
from host_agent.errors import UserError
from host_agent.groups import collapsed
from host_agent.guest_link import GuestLink
from host_agent.hostfwd import Monitored, NoConnection
from host_agent.paths import InstancePaths
from host_agent.qmp import QmpClosed, QmpError
from protocol.api import ControlLink, GetHostKeys, Transport
from protocol.errors import AgentctlProtocolError, ErrorCode, RpcError

logger = logging.getLogger(__name__)

#: How long one attempt may take to come to a session, seconds: an emulated guest logs in in 10.
ATTEMPT_TIME: Final = 90.0

#: How often a VM is asked for its host key until it has one: not before its data disk is there. Seconds.
KEY_INTERVAL: Final = 5.0

#: What is run in the guest. The agent's unit says where it lies (agentctl-agent.service).
COMMAND: Final = shlex.join(
    ["env", "PYTHONPATH=/run/agentctl/agent", "python3", "-P", "-s", "-m", "guest_agent.ssh_door"]
)

#: sshd takes the instance's key for any user, and the agent is root's.
USER: Final = "root"


class Vm(Monitored, Protocol):
    def alive(self) -> bool: ...
    async def run_state(self) -> str: ...


class Say(Protocol):
    def __call__(self, kind: str, message: str, **fields: str) -> None: ...


class OpenLine(Protocol):
    """``one_line.opened``."""

    def __call__(
        self, connection: socket.socket, *, user: str, key: str, host_keys: str, command: str
    ) -> AbstractAsyncContextManager[trio.SocketStream, bool | None]: ...


class Fallback:
    """Of one instance, for all its VMs. ``vm`` is asked for the one of now."""

    def __init__(
        self,
        paths: InstancePaths,
        guest: GuestLink,
        vm: Callable[[], Vm | None],
        say: Say,
        load: Callable[[], OpenLine] | None = None,
        command: str = COMMAND,
        user: str = USER,
    ) -> None:
        self._paths = paths
        self._guest = guest
        self._vm = vm
        self._say = say
        self._load = load or _load
        self._command, self._user = command, user
        self._path = ControlPath()
        self._changed = trio.Event()
        self._limit = trio.CancelScope()
        self._since = 0.0
        self._came = False  # the session that is tried for
        self._told = Transport.VIRTIO_SERIAL
        self._told_problem = ""
        guest.observer = self

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._until(lambda: self._path.try_at)
            await self._attempt()

    async def attend(self, vm: Vm) -> None:
        """A VM whose boot is done runs. Cancelled when it has ended, and what is known of it goes with it; or when it
        is being stopped: then what carries the link goes on, and nothing new is tried."""
        with suppress(QmpClosed, QmpError):
            await hostfwd.close(vm)
        if self._path.transport is Transport.NONE:
            self._since = time.time()
        self._path.watch(trio.current_time())
        self._tell_waiting()
        try:
            await self._learn_host_keys()
            await trio.sleep_forever()
        finally:
            if vm.alive():
                self._path.rest()
            else:
                self._path = ControlPath()
                self._limit.cancel()
            self._tell_waiting()

    @property
    def hopeless(self) -> bool:
        """No session is to be waited for."""
        return self._path.hopeless

    @property
    def control(self) -> ControlLink:
        """How the guest agent is reached."""
        path = self._path
        known = path.watched or path.transport is not Transport.NONE
        since = self._since if known else 0.0
        return ControlLink(path.transport, since, path.reason, path.problem, path.hint, path.attempts)

    # --- what the link tells (``guest_link.Observer``) ----------------------------------------------

    def began(self, transport: Transport) -> None:
        path, self._since = self._path, time.time()
        path.session(transport, trio.current_time())
        if transport is Transport.SSH:
            self._came = True
            self._limit.deadline = math.inf
            self._tell(f"the control link goes over SSH: {path.reason}", reason=path.reason)
        else:
            self._limit.cancel()
            self._tell("the control link is on virtio-serial again")
        self._tell_waiting()

    def ended(self, reason: str) -> None:
        self._since = time.time()
        self._path.session_over(reason, trio.current_time())
        self._tell_waiting()

    async def port_is_free(self) -> None:
        await self._until(lambda: self._path.port_from)

    def _tell(self, message: str, **fields: str) -> None:
        """Once for each change that people should hear of; a port that is away for a moment is none."""
        now = self._path.transport
        if now is not self._told or self._path.problem != self._told_problem:
            self._told, self._told_problem = now, self._path.problem
            self._say("control-link", message, state=now.value, **fields)

    def _tell_waiting(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until(self, due: Callable[[], float]) -> None:
        await trio.lowlevel.checkpoint()
        while (at := due()) > trio.current_time():
            with trio.move_on_at(at):
                await self._changed.wait()

    # --- SSH ------------------------------------------------------------------------------------------

    async def _attempt(self) -> None:
        """One session over SSH from beginning to end, or the reason why there is none."""
        path, self._came = self._path, False
        problem, hint = "the guest agent has hung up", ""
        with trio.CancelScope(deadline=trio.current_time() + ATTEMPT_TIME) as self._limit:
            try:
                await self._over_ssh()
            except UserError as error:
                problem, hint = error.message, error.hint
            except (NoConnection, QmpClosed, QmpError, OSError) as error:  # the last: no descriptors are left
                problem = str(error)
            except _StandsStill:
                path.put_off(trio.current_time())
                return
        over = self._came or path is not self._path or path.transport is not Transport.NONE
        if self._limit.cancelled_caught:
            problem = "it is not needed any more" if over else f"no session came within {ATTEMPT_TIME:.0f} s"
        if over:
            logger.info("the way over SSH is closed: %s", problem)
            return
        logger.warning("the control link is lost, and SSH is no way: %s", problem)
        path.failed(problem, hint, trio.current_time())
        said = f"the guest agent is not reached: {path.reason}; nor over SSH: {problem}"
        self._tell(said, reason=problem, hint=hint)

    async def _over_ssh(self) -> None:
        vm, host_keys = self._vm(), state.load(self._paths.state).host_keys
        if vm is None or await vm.run_state() != "running":
            raise _StandsStill
        if not host_keys:
            raise NoConnection("the VM has not told the host key of its SSH server")
        open_line = await trio.to_thread.run_sync(self._load)
        connection = await hostfwd.dial(vm)
        line = open_line(
            connection,
            user=self._user,
            key=str(self._paths.ssh_key),
            host_keys=host_keys,
            command=self._command,
        )
        with collapsed():
            async with line as stream:
                await self._guest.carry(stream, Transport.SSH)

    async def _learn_host_keys(self) -> None:
        """From the VM itself, over its port; once for each boot."""
        while not state.load(self._paths.state).host_keys:
            link = self._guest.current
            if link is not None and self._path.transport is Transport.VIRTIO_SERIAL:
                try:
                    if keys := (await link.request(GetHostKeys())).keys:
                        remember(self._paths, host_keys="\n".join(keys))
                        continue
                except AgentctlProtocolError as error:
                    logger.info("the VM does not tell its host key: %s", error)
                    if isinstance(error, RpcError) and error.code is ErrorCode.UNSUPPORTED:
                        return  # it is of an older version
            await trio.sleep(KEY_INTERVAL)


class _StandsStill(Exception):
    """A VM that is paused answers nobody: its link is not lost."""


def _load() -> OpenLine:
    """In a thread: it takes 0.3 s, and is not needed where the port works."""
    from host_agent.remote.one_line import opened

    return opened
