"""Both neighbours of a file server, for tests: the guest behind QEMU's socket, and the host agent."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import trio

from fileserver.control import ServeShares, SharedFolder, SharesChanged, ShareStates
from host_agent.client import hello
from protocol import codec, messages
from protocol.bulk import Bulk, Run
from protocol.errors import LinkError
from protocol.files import (
    MAX_FILES_PAYLOAD,
    ROOT,
    Changed,
    Entry,
    FileCall,
    Lookup,
    MountReport,
    MountReports,
    MountShares,
    MountStage,
    in_use,
)
from protocol.link import Link, Role, SerialChannel, Service

T = TypeVar("T")

SHARE = 7
#: Seconds for what takes milliseconds.
SOON = 20.0


async def until(condition: Callable[[], T]) -> T:
    with trio.fail_after(SOON):
        while not (value := condition()):
            await trio.sleep(0.002)
        return value


@dataclass(slots=True)
class Pending:
    """A call that has not been answered, and may have to be sent again."""

    call: FileCall[Any]
    payload: bytes | Run
    result: messages.Result | None = None
    sent: int = 0
    lent: int = 0
    """Bytes of the answer that came in memory."""


class Kernel:
    """A guest's kernel and its calls, which outlive sessions: what was not answered is sent again, as agreed."""

    def __init__(self, boot_id: str = "boot-1", bulk: Bulk | None = None) -> None:
        """``bulk``: memory that it offers."""
        self.boot_id = boot_id
        self.bulk = bulk
        self.keep_loans = False
        """Whether a test releases what comes in memory; else it is copied at once."""
        self.link: Link | None = None
        self.over = trio.Event()  # when the session of now is
        self.pending: dict[int, Pending] = {}
        self.in_use: set[int] | None = None
        """The shares that it says to be in use; None: it does not say."""
        self.mounted: list[MountShares] = []
        self.told: list[Changed | Any] = []
        """``Changed`` and results of calls, in the order in which they came."""
        self.report: Callable[[MountShares], MountReports] = _all_mounted
        self.answers = 0
        self._unique = itertools.count(2, 2)  # as kernels number requests: even, new
        self._answered = trio.lowlevel.ParkingLot()
        self._connected = trio.lowlevel.ParkingLot()

    def changes(self) -> list[Changed]:
        """What it was told of since it was asked last."""
        changes = [told for told in self.told if isinstance(told, Changed)]
        self.told.clear()
        return changes

    def unique(self) -> int:
        return next(self._unique)

    @asynccontextmanager
    async def session(self, channel: SerialChannel) -> AsyncIterator[Link]:
        """One life of the guest agent; at its end it is killed, and says nothing."""
        mounted, self.over = trio.Event(), trio.Event()

        async def mount(request: MountShares) -> MountReports:
            await trio.lowlevel.checkpoint()
            self.mounted.append(request)
            mounted.set()
            return self.report(request)

        service = Service()
        service.on_request(MountShares, mount)
        service.on_notice_at_once(Changed, self.told.append)
        offer = None if self.bulk is None else messages.BulkOffer([], b"", self.bulk.busy())
        said = [] if self.in_use is None else [in_use(self.in_use)]
        greeting = messages.Hello(boot_id=self.boot_id, capabilities=said, name="guest", bulk=offer)
        stream = await channel.establish()
        async with trio.open_nursery() as nursery:
            link = Link(
                stream,
                Role.GUEST,
                service,
                greeting,
                bulk=self.bulk,
                max_payload=MAX_FILES_PAYLOAD,
                max_backlog=1 << 30,  # the calls are its own, and so is the memory
            )

            async def run(task_status: trio.TaskStatus[Link]) -> None:
                with suppress(LinkError):
                    await link.run(task_status)
                self.link = None
                mounted.set()
                self.over.set()

            with suppress(RuntimeError):  # it was over before it began: trio's word for "never started"
                await nursery.start(run)
            await mounted.wait()
            if not self.over.is_set():
                self.link = link
                self._connected.unpark_all()
                for pending in list(self.pending.values()):
                    self._send(pending)
            yield link
            self.link = None
            nursery.cancel_scope.cancel()

    def begin(self, call: FileCall[Any], payload: bytes | Run = b"") -> Pending:
        """Ask; the call is sent again in every session until it is answered."""
        pending = Pending(call, payload)
        self.pending[id(pending)] = pending
        if self.link is not None:
            self._send(pending)
        return pending

    def _send(self, pending: Pending) -> None:
        def on_result(result: messages.Result | LinkError) -> None:
            if isinstance(result, messages.Result) and pending.result is None:
                self.answers += 1
                self.told.append(pending.call)
                pending.result = self._received(result, pending)
                self.pending.pop(id(pending), None)
                self._answered.unpark_all()

        assert self.link is not None
        pending.sent += 1
        with suppress(LinkError):
            self.link.call(pending.call, pending.payload, on_result)

    def _received(self, result: messages.Result, pending: Pending) -> messages.Result:
        if (loan := result.loan) is None:
            return result
        pending.lent = len(loan)
        if self.keep_loans:
            return result
        copied = replace(result, payload=bytes(result.payload), loan=None)
        loan.release()
        return copied

    async def finish(self, pending: Pending) -> messages.Result:
        with trio.fail_after(SOON):
            while pending.result is None:
                await self._answered.park()
        return pending.result

    async def ask(self, call: FileCall[T], payload: bytes | Run = b"") -> T:
        """Ask and wait; raises ``OSError``."""
        result = await self.finish(self.begin(call, payload))
        if result.errno:
            raise OSError(result.errno, os.strerror(result.errno))
        value: T = codec.decode(call.RESULT, result.value)
        return value

    async def ask_anything(self, op: int, args: object, payload: bytes | Run = b"") -> messages.Result:
        """The answer to a call of any shape, which is sent once. Raises ``LinkError`` if the session ends instead."""
        outcomes: list[messages.Result | LinkError] = []
        come = trio.Event()

        def on_result(outcome: messages.Result | LinkError) -> None:
            outcomes.append(outcome)
            come.set()

        with trio.fail_after(SOON):
            while (link := self.link) is None:
                await self._connected.park()
            number = link._live().call(op, args, payload)
            link._calling[number] = on_result
            link._flush()
            await come.wait()
        [outcome] = outcomes
        if isinstance(outcome, LinkError):
            raise outcome
        return outcome

    async def lookup(self, name: bytes, parent: int = ROOT, share: int = SHARE) -> Entry:
        """Raises ``FileNotFoundError`` for a name that is not there, whether that was promised or not."""
        entry: Entry = await self.ask(Lookup(share, self.unique(), parent, name))
        if not entry.node:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return entry


def _all_mounted(request: MountShares) -> MountReports:
    return MountReports([MountReport(share.id, MountStage.MOUNTED) for share in request.shares])


class Port:
    """QEMU's socket of the files port. It, and what is in flight, outlive whoever is at either end."""

    def __init__(self, listener: trio.SocketListener, path: Path) -> None:
        self._listener = listener
        self.path = path
        self._channels: list[SerialChannel] = []

    async def accept(self, patience: float = SOON) -> SerialChannel:
        with trio.fail_after(patience):
            channel = SerialChannel(await self._listener.accept())
        self._channels.append(channel)
        return channel

    async def aclose(self) -> None:
        for channel in self._channels:
            await trio.aclose_forcefully(channel.transport)


@asynccontextmanager
async def port(directory: Path) -> AsyncIterator[Port]:
    path = directory / "files.sock"
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(1)
    async with trio.SocketListener(sock) as listener:
        opened = Port(listener, path)
        try:
            yield opened
        finally:
            await opened.aclose()


@dataclass
class HostAgent:
    """The other end of the control link, and what it was told."""

    link: Link
    told: list[ShareStates] = field(default_factory=list)

    async def serve(self, *folders: SharedFolder) -> ShareStates:
        return await self.link.request(ServeShares(list(folders)))


@asynccontextmanager
async def host_agent(transport: trio.abc.Stream) -> AsyncIterator[HostAgent]:
    told: list[ShareStates] = []

    async def on_change(notice: SharesChanged) -> None:
        await trio.lowlevel.checkpoint()
        told.append(notice.states)

    service = Service()
    service.on_notice(SharesChanged, on_change)
    async with trio.open_nursery() as nursery:
        link = Link(transport, Role.CLIENT, service, hello("host"))

        async def run(task_status: trio.TaskStatus[Link]) -> None:
            with suppress(LinkError):
                await link.run(task_status)

        await nursery.start(run)
        yield HostAgent(link, told)
        nursery.cancel_scope.cancel()


def control_pair() -> tuple[trio.SocketStream, socket.socket]:
    """The host agent's end, and the file server's."""
    ours, theirs = socket.socketpair()
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours)), theirs
