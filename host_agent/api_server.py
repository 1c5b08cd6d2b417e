"""What the host agent answers to the command line, over the instance's own unix socket.

The same protocol as between the agents, so one implementation of framing, deadlines, streams and flow
control serves both. The socket is 0600 in a 0700 folder: who can connect is the user.

The law: an answer always fits into a frame, whatever the guest calls itself and however many ports it
listens on. A table goes out in pieces, a sentence is cut.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from host_agent.client import hello
from host_agent.errors import UserError
from host_agent.events import EventLog
from host_agent.forwarders import Dial
from host_agent.forwards import MAX_FORWARDS, clipped
from host_agent.groups import collapsed
from host_agent.owners import named
from host_agent.unix_listening import listen_unix
from protocol import codec
from protocol.api import (
    AddMounts,
    Attachment,
    ChangeDisk,
    ChangePorts,
    ChangeSocketForwards,
    CompactDisk,
    DialName,
    DialTcp,
    Disk,
    Done,
    EndView,
    Event,
    Exec,
    Forward,
    Forwards,
    GetDisk,
    GetForwards,
    GetMounts,
    GetPortSettings,
    GetSocketForwards,
    GetStatus,
    GetUsage,
    GetView,
    GuestInfo,
    InstanceStatus,
    Mounts,
    MountSpec,
    Owner,
    PortSettings,
    ReloadSettings,
    RemoveMounts,
    SettingsReloaded,
    SocketRows,
    StartView,
    StopInstance,
    Subscribe,
    Target,
    Usage,
    View,
)
from protocol.errors import ErrorCode, LinkClosed, LinkError, OpenRefused, RpcError
from protocol.frames import MAX_HEADER, encode_frame
from protocol.link import Incoming, Link, Service
from protocol.messages import clip
from protocol.session import Role
from protocol.splice import abort, splice

logger = logging.getLogger(__name__)

#: Events a subscriber may be behind; one that is further behind does not read and is dropped. All ports may change at
#: once, twice each (closed here, open there), before anything is sent; an event has 200 to 400 bytes.
MAX_BEHIND = 4 * MAX_FORWARDS

#: Bytes of rows, as they are encoded, in one piece of the table of forwards. Half of what a frame takes, so that
#: nobody has to count what is around them; about 1,000 rows, each of which is at most 2 KB.
MAX_PIECE = MAX_HEADER // 2

#: Containers of which is told what they use; each takes 1 KB at the most (``clipped``).
MAX_CONTAINERS = 64

#: How long the last words to each client may take when the agent ends, seconds.
FAREWELL = 1.0

#: What a handler returns, and what an event says, is in a link's buffer some steps of the scheduler later;
#: a goodbye before that would overtake it. Seconds.
SETTLE = 0.05


@dataclass(frozen=True, slots=True)
class Answers:
    """What the instance says when it is asked; the server only carries it."""

    status: Callable[[], Awaitable[InstanceStatus]]
    forwards: Callable[[], Forwards]
    stop: Callable[[StopInstance], Awaitable[None]]
    dial: Dial
    mounts: Callable[[], Awaitable[Mounts]]
    add_mounts: Callable[[Sequence[MountSpec]], Awaitable[Mounts]]
    port_settings: Callable[[], PortSettings]
    change_ports: Callable[[ChangePorts], PortSettings]
    sockets: Callable[[], Awaitable[SocketRows]]
    change_sockets: Callable[[ChangeSocketForwards], Awaitable[SocketRows]]
    owners: Callable[[], Awaitable[list[Owner]]]
    disk: Callable[[], Awaitable[Disk]]
    change_disk: Callable[[int], Awaitable[Disk]]
    compact_disk: Callable[[], Awaitable[Disk]]
    usage: Callable[[], Awaitable[Usage]]
    reload: Callable[[], Awaitable[list[str]]]
    remove_mounts: Callable[[Sequence[str]], Awaitable[Mounts]]
    view: Callable[[], Awaitable[View]]
    start_view: Callable[[str, str], Awaitable[View]]
    end_view: Callable[[], Awaitable[View]]


class _Listing:
    """The table of forwards for one client: all pieces are of the moment at which it asked for the first."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._rows: list[Forward] = []

    async def answer(self, request: GetForwards) -> Forwards:
        """The rows from ``request.offset`` on, as many as fit, but at least one if there is one."""
        await trio.lowlevel.checkpoint()
        if request.offset == 0:
            owners = await self._answers.owners() if request.owners else []
            self._rows = named(self._answers.forwards().forwards, owners)
        total = len(self._rows)
        if not 0 <= request.offset <= total:
            raise RpcError(ErrorCode.INVALID, f"the table has {total} rows, so none at {request.offset}")
        end, size = request.offset, 0
        while end < total:
            size += _encoded_size(self._rows[end])
            if size > MAX_PIECE and end > request.offset:
                break
            end += 1
        return Forwards(self._rows[request.offset : end], total)


def _encoded_size(row: Forward) -> int:
    """Bytes of ``row`` on the wire, and the few of a frame's prefix."""
    return sum(map(len, encode_frame(codec.encode(row))))


def _presentable(status: InstanceStatus) -> InstanceStatus:
    """``status`` with all that the guest may have a word in cut to a length that fits."""
    return replace(
        status,
        detail=clip(status.detail),
        hint=clip(status.hint),
        guest_digest=clip(status.guest_digest),
        warnings=[clip(warning) for warning in status.warnings],
        guest=None if status.guest is None else _presentable_guest(status.guest),
        attached=None if status.attached is None else _presentable_machine(status.attached),
    )


def _presentable_machine(machine: Attachment) -> Attachment:
    return replace(
        machine,
        reason=clip(machine.reason),
        hint=clip(machine.hint),
        user=clip(machine.user),
        python=clip(machine.python),
        mounting=clip(machine.mounting),
        ports=clip(machine.ports),
    )


def _presentable_guest(guest: GuestInfo) -> GuestInfo:
    return replace(guest, kernel=clip(guest.kernel), port_detection=clip(guest.port_detection))


def _presentable_usage(usage: Usage) -> Usage:
    """``usage`` with a list of containers that fits, and names that do."""
    if usage.guest is None:
        return usage
    listed = usage.guest.containers[:MAX_CONTAINERS]
    named = [replace(each, id=clipped(each.id), name=clipped(each.name)) for each in listed]
    return replace(usage, guest=replace(usage.guest, load=usage.guest.load[:3], containers=named))


class ApiServer:
    """Serves every client that connects, until cancelled."""

    def __init__(self, path: Path, answers: Answers, events: EventLog) -> None:
        self._path = path
        self._answers = answers
        self._events = events
        self._links: set[Link] = set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen; started when clients can connect. The path is unlinked at the end."""
        listener = listen_unix(self._path)
        try:
            async with trio.open_nursery() as clients:
                task_status.started()
                await trio.serve_listeners(self._serve, [listener], handler_nursery=clients)
        finally:
            self._path.unlink(missing_ok=True)

    async def farewell(self, reason: str) -> None:
        """Let every client have what was still to be said to it, then part in good order."""
        await trio.sleep(SETTLE)
        with trio.move_on_after(FAREWELL):
            async with trio.open_nursery() as nursery:
                for link in tuple(self._links):
                    nursery.start_soon(_part, link, reason)

    async def _serve(self, transport: trio.abc.Stream) -> None:
        service = Service()
        link = Link(transport, Role.SERVER, service, hello("agentctl-host"))
        try:
            with collapsed():
                async with trio.open_nursery() as nursery:
                    self._register(service, link, nursery)
                    await nursery.start(self._live, link)
                    self._links.add(link)
        except LinkError as error:
            logger.debug("client left: %s", error)
        finally:
            self._links.discard(link)

    async def _live(self, link: Link, task_status: trio.TaskStatus[Link]) -> None:
        await link.run(task_status)
        # In good order; whoever was sending events to this client can stop.
        raise LinkClosed("the client has left")

    def _register(self, service: Service, link: Link, nursery: trio.Nursery) -> None:
        async def status(_: GetStatus) -> InstanceStatus:
            return _presentable(await self._answers.status())

        async def usage(_: GetUsage) -> Usage:
            return _presentable_usage(await self._answers.usage())

        async def stop(request: StopInstance) -> Done:
            await self._answers.stop(request)
            return Done()

        async def mounts(_: GetMounts) -> Mounts:
            return await self._answers.mounts()

        async def add_mounts(request: AddMounts) -> Mounts:
            try:
                return await self._answers.add_mounts(request.mounts)
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None
            except OSError as error:
                raise RpcError(ErrorCode.DENIED, f"the list of mounts could not be saved: {error}") from None

        async def remove_mounts(request: RemoveMounts) -> Mounts:
            try:
                return await self._answers.remove_mounts(request.guest_paths)
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None
            except OSError as error:
                raise RpcError(ErrorCode.DENIED, f"the list of mounts could not be saved: {error}") from None

        async def sockets(_: GetSocketForwards) -> SocketRows:
            return await self._answers.sockets()

        async def change_sockets(request: ChangeSocketForwards) -> SocketRows:
            try:
                return await self._answers.change_sockets(request)
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None
            except OSError as error:
                raise RpcError(ErrorCode.DENIED, f"the list of sockets could not be saved: {error}") from None

        async def port_settings(_: GetPortSettings) -> PortSettings:
            await trio.lowlevel.checkpoint()
            return self._answers.port_settings()

        async def change_ports(request: ChangePorts) -> PortSettings:
            await trio.lowlevel.checkpoint()
            try:
                return self._answers.change_ports(request)
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None
            except OSError as error:
                raise RpcError(ErrorCode.DENIED, f"the rules could not be saved: {error}") from None

        async def disk(_: GetDisk) -> Disk:
            try:
                return await self._answers.disk()
            except UserError as error:
                raise RpcError(ErrorCode.UNSUPPORTED, error.message, error.hint) from None

        async def change_disk(request: ChangeDisk) -> Disk:
            try:
                return await self._answers.change_disk(request.size)
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None
            except OSError as error:
                raise RpcError(ErrorCode.DENIED, f"the disk's size could not be saved: {error}") from None

        async def compact_disk(_: CompactDisk) -> Disk:
            try:
                return await self._answers.compact_disk()
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None

        async def reload(_: ReloadSettings) -> SettingsReloaded:
            try:
                return SettingsReloaded([clip(note) for note in await self._answers.reload()])
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None
            except OSError as error:
                raise RpcError(ErrorCode.DENIED, f"the settings could not be kept: {error}") from None

        async def view(_: GetView) -> View:
            return await self._answers.view()

        async def start_view(request: StartView) -> View:
            try:
                return await self._answers.start_view(request.path, request.owner)
            except UserError as error:
                raise RpcError(ErrorCode.INVALID, error.message, error.hint) from None

        async def end_view(_: EndView) -> View:
            return await self._answers.end_view()

        async def subscribe(request: Subscribe) -> Done:
            await nursery.start(self._send_events, link, nursery.cancel_scope, request.only_new)
            return Done()

        service.on_request(GetStatus, status)
        service.on_request(GetUsage, usage)
        service.on_request(GetForwards, _Listing(self._answers).answer)
        service.on_request(GetMounts, mounts)
        service.on_request(AddMounts, add_mounts)
        service.on_request(RemoveMounts, remove_mounts)
        service.on_request(GetPortSettings, port_settings)
        service.on_request(ChangePorts, change_ports)
        service.on_request(GetSocketForwards, sockets)
        service.on_request(ChangeSocketForwards, change_sockets)
        service.on_request(GetDisk, disk)
        service.on_request(ChangeDisk, change_disk)
        service.on_request(CompactDisk, compact_disk)
        service.on_request(ReloadSettings, reload)
        service.on_request(GetView, view)
        service.on_request(StartView, start_view)
        service.on_request(EndView, end_view)
        service.on_request(StopInstance, stop)
        service.on_request(Subscribe, subscribe)
        for kind in (Exec, DialTcp, DialName):
            service.on_stream(kind, self._relay)

    async def _send_events(
        self, link: Link, client: trio.CancelScope, only_new: bool, task_status: trio.TaskStatus[None]
    ) -> None:
        sender, receiver = trio.open_memory_channel[Event](MAX_BEHIND)

        def on_event(event: Event) -> None:
            try:
                sender.send_nowait(event)
            except trio.WouldBlock:
                # Rather none at all than one that has holes and does not know.
                client.cancel()

        remembered = self._events.subscribe(on_event)
        try:
            task_status.started()
            for event in () if only_new else remembered:
                await link.notify(event)
            async for event in receiver:
                await link.notify(event)
        finally:
            self._events.unsubscribe(on_event)

    async def _relay(self, target: Target, incoming: Incoming) -> None:
        """A process or a connection in the guest: the guest's stream and the client's, end to end."""
        try:
            guest = await self._answers.dial(target)
        except OpenRefused as error:
            await incoming.refuse(error.code, error.message, error.hint)
            return
        except LinkError as error:
            await incoming.refuse(ErrorCode.UNREACHABLE, str(error), "see: agentctl status")
            return
        try:
            client = await incoming.accept()
        except BaseException:
            # The client has gone meanwhile; what was started for it goes, too.
            await abort(guest, ErrorCode.CANCELLED, "the client has left")
            raise
        await splice(client, guest)


async def _part(link: Link, reason: str) -> None:
    # It may have left in this very moment.
    with contextlib.suppress(LinkError):
        await link.goodbye(reason)
