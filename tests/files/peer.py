"""A guest made by hand: it speaks the protocol to the real file server and says what the test tells it to."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fileserver.control import SharedFolder
from protocol import codec
from protocol.errors import LinkError
from protocol.files import ROOT, Entry, FileCall, Lookup
from protocol.link import Link
from protocol.messages import Result
from tests.files.harness import FileServer, TrioThread, loose_directory
from tests.fileserver.peers import Kernel, port


@dataclass(frozen=True, slots=True)
class Reply:
    """``errno`` 0 and a value, or another errno and None."""

    errno: int
    value: Any = None
    payload: bytes = b""


class Refused(Exception):
    """The server ended the session instead of answering."""


class Peer:
    """A guest that tests speak for from another thread. A session that the server ends is followed by a new one."""

    def __init__(self, loop: TrioThread, server: FileServer, secret: bytes) -> None:
        self._loop = loop
        self.server = server
        self._secret = secret
        self._kernel = Kernel("the-peer")

    async def run(self, directory: Path, task_status: trio.TaskStatus[None]) -> None:
        async with port(directory) as opened:
            task_status.started()
            while True:
                channel = await opened.accept(math.inf)
                with contextlib.suppress(OSError, trio.BrokenResourceError):
                    while True:
                        async with self._kernel.session(channel):
                            await self._kernel.over.wait()

    @property
    def sessions(self) -> int:
        """How many there were."""
        return len(self._kernel.mounted)

    @property
    def _link(self) -> Link | None:
        return self._kernel.link

    # --- asking ------------------------------------------------------------------------------------

    def raw(self, op: int, args: object, payload: bytes = b"") -> Result:
        """What the server says to a call of any shape. Raises ``Refused``."""
        return self._loop.call(self._raw, op, args, payload)

    async def _raw(self, op: int, args: object, payload: bytes) -> Result:
        try:
            result = await self._kernel.ask_anything(op, args, payload)
        except LinkError as error:
            raise Refused(str(error)) from None
        self.check(result)
        return result

    def check(self, result: Result) -> None:
        """No answer ever holds what is outside of the shares."""
        assert self._secret not in repr(result.value).encode() + result.payload

    def ask(self, call: FileCall[Any], payload: bytes = b"") -> Reply:
        result = self.raw(call.OP, codec.encode(call), payload)
        if result.errno:
            return Reply(result.errno)
        return Reply(0, codec.decode(call.RESULT, result.value), result.payload)

    def ask_many(self, calls: Sequence[tuple[FileCall[Any], bytes]]) -> list[Reply]:
        """All at once."""

        async def ask_all() -> list[Result]:
            results: dict[int, Result] = {}

            async def one(index: int, call: FileCall[Any], payload: bytes) -> None:
                results[index] = await self._raw(call.OP, codec.encode(call), payload)

            async with trio.open_nursery() as nursery:
                for index, (call, payload) in enumerate(calls):
                    nursery.start_soon(one, index, call, payload)
            return [results[index] for index in range(len(calls))]

        return [Reply(result.errno, result.value, result.payload) for result in self._loop.call(ask_all)]

    def unique(self) -> int:
        """A number as the kernel gives them to requests."""
        return self._kernel.unique()

    def look_up(self, share: int, *names: bytes) -> Entry:
        """Walk from the root; everything must be there."""
        entry = Entry(ROOT, b"")
        for name in names:
            reply = self.ask(Lookup(share, self.unique(), entry.node, name))
            assert reply.errno == 0, (name, os.strerror(reply.errno))
            entry = reply.value
        return entry


@contextlib.contextmanager
def peer_of(
    folders: dict[int, tuple[str, bool]], secret: bytes, *, hide: Sequence[str] = ()
) -> Iterator[tuple[Peer, Path]]:
    """A peer of a file server that shares ``folders`` (id: name and whether read-only), and their parent."""
    with loose_directory() as directory, TrioThread() as loop:
        top = directory / "host"
        for name, _ in folders.values():
            (top / name).mkdir(parents=True)
        for name in hide:
            (top / name).mkdir(parents=True, exist_ok=True)
        server = FileServer(loop, directory, directory / "files.sock", [top / name for name in hide])
        peer = Peer(loop, server, secret)
        loop.start(peer.run, directory)
        try:
            server.start(
                [
                    SharedFolder(number, str(top / name), f"/mnt/{name}", read_only)
                    for number, (name, read_only) in folders.items()
                ]
            )
            yield peer, top
            assert server.alive()
        finally:
            server.kill()
            server.store.close()
            log = server.log.read_text(errors="replace") if server.log.exists() else ""
            print(log[-6000:])
        assert "Traceback" not in log
