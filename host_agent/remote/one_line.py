"""One command on the VM, over one SSH connection: what a VM's host agent has when the VM's port is lost.

The laws: nothing of the user's SSH is used: no configuration, no agent, no known_hosts; the instance's key goes to a
machine that shows a host key which is known already, and to no other. What ends it (the machine, the command, the
block) ends all of it, in bounded time; and whoever wants it again makes another.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, cast

import asyncssh
import trio

from host_agent.groups import collapsed
from host_agent.remote import bridge
from host_agent.remote.asyncio_thread import AsyncioThread
from host_agent.remote.connection import CIPHERS, KEEPALIVE_COUNT, KEEPALIVE_INTERVAL, end
from host_agent.remote.failures import Refused, Unreachable, said
from host_agent.remote.machine import shown

#: Seconds for a command that has ended, or has nobody to talk to any more, to be over.
LAST_WORDS: Final = 3.0

#: Seconds for the login; an emulated guest needs 5.
LOGIN_TIME: Final = 60.0


@asynccontextmanager
async def opened(
    connection: socket.socket, *, user: str, key: str, host_keys: str, command: str
) -> AsyncIterator[trio.SocketStream]:
    """A stream that is ``command``'s stdin and stdout, over ``connection``, which it owns.

    ``key`` is the file of a private key, ``host_keys`` has a line for each key that may be shown. The block is
    cancelled when there is no such stream (any more): raises ``Refused`` or ``Unreachable``, which say why.
    """
    ours, theirs = socket.socketpair()
    with collapsed(), connection, theirs:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            thread = _Thread(connection, theirs, user, key, host_keys, command)
            thread.start()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(thread.carry)
                    yield stream
                    # If the command has ended, which ended the stream, it is about to be said why.
                    await stream.aclose()
                    nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS
            finally:
                await thread.aclose()


class _Thread(AsyncioThread):
    """asyncio's side."""

    def __init__(
        self,
        connected: socket.socket,
        client: socket.socket,
        user: str,
        key: str,
        host_keys: str,
        command: str,
    ) -> None:
        super().__init__("ssh")
        self._connected, self._client = connected, client
        self._user, self._key, self._host_keys, self._command = user, key, host_keys, command

    async def carry(self) -> None:
        """Until the client or the command has ended. Raises ``Refused`` or ``Unreachable``."""
        await self._call(self._carry)

    async def _carry(self) -> None:
        try:
            known = [asyncssh.import_public_key(line) for line in self._host_keys.splitlines()]
        except asyncssh.KeyImportError as error:
            raise Refused(f"what the VM has told as its host key is none: {error}") from error
        try:
            async with asyncio.timeout(LOGIN_TIME):
                made = await self._login(known)
        except TimeoutError:
            raise Unreachable(f"the VM's SSH server has let nobody in within {LOGIN_TIME:.0f} s") from None
        try:
            await self._run(made)
        finally:
            await end(made)

    async def _login(self, known: Sequence[asyncssh.SSHKey]) -> asyncssh.SSHClientConnection:
        try:
            return await asyncssh.connect(
                "127.0.0.1",
                sock=self._connected,
                config=None,
                username=self._user,
                client_keys=[self._key],
                agent_path=None,
                preferred_auth="publickey",
                known_hosts=lambda host, address, port: (known, [], []),
                encryption_algs=[*CIPHERS],
                compression_algs=["none"],
                connect_timeout=None,
                login_timeout=0,
                keepalive_interval=KEEPALIVE_INTERVAL,
                keepalive_count_max=KEEPALIVE_COUNT,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise Refused(
                "what answers as the VM's SSH server shows another host key than the VM has told"
            ) from error
        except asyncssh.PermissionDenied as error:
            raise Refused("the VM's SSH server does not let the instance's key in") from error
        except Exception as error:  # what a server sends may come out of asyncssh as anything
            raise Unreachable(f"no login to the VM's SSH server: {said(error)}") from error

    async def _run(self, made: asyncssh.SSHClientConnection) -> None:
        try:
            _, session = await made.create_session(
                lambda: bridge.Bridge(self._client),
                self._command,
                encoding=None,
                request_pty=False,
                window=bridge.WINDOW,
            )
        except (asyncssh.Error, OSError) as error:
            raise Unreachable(f"the VM's SSH server starts no command: {said(error)}") from error
        bridged = cast(bridge.Bridge, session)
        try:
            lost = await bridged.ended
        finally:
            bridged.abandon()
            await bridged.close()
        if bridged.hung_up:
            return
        words = shown(bridged.said.decode(errors="replace"))
        if lost is None and (words or bridged.status):
            raise Unreachable(words or f"what was run in the VM has ended with {bridged.status}")
        raise Unreachable(
            "the SSH connection to the VM was lost" if lost else "what was run in the VM has ended"
        )
