"""A guest made by hand: it speaks the protocol to the real file server and says what the test tells it to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from host_agent.fileserver.control import SharedFolder
from protocol import codec
from protocol.errors import LinkError
from protocol.files import (
    MAX_FILES_PAYLOAD,
    ROOT,
    Entry,
    FileCall,
    Lookup,
    MountReport,
    MountReports,
    MountShares,
    MountStage,
)
from protocol.link import Hello, Link, Role, SerialChannel, Service
from protocol.messages import Result
from tests.files.harness import FileServer, TrioThread, loose_directory

ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Reply:
    """``errno`` 0 and a value, or another errno and None."""

    errno: int
    value: Any = None
    payload: bytes = b""


class Refused(Exception):
    """The server ended the session instead of answering."""


class Peer:
    """The guest's end. A session that the server ends is followed by a new one."""

    def __init__(self, loop: TrioThread, server: FileServer, secret: bytes) -> None:
        self._loop = loop
        self.server = server
        self._secret = secret
        self._link: Link | None = None
        self._came = trio.Event()
        self._unique = 0
        self.sessions = 0

    async def run(self, path: Path, task_status: trio.TaskStatus[None]) -> None:
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(os.fspath(path))
        listening.listen(1)
        task_status.started()
        async with trio.SocketListener(listening) as listener:
            while True:
                async with await listener.accept() as stream:
                    channel = SerialChannel(stream)
                    with contextlib.suppress(OSError, trio.BrokenResourceError):
                        while True:
                            await self._session(await channel.establish())

    async def _session(self, stream: trio.abc.Stream) -> None:
        service = Service()
        link = Link(
            stream,
            Role.GUEST,
            service,
            Hello(boot_id="the-peer", name="peer"),
            max_payload=MAX_FILES_PAYLOAD,
            max_backlog=1 << 30,
        )

        async def mount(request: MountShares) -> MountReports:
            self._link = link
            self._came.set()
            self.sessions += 1
            return MountReports([MountReport(share.id, MountStage.MOUNTED) for share in request.shares])

        service.on_request(MountShares, mount)
        try:
            with contextlib.suppress(LinkError):
                await link.run()
        finally:
            self._link, self._came = None, trio.Event()

    # --- asking ------------------------------------------------------------------------------------

    def raw(self, op: int, args: object, payload: bytes = b"") -> Result:
        """What the server says to a call of any shape. Raises ``Refused``."""
        return self._loop.call(self._raw, op, args, payload)

    async def _raw(self, op: int, args: Any, payload: bytes) -> Result:
        with trio.fail_after(ANSWER_SECONDS):
            while self._link is None:
                await self._came.wait()
            link, event, outcomes = self._link, trio.Event(), []

            def on_result(outcome: Result | LinkError) -> None:
                outcomes.append(outcome)
                event.set()

            number = link._live().call(op, args, payload)
            link._calling[number] = on_result
            link._flush()
            await event.wait()
        outcome = outcomes[0]
        if isinstance(outcome, LinkError):
            raise Refused(str(outcome))
        self.check(outcome)
        return outcome

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
        """A number as the kernel gives them to requests: even, new."""
        self._unique += 2
        return self._unique

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
        server = FileServer(loop, directory, directory / "socket", [top / name for name in hide])
        peer = Peer(loop, server, secret)
        loop.start(peer.run, directory / "socket")
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
