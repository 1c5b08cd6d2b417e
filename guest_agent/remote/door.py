"""Where a daemon is given its transports, one after another, and where it is decided that none will come any more.

The laws:
- One transport at a time. Who hands over another has connected anew, so the one before is dead: it is hung up on.
- A transport lives as long as its connector: sshd ends that with the connection, and the agent's end of it ends the
  connector, and with it the command that sshd waits for.
- A connection that says nothing for ``SILENCE`` is dead, whatever TCP thinks: hosts are heard from every 5 s.
- Without any transport for the time of grace the process ends, in good order.
"""

from __future__ import annotations

import array
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import trio

from guest_agent.remote.handover import MAX_LINE, OTHER_BUILD, REFUSED, TAKEN, Offer
from guest_agent.remote.stdio import DRAIN, Pipes, Stdio, join

log = logging.getLogger(__name__)

SILENCE = 60.0
"""Seconds."""

OFFER_TIME = 10.0
"""Seconds for who connects to say what it wants."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid (socket(7), SO_PEERCRED)."""


class NotAnOffer(Exception):
    """What came cannot be used; the message is a clause."""


def end_this_process() -> None:
    """As whoever ends it would: there is one way."""
    os.kill(os.getpid(), signal.SIGTERM)


class Door:
    """The transports of an agent of the build ``build``, from whoever connects to ``listener``, which it owns."""

    def __init__(
        self,
        listener: socket.socket,
        build: str,
        grace: float,
        end: Callable[[], None] = end_this_process,
    ) -> None:
        listener.setblocking(False)
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        self._build = build
        self._grace = grace
        self._end = end
        self._ending = False
        self._left_at = trio.current_time()
        self._current: Stdio | None = None
        self._next: Stdio | None = None
        """Of those given last the one that nobody has opened yet."""
        self._changed = trio.Event()

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_time)
                while True:
                    try:
                        client = await self._listener.accept()
                    except OSError as error:  # out of descriptors
                        log.warning("door.accept error=%s", error)
                        await trio.sleep(0.2)
                        continue
                    if self._ending:  # who comes now waits for the end, and begins anew
                        await trio.aclose_forcefully(client)
                        continue
                    nursery.start_soon(self._serve, client)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._listener)
                if self._next is not None:
                    await trio.aclose_forcefully(self._next)

    async def open_transport(self) -> Stdio:
        """The next one, however long that takes."""
        while self._next is None:
            await self._changed.wait()
        transport, self._next = self._next, None
        return transport

    # --- who comes -----------------------------------------------------------------------------------

    async def _serve(self, client: trio.SocketStream) -> None:
        async with client:
            try:
                stdio, pipes = await self._take(client)
            except NotAnOffer as error:
                log.warning("door.refused reason=%s", error)
                await _say(client, REFUSED + str(error).encode()[:MAX_LINE] + b"\n")
            except _OtherBuild as other:
                log.info("door.other_build wanted=%s", other)
                self._ending = True
                await _say(client, OTHER_BUILD)
                self._end()
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
                log.warning("door.lost error=%r", error)
            else:
                await self._attend(client, stdio, pipes)

    async def _take(self, client: trio.SocketStream) -> tuple[Stdio, Pipes | None]:
        """Raises ``NotAnOffer``, ``_OtherBuild`` and what sockets do."""
        with trio.fail_after(OFFER_TIME):
            line, fds = await _receive(client)
        try:
            _check_peer(client)
            try:
                offer = Offer.decode(line)
            except ValueError as error:
                raise NotAnOffer(str(error)) from error
            if len(fds) != 2:
                raise NotAnOffer(f"{len(fds)} descriptors instead of 2")
            if offer.build != self._build:
                raise _OtherBuild(offer.build)
            reading, writing = fds
            fds = []
            joined = join(reading, writing)
        finally:
            for fd in fds:
                os.close(fd)
        self._grace = offer.grace
        return joined

    async def _attend(self, client: trio.SocketStream, stdio: Stdio, pipes: Pipes | None) -> None:
        """Give ``stdio`` to the agent, and stay until it or the connector has done with it."""
        async with trio.open_nursery() as nursery:
            await self._give(stdio)
            nursery.start_soon(_until_gone, client, stdio)
            if pipes is not None:
                nursery.start_soon(pipes.carry)
            try:
                await _say(client, TAKEN)
                await stdio.closed.wait()
            finally:
                if self._current is stdio:
                    self._set_current(None)
            if pipes is not None:
                nursery.cancel_scope.deadline = trio.current_time() + DRAIN
                await pipes.done.wait()
            nursery.cancel_scope.cancel()
        log.info("door.left grace=%g", self._grace)

    async def _give(self, stdio: Stdio) -> None:
        unopened, self._next = self._next, stdio
        if unopened is None and self._current is not None:
            log.info("door.replaced")
            self._current.hang_up()
        self._set_current(stdio)
        if unopened is not None:
            await trio.aclose_forcefully(unopened)

    def _set_current(self, stdio: Stdio | None) -> None:
        self._current = stdio
        self._left_at = trio.current_time()
        self._changed.set()
        self._changed = trio.Event()

    # --- time ----------------------------------------------------------------------------------------

    async def _keep_time(self) -> None:
        while not self._ending:
            changed, current = self._changed, self._current
            due = self._left_at + self._grace if current is None else trio.current_time() + SILENCE
            if current is not None:
                current.heard = False
            with trio.move_on_at(due) as waiting:
                await changed.wait()
            if not waiting.cancelled_caught:
                continue
            if current is None:
                log.info("door.nobody_came grace=%g", self._grace)
                self._ending = True
                self._end()
            elif not current.heard:
                log.warning("door.silent seconds=%g", SILENCE)
                current.hang_up()


class _OtherBuild(Exception):
    """Its message is the build that was asked for."""


async def _receive(client: trio.SocketStream) -> tuple[bytes, list[int]]:
    """One message with the descriptors that came with it, which are the caller's."""
    fds = array.array("i")
    room = socket.CMSG_SPACE(4 * fds.itemsize)
    line, ancillary, _, _ = await client.socket.recvmsg(MAX_LINE, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return line, list(fds)


def _check_peer(client: trio.SocketStream) -> None:
    """Raises ``NotAnOffer`` for who is another user, should the folder have let him in."""
    credentials = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid not in (os.geteuid(), 0):
        raise NotAnOffer("that is another user's agent")


async def _say(client: trio.SocketStream, line: bytes) -> None:
    with suppress(trio.BrokenResourceError):  # it has gone, which is found out by who waits for it
        await client.send_all(line)


async def _until_gone(client: trio.SocketStream, stdio: Stdio) -> None:
    """A connector says nothing; when it ends, so does what it has brought."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await client.receive_some(MAX_LINE):
            pass
    stdio.hang_up()
