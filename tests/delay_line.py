"""A line with a length: passes TCP connections on, each byte late by a fixed time, and can be cut and joined again.

``python delay_line.py SECONDS TARGET PORT [--rate BYTES]`` is the process that does it, so that nobody who is measured
shares an interpreter with it; ``DelayLine`` is what a test holds. The law: a byte leaves SECONDS after it has come, in each
direction, so a round trip takes twice that, and as many bytes are under way as come meanwhile: a delay, no limit of throughput.
Unless there is a rate: then each direction carries that many bytes a second, of all connections, and what does not get its turn
within a tenth of a second is not read yet.

netem would do the same; not every kernel has it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

READ_SIZE = 256 * 1024
MAX_HELD = 256 * 1024 * 1024
"""Bytes under way in one direction: 2 GB/s for 100 ms fit."""

QUEUED = 0.1
"""Seconds of a line with a rate that wait for their turn, as in a router; and what sockets hold for it, in bytes:"""
SOCKET_BUFFER = 128 * 1024

PIECE = 16 * 1024
"""Bytes that have their turn at a time."""

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing says RST."""

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27


def drop_what_comes(taker: socket.socket) -> None:
    """The kernel throws away each packet for it, unseen: whoever sends them gets no word, not even an ACK.

    socket(7); the filter is one instruction, BPF_RET | BPF_K with 0 bytes to be kept.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    taker.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


class Turn:
    """What the line carries in one direction, ``rate`` bytes a second, or None for any number."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free = 0.0

    def passed(self, now: float, size: int) -> float:
        """When ``size`` bytes that come now have had their turn."""
        if self.rate is None:
            return now
        self._free = max(now, self._free) + size / self.rate
        return self._free

    def most_held(self, delay: float) -> float:
        """Bytes of a connection: those that wait for their turn, and those that have had it."""
        return MAX_HELD if self.rate is None else self.rate * (QUEUED + delay)


class Way:
    """One direction of a connection."""

    def __init__(self, line: Line, source: socket.socket, target: socket.socket, there: bool) -> None:
        self._line = line
        self._source = source
        self._target = target
        self._turn = line.turns[there]
        self._held: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take())
            tasks.create_task(self._give())

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            while self._bytes > self._turn.most_held(self._line.delay):
                await self._wait()
            data = await loop.sock_recv(self._source, READ_SIZE if self._turn.rate is None else PIECE)
            self._held.append((self._turn.passed(loop.time(), len(data)) + self._line.delay, data))
            self._bytes += len(data)
            self._changed.set()

    async def _give(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._held:
                await self._wait()
            due, data = self._held.popleft()
            if (early := due - loop.time()) > 0:
                await asyncio.sleep(early)
            await self._line.joined.wait()
            if not data:
                self._target.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self._target, data)
            self._bytes -= len(data)
            self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Line:
    """The process's side."""

    def __init__(self, delay: float, target: str, port: int, rate: float | None = None) -> None:
        self.delay = delay
        self.turns = (Turn(rate), Turn(rate))
        self.joined = asyncio.Event()
        self.joined.set()
        self._target = target
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._forgotten: list[socket.socket] = []
        self._vanished = False
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._port = port

    async def run(self) -> None:
        """Answer commands, one a line, until nobody can give any."""
        self.listen()
        print(self._port, flush=True)
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
        )
        while words := (await commands.readline()).split():
            await getattr(self, words[0].decode())(*words[1:])
            print("done", flush=True)

    def listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
        self._listener.setblocking(False)
        self._bound(self._listener)
        self._port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener))

    def _bound(self, end: socket.socket) -> None:
        """Those that are accepted have what their listener has."""
        if self.turns[0].rate is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)

    async def late(self, delay: bytes) -> None:
        self.delay = float(delay)

    async def cut(self) -> None:
        self.joined.clear()

    async def vanish(self) -> None:
        self.joined.clear()
        self._vanished = True
        for each in self._near():
            drop_what_comes(each)

    async def forget(self) -> None:
        for client in self._connections.values():
            if client.fileno() >= 0:
                drop_what_comes(client)
                self._forgotten.append(client.dup())  # open for ever: its end is not told either
        await self.reset()

    async def restore(self) -> None:
        if self._vanished:
            self._vanished = False
            for each in self._near():
                each.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        if self._listener is None:
            self.listen()
        self.joined.set()

    def _near(self) -> list[socket.socket]:
        all_there = [*self._connections.values(), *([self._listener] if self._listener else [])]
        return [each for each in all_there if each.fileno() >= 0]

    async def refuse(self) -> None:
        assert self._listener is not None
        assert self._accepting is not None
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()
        self._listener = None
        await self.reset()

    async def reset(self) -> None:
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                raise
            task = asyncio.create_task(self._serve(accepted))
            self._connections[task] = accepted
            task.add_done_callback(self._connections.pop)

    async def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ExceptionGroup):
            try:
                await self._carry(client)
            except asyncio.CancelledError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async def _carry(self, client: socket.socket) -> None:
        client.setblocking(False)
        await asyncio.sleep(self.delay)
        await self.joined.wait()
        unix = self._target.startswith("/")
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as server:
            server.setblocking(False)
            self._bound(server)
            address: str | tuple[str, int] = self._target
            if not unix:
                host, _, port = self._target.rpartition(":")
                address = (host, int(port))
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(server, address)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(Way(self, client, server, True).run())
                tasks.create_task(Way(self, server, client, False).run())


class DelayLine:
    """A line to ``target``, "ADDRESS:PORT" or the path of a unix socket; ``port`` of 127.0.0.1 is its near end.

    ``delay`` in seconds, each way; ``rate`` in bytes a second, each way, or None for any.
    """

    def __init__(self, target: str | Path, delay: float = 0.0, rate: float | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        from tests.free_ports import free_port  # which the process need not find

        # Not one that another connection may be given while this line refuses.
        argv = [sys.executable, "-I", __file__, str(delay), str(target), str(free_port())]
        argv += [] if rate is None else ["--rate", str(rate)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.port = int(self._answer())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_delay(self, delay: float) -> None:
        """For what comes from now on."""
        self._command(f"late {delay}")

    def cut(self) -> None:
        """Nothing arrives any more, and nobody is told: a cable that was pulled out, a laptop asleep.

        Connections stay open, and new ones get no answer.
        """
        self._command("cut")

    def vanish(self) -> None:
        """As ``cut``, and the near end's packets are lost: nothing is acknowledged, nobody is connected to."""
        self._command("vanish")

    def forget(self) -> None:
        """What is open is never answered again on the near side, as by a router that has forgotten it; its far end
        has ended. What comes anew is carried, if the line is joined."""
        self._command("forget")

    def restore(self) -> None:
        """After ``cut`` and ``vanish``: what was under way arrives, as TCP would send it again. After ``refuse``: listens
        again."""
        self._command("restore")

    def reset(self) -> None:
        """All connections end at once, with a reset for the client; new ones are served."""
        self._command("reset")

    def refuse(self) -> None:
        """As ``reset``, and new connections are refused until ``restore``."""
        self._command("refuse")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _command(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if answer := self._process.stdout.readline():
            return answer
        self._errors.seek(0)
        raise AssertionError(f"the delay line is gone: {self._errors.read().decode()}")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("delay", type=float)
    arguments.add_argument("target")
    arguments.add_argument("port", type=int)
    arguments.add_argument("--rate", type=float)
    given = arguments.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a ^C is for the tests, which end this
    asyncio.run(Line(given.delay, given.target, given.port, given.rate).run())


if __name__ == "__main__":
    main()
