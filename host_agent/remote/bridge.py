"""Bytes between a local socket and a command on the machine, and a command that is simply run: sessions of asyncssh.

The law: nobody is read from faster than the other side takes it, so what is under way is bounded: the channel's window
one way, the machine's window the other. The callbacks move bytes where they stand; no task is between the two.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections import deque
from dataclasses import dataclass
from typing import Final

import asyncssh

#: Bytes that the machine may have under way to us. A round trip of 200 ms carries 40 MB/s; it is all that a client
#: that does not read can make us hold. (The other way sshd decides: 2 MiB.)
WINDOW: Final = 8 * 1024 * 1024

#: Bytes of one read from the client: four of the packets that sshd accepts.
READ_SIZE: Final = 128 * 1024

#: Bytes kept of what a command says of itself: its last sentences.
MAX_SAID: Final = 4096

#: Seconds for last words to be sent, and the machine to close what we have closed; its window may be full for ever.
CLOSE_PATIENCE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended. ``status`` is None if a signal has ended it, or nobody can tell."""

    status: int | None
    out: bytes
    err: bytes


class Session(asyncssh.SSHClientSession[bytes]):
    """A command on the machine; ``ended`` is set, to what ended it if it was no end in order, when all is over."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.status: int | None = None
        self.said = b""
        self.channel: asyncssh.SSHClientChannel[bytes]

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self.channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is None:
            self.received(data)
        else:
            self.said = (self.said + data)[-MAX_SAID:]

    def received(self, data: bytes) -> None:
        """Of its output."""

    def exit_status_received(self, status: int) -> None:
        self.status = status

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(exc)

    async def close(self) -> None:
        """End the command's input and output, and forget it if that takes long."""
        self.channel.close()
        await asyncio.wait([self.ended], timeout=CLOSE_PATIENCE)
        self.channel.abort()


class Output(Session):
    """A command whose output is kept, ``limit`` bytes of it; one that says more is cut off."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self.out = bytearray()
        self.too_much = False

    def received(self, data: bytes) -> None:
        self.out += data
        if len(self.out) > self._limit:
            del self.out[self._limit :]
            self.too_much = True
            self.channel.abort()

    def eof_received(self) -> bool:
        return True  # its input may still be under way


class Bridge(Session):
    """Carries bytes between ``client``, which it owns, and a command, until either has ended.

    A command that has ended is not over before its client has read all of it: the rest is here, and nowhere else.
    """

    def __init__(self, client: socket.socket) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._client.setblocking(False)
        self._unsent: deque[memoryview] = deque()
        self._reading = False
        self._gone = False
        self._last = False  # the command has said all
        self._closed = False  # its channel too, and what is unsent is all that there is
        self.hung_up = False
        """Whether it was the client who has ended it."""

    def session_started(self) -> None:
        self.resume_writing()

    # From the machine.

    def received(self, data: bytes) -> None:
        if self._gone:
            return
        if self._unsent:
            self._unsent.append(memoryview(data))
            return
        try:
            sent = self._client.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._hang_up()
            return
        if sent < len(data):
            self._unsent.append(memoryview(data)[sent:])
            self.channel.pause_reading()
            self._loop.add_writer(self._client, self._send_rest)

    def _send_rest(self) -> None:
        try:
            while self._unsent:
                sent = self._client.send(self._unsent[0])
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                    return
                self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        self._loop.remove_writer(self._client)
        if self._last:
            self._leave()
        else:
            self.channel.resume_reading()

    def eof_received(self) -> bool:
        """The command has said all; its client hears that once it has read it."""
        self._last = True
        if not self._unsent:
            self._leave()
        return False

    # To the machine.

    def pause_writing(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._client)
            self._reading = False

    def resume_writing(self) -> None:
        if not self._reading and not self._gone:
            self._loop.add_reader(self._client, self._read)
            self._reading = True

    def _read(self) -> None:
        try:
            data = self._client.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
        elif not self.channel.is_closing():
            self.channel.write(data)
        elif not self._unsent:
            self._leave()
        # Else the command has ended: it takes nothing, but its client has more to read.

    def connection_lost(self, exc: Exception | None) -> None:
        """With the line its client is lost at once; an end in order waits for it."""
        if self._unsent and exc is None:
            self._last = self._closed = True
            return
        self._leave()
        super().connection_lost(exc)

    def left(self) -> bool:
        """Whether the client has hung up, which nobody hears while nothing is read from it."""
        if self._gone:
            return True
        poll = select.poll()
        poll.register(self._client, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def _hang_up(self) -> None:
        self.hung_up = not self.channel.is_closing()
        self._leave()

    def _leave(self) -> None:
        """No more of the client."""
        if self._gone:
            return
        self._gone = True
        self._unsent.clear()
        self._loop.remove_reader(self._client)
        self._loop.remove_writer(self._client)
        self._client.close()
        self.channel.close()
        if self._closed:
            super().connection_lost(None)

    def abandon(self) -> None:
        """The client is closed, whatever was under way to it."""
        self._leave()
