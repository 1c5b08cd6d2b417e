"""Drives ``Resync`` over a trio stream: a pipe without connections becomes one stream per session.

The law: the channel outlives its sessions. A session's stream can be closed, cancelled in the middle of
a write or lost to a restart of the peer; the next ``establish`` starts from whatever that left behind.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from protocol.errors import LinkError
from protocol.resync import MAX_RECORD, NONCE_SIZE, Resync, State

# Bytes per read: a record of the largest size takes two.
READ_SIZE: Final = 128 * 1024
# Bytes of a session that are taken in while our own preamble is still being written. A peer that sends
# more than its first frames without being answered can wait.
MAX_HELD: Final = 1024 * 1024
# Seconds between reads of a transport that says b"" for "nobody there", should it not wait itself.
ABSENT_PAUSE: Final = 0.1

_ESTABLISHED: Final = State.ESTABLISHED
_BROKEN: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class SocketPort(trio.abc.Stream):
    """A unix stream socket as a port: QEMU's end of one on the host, or what stands in for one in a guest.

    Owns ``stream``. A socket that has ended is over for good: its end of file breaks it, with ``gone`` as the reason.
    """

    def __init__(
        self, stream: trio.SocketStream, gone: str = "the other end of the socket was closed"
    ) -> None:
        self._stream = stream
        self._gone = gone

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if data := await self._stream.receive_some(max_bytes):
            return data
        raise trio.BrokenResourceError(self._gone)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def send_some(self, data: bytes | bytearray | memoryview) -> int:
        """How much of ``data`` was sent, as soon as some was; nothing was if it is cancelled."""
        try:
            return await self._stream.socket.send(data)
        except OSError as error:
            raise trio.BrokenResourceError(f"{self._gone}: {error}") from error

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        """Send ``data`` if the socket has room for it; False if nothing was sent.

        The kernel takes what fits into one buffer of its (16 KiB do) whole or not at all (unix_stream_sendmsg).
        """
        try:
            sent = os.write(self._stream.socket.fileno(), data)
        except BlockingIOError:
            return False
        except OSError as error:
            raise trio.BrokenResourceError(f"{self._gone}: {error}") from error
        if sent < len(data):
            raise trio.BrokenResourceError(f"the socket took {sent} of {len(data)} bytes")
        return True

    def receive_nowait(self) -> bytes | None:
        """What has come; None if nothing has, or nothing will any more, which is ``receive_some``'s to say."""
        try:
            return os.read(self.fileno(), READ_SIZE) or None
        except OSError:
            return None

    def fileno(self) -> int:
        return self._stream.socket.fileno()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class SerialChannel:
    """A pipe whose other end comes and goes. Owns ``transport``; one session at a time.

    The transport waits while nobody is at the other end, and raises ``trio.BrokenResourceError`` when
    there never will be again. If it returns ``b""``, the session is over and the channel is not.
    """

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self.resync = Resync()
        self.torn = False  # a write was begun and has not ended
        self.receive_nowait: Callable[[], bytes | None] | None = getattr(transport, "receive_nowait", None)
        self._send_nowait: Callable[[bytes], bool] | None = getattr(transport, "send_nowait", None)
        self._session: SerialStream | None = None
        self._wakeup = trio.lowlevel.ParkingLot()

    async def establish(self) -> trio.abc.Stream:
        """Wait for a living peer and agree on a new session with it; ends the session before.

        Raises what the transport raises when it is gone for good.
        """
        if self._session is not None:
            await self._session.aclose()
        self._begin()
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:

            async def guard(task: Callable[[], Awaitable[None]]) -> None:
                try:
                    await task()
                except _BROKEN as error:
                    failures.append(error)
                nursery.cancel_scope.cancel()

            for task in (self._speak, self._listen, self._keep_time):
                nursery.start_soon(guard, task)
        if failures:
            raise failures[0]
        self._session = SerialStream(self)
        return self._session

    async def aclose(self) -> None:
        """Close the transport, and with it the session."""
        await self.transport.aclose()

    def _begin(self) -> None:
        self.resync.begin(os.urandom(NONCE_SIZE), trio.current_time(), torn=self.torn)

    async def _speak(self) -> None:
        """Write until the session is established and all has been said that establishes it."""
        while True:
            if self.resync.state is State.LOST:
                self._begin()
            if data := self.resync.data_to_send():
                await self.write(data)
            elif self.resync.state is State.ESTABLISHED:
                return
            else:
                await self._wakeup.park()

    async def _listen(self) -> None:
        # Goes on while _speak writes: two sides that only write would wait for each other.
        while True:
            while self.resync.readable > MAX_HELD:
                await self._wakeup.park()
            if not await self.receive():
                await trio.sleep(ABSENT_PAUSE)
            self._wakeup.unpark_all()

    async def _keep_time(self) -> None:
        while True:
            with trio.CancelScope(deadline=self.resync.next_timeout()) as wait:
                await self._wakeup.park()
            if wait.cancelled_caught:
                self.resync.handle_timeout(trio.current_time())
                self._wakeup.unpark_all()

    async def receive(self) -> bool:
        """Read once; False if nobody is there."""
        data = await self.transport.receive_some(READ_SIZE)
        self.resync.receive_data(data)
        return bool(data)

    def write_nowait(self, data: bytes) -> bool:
        """Write something whole, if the transport can do that without waiting; False if nothing was written."""
        return self._send_nowait is not None and not self.torn and self._send_nowait(data)

    def fileno(self) -> int:
        """The transport's descriptor; only for one with ``receive_nowait``."""
        return int(self.transport.fileno())  # type: ignore[attr-defined]

    async def write(self, data: bytes) -> None:
        """Write something whole: a record or a preamble."""
        self.torn = True
        await self.transport.send_all(data)
        self.torn = False


class SerialStream(trio.abc.Stream):
    """One session on a channel. Closing it says nothing to the peer and leaves the channel open.

    When the peer has begun a new session it raises ``trio.BrokenResourceError`` with a ``LinkError`` as
    its ``__cause__``, after everything the old one said was read.
    """

    def __init__(self, channel: SerialChannel) -> None:
        self._channel = channel
        self._closed = False
        self._absent = False
        self._sending = False
        self._cut = False  # a record was begun and never ended

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        resync = self._channel.resync
        waited = False
        while True:
            self._check_closed()
            if data := resync.read(max_bytes):
                break
            if self._absent:
                break
            self._check_current()
            self._absent = not await self._channel.receive()
            waited = True
        if not waited:
            await trio.lowlevel.checkpoint()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._check_closed()
        self._check_current()
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this session")
        if self._cut:
            raise trio.BrokenResourceError("an earlier write was cut short")
        self._sending = self._cut = True
        try:
            for record in self._channel.resync.records(data):
                await self._channel.write(record)
            self._cut = False
        finally:
            self._sending = False

    def send_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        """Send ``data`` if that needs no waiting; False if nothing of it was sent. Raises as ``send_all``.

        For a few KiB: the transport must take one record whole or not at all.
        """
        channel = self._channel
        if self._closed or channel.resync.state is not _ESTABLISHED:
            self._check_closed()
            self._check_current()
        if self._sending or self._cut or len(data) > MAX_RECORD:
            return False
        return channel.write_nowait(channel.resync.record(bytes(data)))

    def receive_nowait(self) -> bytes | None:
        """What ``receive_some`` would give if it need not wait; else None, as for all that is not that simple."""
        channel = self._channel
        resync = channel.resync
        if self._closed or channel.receive_nowait is None or resync.state is not _ESTABLISHED:
            return None
        if resync.readable and (data := resync.read()):
            return data
        received = channel.receive_nowait()
        return (resync.exchange(received) or None) if received else None

    def fileno(self) -> int:
        """What becomes readable when ``receive_nowait`` has something; -1 if nothing does."""
        return -1 if self._channel.receive_nowait is None else self._channel.fileno()

    async def wait_send_all_might_not_block(self) -> None:
        self._check_closed()
        self._check_current()
        await self._channel.transport.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()

    def _check_closed(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this session's stream was closed")

    def _check_current(self) -> None:
        if self._channel.resync.state is not State.ESTABLISHED:
            lost = LinkError("the peer has begun a new session")
            raise trio.BrokenResourceError(str(lost)) from lost
