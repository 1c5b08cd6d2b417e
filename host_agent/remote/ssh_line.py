"""A line to a machine: one SSH connection, made again whenever it is lost, and what goes over it. asyncio's side.

The law: it is tried until that cannot succeed (``Refused``). A socket is there only while the line stands: who connects
to it finds the machine, or nobody, and never a queue in which old bytes wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar, cast

import asyncssh

from host_agent.remote import asyncio_thread, bridge, connection
from host_agent.remote.bridge import Finished
from host_agent.remote.connection import Prompts
from host_agent.remote.failures import Refused, Unreachable, said
from host_agent.remote.machine import Address
from host_agent.remote.way import Condition
from protocol.api import LinkState

S = TypeVar("S", bound=bridge.Session)

logger = logging.getLogger(__name__)

#: Seconds before the line is tried again, the first time and at the most.
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 15.0

#: Seconds that a line stands before the next loss counts as the first again.
STEADY: Final = 30.0

#: After this machine has slept: seconds for the other to show that it is still there.
PROOF_INTERVAL: Final = 2
PROOF_COUNT: Final = 2

#: Bytes of a command's output that ``run`` keeps.
MAX_OUTPUT: Final = 4 * 1024 * 1024

#: Clients that wait for a socket at which one is served.
BACKLOG: Final = 4

#: Seconds between a client that waits and the next look whether the one before it has hung up.
LOOK_INTERVAL: Final = 0.25

#: How a command that was carried has ended.
OnEnd = Callable[[Finished], None]


class SshLine:
    """``changed`` is told how it is; see ``ssh_thread.SshThread`` for the rest."""

    def __init__(
        self, address: Address, prompts: Prompts | None, changed: Callable[[Condition], None]
    ) -> None:
        self._address = address
        self._prompts = prompts
        self._changed = changed
        self._connection: asyncssh.SSHClientConnection | None = None
        self._reason: Refused | Unreachable | None = None
        self._turn = asyncio.Condition()
        self._hurry = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._attempts = 0

    async def keep(self) -> None:
        """Make the line, and make it again."""
        self._keeping = asyncio.current_task()
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            self._hurry.clear()  # before an attempt: whoever hurries during one that fails wants another at once
            try:
                await self._stand()
            except Refused as error:
                await self._set(None, error)
                return
            except Unreachable as error:
                await self._set(None, error)
            except Exception as error:  # a bug, here or in asyncssh, is not to be the end of all attempts
                logger.exception("the line to %s has failed", self._address)
                await self._set(
                    None, Unreachable(f"The connection to {self._address} failed: {said(error)}.")
                )
            if time.monotonic() - began > STEADY:
                pause = FIRST_PAUSE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
                pause = FIRST_PAUSE / 2
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _stand(self) -> None:
        """One line from beginning to end. Raises ``Refused`` or ``Unreachable`` when there is none (any more)."""
        why: list[Exception | None] = []
        self._attempts += 1
        made = await connection.connect(self._address, self._prompts, lost=why.append)
        try:
            self._attempts = 0
            await self._set(made, None)
            await made.wait_closed()
        finally:
            self._connection = None
            await connection.end(made)
        raise Unreachable(f"The connection to {self._address} was lost: {said(why[0] if why else None)}.")

    async def _set(
        self, made: asyncssh.SSHClientConnection | None, reason: Refused | Unreachable | None
    ) -> None:
        if reason is not None:
            logger.info("no line to %s: %s", self._address, reason.message)
        self._connection = made
        self._reason = reason
        self._changed(
            Condition(
                LinkState.CONNECTED if made is not None else LinkState.LOST,
                time.time(),
                reason.message if reason else "",
                reason.hint if reason else "",
                self._attempts,
                isinstance(reason, Refused),
            )
        )
        async with self._turn:
            self._turn.notify_all()

    async def close(self) -> None:
        if self._keeping is not None:
            await asyncio_thread.end(self._keeping)

    def hurry(self) -> None:
        self._hurry.set()
        if self._connection is not None:
            asyncio.get_running_loop().create_task(self._prove(self._connection))

    async def _prove(self, made: asyncssh.SSHClientConnection) -> None:
        made.set_keepalive(PROOF_INTERVAL, PROOF_COUNT)
        await asyncio.sleep(PROOF_INTERVAL * (PROOF_COUNT + 2))
        if made is self._connection:
            made.set_keepalive(connection.KEEPALIVE_INTERVAL, connection.KEEPALIVE_COUNT)

    async def first(self) -> None:
        async with self._turn:
            await self._turn.wait_for(lambda: self._connection is not None or self._reason is not None)
        if self._connection is None:
            raise self._why()

    async def _standing(self) -> asyncssh.SSHClientConnection:
        """The line, as soon as there is one. Raises ``Refused`` if there will be none."""
        async with self._turn:
            await self._turn.wait_for(
                lambda: self._connection is not None or isinstance(self._reason, Refused)
            )
        if self._connection is not None:
            return self._connection
        raise self._why()

    def _why(self) -> Refused | Unreachable:
        """That there is no line, for one who asks: a failure of their own."""
        assert self._reason is not None
        return type(self._reason)(self._reason.message, self._reason.hint)

    async def run(self, command: str, input: bytes, timeout: float) -> Finished:
        try:
            async with asyncio.timeout(timeout):
                return await self._run(await self._standing(), command, input)
        except TimeoutError:
            if self._connection is None and self._reason is not None:
                raise self._why() from None
            raise Unreachable(f"{self._address} has not answered within {timeout:.0f} s.") from None

    async def _run(self, made: asyncssh.SSHClientConnection, command: str, input: bytes) -> Finished:
        session = await self._open(made, lambda: bridge.Output(MAX_OUTPUT), command)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                session.channel.write(input)
                session.channel.write_eof()
            lost = await session.ended
        finally:
            session.channel.abort()
        if session.too_much:
            raise Unreachable(f"{self._address} has said more than {MAX_OUTPUT} bytes.")
        if lost is not None:
            raise Unreachable(f"The connection to {self._address} was lost: {said(lost)}.")
        return Finished(session.status, bytes(session.out), session.said)

    async def _open(self, made: asyncssh.SSHClientConnection, session: Callable[[], S], command: str) -> S:
        """Start a command. Raises ``Unreachable``."""
        try:
            _, opened = await made.create_session(
                session, command, encoding=None, request_pty=False, window=bridge.WINDOW
            )
        except (asyncssh.Error, OSError) as error:
            raise Unreachable(f"{self._address} has not started a command: {said(error)}.") from error
        return cast(S, opened)

    async def carry(self, path: Path, command: str, ended: OnEnd) -> None:
        """Until cancelled, or there will be no line any more: raises ``Refused``."""
        while True:
            made = await self._standing()
            closed = asyncio.create_task(made.wait_closed())
            serving = asyncio.create_task(self._serve(made, path, command, ended))
            try:
                await asyncio.wait([closed, serving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await asyncio_thread.end(serving)
                await asyncio_thread.end(closed)
            if serving.done() and not serving.cancelled() and (error := serving.exception()) is not None:
                raise error

    async def _serve(
        self, made: asyncssh.SSHClientConnection, path: Path, command: str, ended: OnEnd
    ) -> None:
        """One client after another, while the line stands."""
        pause = 0.0
        with _listening(path) as listener:
            while True:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
                began = time.monotonic()
                try:
                    failed = await self._carry_one(made, client, listener, command, ended)
                except Unreachable as error:
                    logger.info("%s", error.message)
                    failed = True
                # A command that does not work is not started as fast as clients come.
                soon = failed and time.monotonic() - began < STEADY
                pause = min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE) if soon else 0.0
                await asyncio.sleep(pause)

    async def _carry_one(
        self,
        made: asyncssh.SSHClientConnection,
        client: socket.socket,
        listener: socket.socket,
        command: str,
        ended: OnEnd,
    ) -> bool:
        """Whether the command has failed."""
        with client:
            session = await self._open(made, lambda: bridge.Bridge(client), command)
            try:
                watching = asyncio.create_task(_until_replaced(session, listener))
                try:
                    await asyncio.wait(
                        [session.ended, watching],  # type: ignore[type-var]  # futures of different results
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    await asyncio_thread.end(watching)
                if not session.ended.done():
                    return False
            finally:
                session.abandon()
                await session.close()
        if session.hung_up or session.ended.result() is not None:
            return False
        if session.status != 0:
            said = session.said.decode(errors="replace").strip()
            logger.info("%s ended with %s: %s", command, session.status, said)
        ended(Finished(session.status, b"", session.said))
        return session.status != 0


async def _until_replaced(session: bridge.Bridge, listener: socket.socket) -> None:
    """Until another client waits, and the one of ``session`` has hung up, which is not heard while it is not read."""
    loop = asyncio.get_running_loop()
    while True:
        waiting = asyncio.Event()
        loop.add_reader(listener, waiting.set)
        try:
            await waiting.wait()
        finally:
            loop.remove_reader(listener)
        if session.left():
            return
        await asyncio.sleep(LOOK_INTERVAL)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A unix socket that only its owner may connect to; what was there before is of somebody dead."""
    temporary = path.with_name(f".{path.stem[:4]}")  # not longer than the name itself, which has a limit
    temporary.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind(str(temporary))
        temporary.chmod(0o600)
        listener.listen(BACKLOG)
        temporary.rename(path)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
