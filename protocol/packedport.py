"""Drives ``Packing`` over a socket: a port whose bytes are fewer on the way, if the other side knows of it.

The law: what was packed is sent, whole and in order, even if who wanted it sent is cancelled: the next to send sends
the rest first. What comes and cannot be right breaks the port.
"""

from __future__ import annotations

import select
from collections.abc import Sequence

import trio

from protocol.errors import RemoteProtocolError
from protocol.packing import Packing
from protocol.serial import READ_SIZE, SocketPort


class PackedPort(trio.abc.Stream):
    """A connection over ``port``, which it owns. Only the greeting is sent before the other side has said something."""

    def __init__(self, port: SocketPort, offered: Sequence[str] | None = None) -> None:
        """``offered`` as for ``Packing``."""
        self._port = port
        self._packing = Packing(offered)
        self._unsent = memoryview(self._packing.greeting)
        self._sending = False
        self._known = trio.Event()
        self._room = select.poll()
        self._room.register(port.fileno(), select.POLLOUT)

    # --- from the other side -----------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As a port's; ``max_bytes`` is of no account."""
        while True:
            data = await self._port.receive_some(READ_SIZE)
            if found := self._take(bytes(data)):
                return found

    def receive_nowait(self) -> bytes | None:
        """As a port's."""
        data = self._port.receive_nowait()
        return None if data is None else self._take(data) or None

    def _take(self, data: bytes) -> bytes:
        packing = self._packing
        try:
            found = packing.receive(data)
        except RemoteProtocolError as error:
            raise trio.BrokenResourceError(str(error)) from error
        if packing.ready:
            self._known.set()
            if not packing.is_plain:
                self._acknowledge()
        return found

    def _acknowledge(self) -> None:
        # What is being sent may not be interrupted; it goes with what comes next.
        if (
            not self._unsent
            and (words := self._packing.acknowledgement())
            and not self._port.send_nowait(words)
        ):
            self._unsent = memoryview(words)

    # --- to the other side -------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            if not self._packing.ready:
                await self._send_rest()
                await self._known.wait()
            # From here on it is on its way.
            self._unsent = memoryview(b"".join([self._unsent, self._packing.encode(data)]))
            await self._send_rest()
        finally:
            self._sending = False

    async def _send_rest(self) -> None:
        while self._unsent:
            sent = await self._port.send_some(self._unsent)
            self._unsent = self._unsent[sent:]

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        """As a port's."""
        if self._unsent or self._sending or not self._packing.ready:
            return False
        # What the codec has seen the other side has to see: it is only begun where there is room.
        if not self._room.poll(0):
            return False
        sent = self._packing.encode(data)
        if not self._port.send_nowait(sent):  # which there is, for as much as is sent this way
            self._unsent = memoryview(sent)
        return True

    # --- as the port -------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._port.fileno()

    async def wait_send_all_might_not_block(self) -> None:
        await self._port.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._port.aclose()
