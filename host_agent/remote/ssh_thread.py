"""The way to an attached machine over SSH: asyncssh in a thread of its own, and what trio sees of it.

The law: only bytes cross. They do so in sockets that belong to this thread alone: it listens where QEMU would, at an
instance's ``control.sock`` and ``files.sock``, and carries whoever connects there to a command on the machine. So trio
never waits for asyncio but in ``connect``, ``run`` and ``carry``, and asyncio never for trio.

The lines themselves are ``ssh_line``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from host_agent import clock_jumps
from host_agent.groups import collapsed
from host_agent.remote.asyncio_thread import AsyncioThread
from host_agent.remote.bridge import Finished
from host_agent.remote.connection import Prompts
from host_agent.remote.failures import Refused
from host_agent.remote.machine import Address
from host_agent.remote.ssh_line import OnEnd, SshLine
from host_agent.remote.way import Condition
from protocol.api import LinkState

logger = logging.getLogger(__name__)


@asynccontextmanager
async def opened(address: Address, prompts: Prompts | None = None) -> AsyncIterator[SshLines]:
    """A way to a machine that is made, and made again, until the block is left. Nothing of it is left then."""
    async with _thread(address, prompts) as first:
        lines = SshLines(address, prompts, first)
        with collapsed():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clock_jumps.watch, lines.hurry)
                yield lines
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def _thread(address: Address, prompts: Prompts | None) -> AsyncIterator[SshThread]:
    thread = SshThread(address, prompts)
    thread.start()
    try:
        yield thread
    finally:
        await thread.aclose()


class SshLines:
    """The way to a machine: a first line for commands and what is carried first, and one more for each of the rest.

    A plane has its own because a line is a queue. Measured on loopback, the other plane loading it: a byte of the
    control plane takes 1.6 ms there and back on one line, 8 ms for one in ten, and 0.26 ms on its own. Where the
    machine lets nobody in twice (a code for one use), all goes over the first. See ``opened``.
    """

    def __init__(self, address: Address, prompts: Prompts | None, first: SshThread) -> None:
        self._address = address
        self._prompts = prompts
        self._first = first
        self._lines = {first}
        self._first_carries = False

    @property
    def condition(self) -> Condition:
        """How the first line is."""
        return self._first.condition

    def on_change(self, tell: Callable[[Condition], None]) -> None:
        """``tell`` is called, in trio's thread, with each condition of the first line from now on."""
        self._first.on_change(tell)

    async def connect(self) -> None:
        """See ``SshThread.connect``."""
        await self._first.connect()

    def hurry(self) -> None:
        """See ``SshThread.hurry``."""
        for line in self._lines:
            line.hurry()

    async def run(self, command: str, input: bytes = b"", timeout: float = 30.0) -> Finished:
        """See ``SshThread.run``."""
        return await self._first.run(command, input, timeout)

    async def carry(
        self,
        listener_path: Path,
        command: str,
        on_end: OnEnd | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See ``SshThread.carry``."""
        if not self._first_carries:
            self._first_carries = True
            try:
                await self._first.carry(listener_path, command, on_end, task_status)
            finally:
                self._first_carries = False
        task_status.started()
        async with _thread(self._address, self._prompts) as line:
            self._lines.add(line)
            try:
                with contextlib.suppress(Refused):
                    await line.carry_while_let_in(listener_path, command, on_end)
            finally:
                self._lines.discard(line)
        logger.info("there is only one line to %s", self._address)
        await self._first.carry(listener_path, command, on_end)


class SshThread(AsyncioThread):
    """A line to a machine, in a thread."""

    def __init__(self, address: Address, prompts: Prompts | None = None) -> None:
        super().__init__("ssh")
        self._line = SshLine(address, prompts, self._changed)
        self._tell: list[Callable[[Condition], None]] = []
        self._condition = Condition(LinkState.CONNECTING, time.time())

    def start(self) -> None:
        """Connect, and connect again, until ``aclose``."""
        super().start()
        asyncio.run_coroutine_threadsafe(self._line.keep(), self._loop)

    async def _close(self) -> None:
        await self._line.close()

    @property
    def condition(self) -> Condition:
        """How the line is."""
        return self._condition

    def on_change(self, tell: Callable[[Condition], None]) -> None:
        """``tell`` is called, in trio's thread, with each condition from now on."""
        self._tell.append(tell)

    async def connect(self) -> None:
        """Wait until the line has been made for the first time. Raises ``UserError`` if the first attempt fails."""
        await self._call(self._line.first)

    def hurry(self) -> None:
        """This machine has slept, or its network is another: what stands has to prove it, what waits tries at once."""
        self._loop.call_soon_threadsafe(self._line.hurry)

    async def run(self, command: str, input: bytes = b"", timeout: float = 30.0) -> Finished:
        """Run a command; ``timeout`` (seconds) includes waiting for the line.

        It may leave its ``input`` unread. Raises ``Unreachable`` if there is no line, it is lost meanwhile, or the
        time is over, and ``Refused`` if there will be none.
        """
        return await self._call(lambda: self._line.run(command, input, timeout))

    async def carry(
        self,
        listener_path: Path,
        command: str,
        on_end: OnEnd | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the unix socket ``listener_path``: whoever connects talks to ``command``, until cancelled.

        One client at a time; the next one waits. ``on_end`` is called, in trio's thread, when a command has ended by
        itself.
        """

        task_status.started()
        with contextlib.suppress(Refused):
            await self.carry_while_let_in(listener_path, command, on_end)
        await trio.sleep_forever()  # whoever waits for the line is told

    async def carry_while_let_in(self, listener_path: Path, command: str, on_end: OnEnd | None) -> None:
        """The same, until there will be no line any more: raises ``Refused``."""

        def ended(finished: Finished) -> None:
            if on_end is not None:
                self._in_trio(on_end, finished)

        await self._call(lambda: self._line.carry(listener_path, command, ended))

    def _changed(self, condition: Condition) -> None:
        self._in_trio(self._publish, condition)

    def _publish(self, condition: Condition) -> None:
        self._condition = condition
        for tell in self._tell:
            tell(condition)
