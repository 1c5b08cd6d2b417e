"""A way to a machine that is this one: a shell takes the place of SSH, and a folder that of the home there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from host_agent.errors import ExitCode, UserError
from host_agent.remote.machine import parse_check
from host_agent.remote.prompts import Asked
from host_agent.remote.record import Attached
from host_agent.remote.way import Condition, Finished, Way
from protocol.api import LinkState
from protocol.capabilities import Capabilities

REPOSITORY = Path(__file__).parents[3]

#: Where programs find these packages first, and all else where this process does.
PYTHONPATH = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass(frozen=True)
class Done:
    status: int | None
    out: bytes
    err: bytes


@dataclass(frozen=True)
class There:
    """As ``install.Installed``."""

    capabilities: Capabilities
    program: Sequence[str] = (sys.executable, "-m", "guest_agent.remote")


@dataclass
class ShellWay:
    """A test says when it is lost, and when it is there again."""

    home: Path
    condition: Condition = field(default_factory=lambda: Condition(LinkState.CONNECTING, time.time()))
    refuses: UserError | None = None
    """What the first attempt ends with."""
    commands: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    """What was answered to whoever opened it."""
    _tell: list[Callable[[Condition], None]] = field(default_factory=list)
    _carried: set[trio.Process] = field(default_factory=set)

    def on_change(self, tell: Callable[[Condition], None]) -> None:
        self._tell.append(tell)

    def now(self, state: LinkState, reason: str = "", *, final: bool = False) -> None:
        self.condition = Condition(state, time.time(), reason, "", 1 if reason else 0, final)
        for tell in self._tell:
            tell(self.condition)

    def lose(self, reason: str, *, final: bool = False) -> None:
        self.now(LinkState.LOST, reason, final=final)
        for process in self._carried:
            process.kill()

    async def connect(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses is not None:
            self.now(LinkState.LOST, self.refuses.message)
            raise self.refuses
        self.now(LinkState.CONNECTED)

    async def run(self, command: str, input: bytes = b"", timeout: float = 30.0) -> Finished:
        self.commands.append(command)
        if self.condition.state is not LinkState.CONNECTED:
            raise UserError("there is no connection", "", ExitCode.GUEST)
        done = await trio.run_process(
            ["sh", "-c", command],
            stdin=input,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=self._environment(),
        )
        return Done(done.returncode, done.stdout, done.stderr)

    async def carry(
        self,
        listener_path: Path,
        command: str,
        on_end: Callable[[Finished], None] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(listener_path))
            listener.listen(4)
            task_status.started()
            while True:
                client, _ = await listener.accept()
                with client:
                    if self.condition.state is LinkState.CONNECTED:
                        await self._carry_one(client, command)

    async def _carry_one(self, client: trio.socket.SocketType, command: str) -> None:
        self.commands.append(command)
        process = await trio.lowlevel.open_process(
            ["sh", "-c", f"exec {command}"],
            stdin=client.fileno(),
            stdout=client.fileno(),
            stderr=subprocess.DEVNULL,
            env=self._environment(),
        )
        self._carried.add(process)
        client.close()  # the process has it
        try:
            await process.wait()
        finally:
            self._carried.discard(process)
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    def end(self, session: str) -> None:
        """Leave nothing running, whatever a test has left."""
        if (self.home / ".cache/agentctl/run" / session).exists():
            command = [sys.executable, "-m", "guest_agent.remote", "end", session]
            subprocess.run(command, env=self._environment(), check=False, timeout=60)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home), "PYTHONPATH": PYTHONPATH}

    @asynccontextmanager
    async def opened(self, attached: Attached, asked: Asked) -> AsyncIterator[Way]:
        """As ``daemon.OpenWay``."""
        self.answers = dict(asked.answers)
        yield self

    async def install(self, way: Way, progress: Callable[[str], None]) -> There:
        """As ``daemon.Install``: nothing has to be brought here."""
        progress("looking for the agent on the machine")
        done = await self.run(f"{sys.executable} -m guest_agent.remote check --nonce N")
        found = parse_check(done.out.partition(b"agentctl-check N ")[2])
        return There(self.has(found))

    def has(self, found: Capabilities) -> Capabilities:
        """What the machine is to have; a test may have another opinion."""
        return replace(found, docker=replace(found.docker, socket=""), problems=())
