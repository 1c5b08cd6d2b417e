"""Sockets of the host whose connections are carried into the guest, and the task that keeps them right.

``host_agent.forwards`` decides, this module does: it binds, accepts, dials the guest and splices. Its laws:

- A port is bound on both families (of localhost: 127.0.0.1 and ::1), or not at all.
- Closing a forwarder closes its listening sockets at once; established connections end by themselves.
- A connection that cannot be carried is reset, never left hanging; a failed one costs itself and no other.
- A unix socket whose name somebody takes away, as cleaners of /tmp do, has it again within ``LOOK`` seconds.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from host_agent.binding import as_listener, bind_all
from host_agent.errors import UserError
from host_agent.forwards import Change, ClosePort, Effect, ForwardTable, OpenPort
from host_agent.port_owner import PortOwners
from host_agent.rules import (
    LOCALHOST,
    Decision,
    HostAddress,
    HostEnd,
    HostSocket,
    Static,
)
from host_agent.udp_forwarder import Room, UdpForwarder, listen_udp
from host_agent.unix_listening import identity, listen_unix
from protocol.api import Event, Forward, Listener, Listeners, Proto, Target
from protocol.errors import AgentctlProtocolError, ErrorCode, LinkError, OpenRefused
from protocol.lane import READABLE, Lane
from protocol.link import OnOpened, SendEarly
from protocol.muxstream import MuxStream
from protocol.pump import Pump, detached, pump, reset
from protocol.splice import Spliced, abort, splice
from protocol.stream import EARLY

# Opens a stream to a target in the guest. Raises OpenRefused or LinkError; whether it waits for a link that
# is just being re-established, and for how long, is its own business.
Dial = Callable[[Target], Awaitable[trio.abc.HalfCloseableStream]]
# The same for who cannot wait: tells how it went, and takes what is to be said first meanwhile; or returns None.
DialNow = Callable[[Target, OnOpened], SendEarly | None]
# What to dial for the next connection, best first.
Targets = Callable[[], Sequence[Target]]
Listen = Callable[[HostAddress], list[trio.SocketListener]]
# A client as the guest is to hear it: the stream itself, or one that wraps it.
SeenAs = Callable[[trio.SocketStream], trio.abc.HalfCloseableStream]

# Half of the link's streams: one busy port may not starve all others. Further clients wait in the backlog.
MAX_CONNECTIONS = 1024
# Of all ports and sockets together: with the 512 of UDP's clients (udp_forwarder) 256 streams are left to Docker,
# shells and tunnels.
MAX_TOGETHER = 1280
# Room for a burst while the accepting task is busy. The kernel cuts it to net.core.somaxconn (often 4096).
BACKLOG = 1024
# Clients accepted in a row, before others have their turn.
BURST = 16
# How often a unix socket's name is looked for (2 µs each), and tried again where it cannot be had, in seconds.
LOOK = 5.0
RETRY = 1.0
# How long to leave clients in the backlog when descriptors or memory ran out, in seconds: no busy loop.
EXHAUSTED_PAUSE = 0.2

# The answers of a listener that is not there any more: another one that shares the port may be.
_TRY_NEXT = frozenset({ErrorCode.REFUSED, ErrorCode.UNREACHABLE, ErrorCode.NOT_FOUND})

logger = logging.getLogger(__name__)


def listen_tcp(host: HostAddress) -> list[trio.SocketListener]:
    """Listen at ``host``: on each address that it names (IPv6 where the host has it), or on none.

    On Linux SO_REUSEADDR does not let two sockets listen on overlapping addresses: a wildcard listener of another
    program still is EADDRINUSE, and of two sockets that are bound but do not listen yet, the second ``listen`` is.

    Raises:
        OSError: with EADDRINUSE, EACCES, EMFILE and so on; nothing is left open.
    """
    sockets = bind_all(host.address, host.port, socket.SOCK_STREAM)
    try:
        # Listen only when both are bound, or a client of the first would be cut off when the second fails.
        for sock in sockets:
            sock.listen(BACKLOG)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return [as_listener(sock) for sock in sockets]


def listen_localhost(port: int) -> list[trio.SocketListener]:
    """``listen_tcp`` on 127.0.0.1 and ::1."""
    return listen_tcp(HostAddress(Proto.TCP, LOCALHOST, port))


class Waiting:
    """A client for whom a stream is being opened. What it says first goes ahead, without waiting for the answer."""

    def __init__(self, client: socket.socket, lane: Lane | None) -> None:
        self.client = client
        self.said = b""
        self.broken = False
        self._lane = lane
        self._descriptor = client.fileno()

    def listen(self, send: SendEarly) -> None:
        """Pass the first words on with ``send``."""

        def on_readable(ready: int) -> None:
            self.end()
            try:
                self.said = self.client.recv(EARLY)
            except BlockingIOError:
                pass
            except OSError:  # of which the kernel tells once only
                self.broken = True
            if self.said:  # its end is still there for who carries it on
                send(self.said)

        if self._lane is not None:
            with suppress(OSError):  # then they wait
                self._lane.watch(self._descriptor, READABLE, on_readable)

    def end(self) -> None:
        """Listen no more."""
        if self._lane is not None:
            self._lane.forget(self._descriptor)


class Connections:
    """Those that are carried without a task of their own, and clients for whom a stream is being opened."""

    def __init__(self) -> None:
        self.places = trio.Semaphore(MAX_TOGETHER)
        """One for each connection of all forwarders that share this."""
        self._pumps: set[Pump] = set()
        self._waiting: set[Waiting] = set()
        self._closed = False

    def wait(self, waiting: Waiting) -> bool:
        """A client waits for an answer, of which ``answered`` tells; False if it was reset instead."""
        if self._closed:
            reset(waiting.client)
            return False
        self._waiting.add(waiting)
        return True

    def answered(self, waiting: Waiting) -> bool:
        """Whether it is to be carried on; if not, it has been reset."""
        if waiting not in self._waiting:
            return False
        self._waiting.remove(waiting)
        waiting.end()
        return True

    def carry(self, stream: MuxStream, client: socket.socket, on_end: Callable[[], None]) -> None:
        """Join the two, both of which this takes over; ``on_end`` is called when it is over."""

        def ended(_: Spliced) -> None:
            self._pumps.discard(carried)
            on_end()

        carried = Pump(stream, client, ended)
        self._pumps.add(carried)
        carried.start()

    def close(self) -> None:
        """Reset them all, and whatever is answered from now on."""
        self._closed = True
        for carried in list(self._pumps):
            carried.abort("the forwarder ends")
        for waiting in self._waiting:
            waiting.end()
            reset(waiting.client)
        self._waiting.clear()


class Forwarder:
    """Accepts on some listening sockets and carries each connection to a target in the guest.

    With ``dial_now`` no task is needed for a connection that is accepted there at once; ``carried`` has those then.
    With ``lane``, the link's, clients are accepted there. ``path``: the name of the unix socket it listens on.
    """

    def __init__(
        self,
        listeners: Sequence[trio.SocketListener],
        targets: Targets,
        dial: Dial,
        *,
        seen_as: SeenAs | None = None,
        dial_now: DialNow | None = None,
        carried: Connections | None = None,
        lane: Lane | None = None,
        path: Path | None = None,
    ) -> None:
        self._lane = lane
        self._path = path
        self._identity = None if path is None else identity(path)
        self._on_close: list[Callable[[], None]] = []
        self._dial_now = dial_now if seen_as is None else None
        self._carried = Connections() if carried is None else carried
        self._listeners = listeners
        self._targets = targets
        self._dial = dial
        self._seen_as = seen_as
        self._slots = trio.Semaphore(MAX_CONNECTIONS)

    async def serve(self, connections: trio.Nursery) -> None:
        """Accept until ``close``. Connections become tasks of ``connections`` and may outlive this call."""
        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(self._accept_from, listener, connections)

    def in_place(self) -> bool:
        """Whether who looks for its unix socket finds it. Ports are where they are."""
        if self._path is None:
            return True
        return self._identity is not None and identity(self._path) == self._identity

    def close(self) -> None:
        """Stop listening, now; the next client is refused by the kernel, and finds no name. Never raises."""
        # Unlink before closing: who finds the name finds somebody who listens. What cannot be reached any more stays.
        if self._path is not None and self.in_place():
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._identity = None  # from now on another file may have it
        for listener in self._listeners:
            if self._lane is not None:
                self._lane.forget(listener.socket.fileno())
            listener.socket.close()
        for wake in self._on_close:
            wake()

    async def _accept_from(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        while True:
            await self._slots.acquire()
            try:
                client = await listener.accept()
            except trio.ClosedResourceError:
                self._slots.release()  # for the other family's task, which has yet to see it
                return
            except OSError as error:
                # Out of descriptors or memory, which others must give back first.
                self._slots.release()
                logger.warning("cannot accept: %s", error.strerror)
                await trio.sleep(EXHAUSTED_PAUSE)
                continue
            try:
                await self._carried.places.acquire()
            except BaseException:
                await trio.aclose_forcefully(client)
                raise
            self._begin(detached(client), connections)
            await self._accept_in_lane(listener, connections)

    async def _accept_in_lane(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        """Return when there is something that needs a task: an error, too many connections, the end."""
        descriptor = listener.socket.fileno()
        if self._lane is None or self._dial_now is None or descriptor < 0:
            return
        wakeup = trio.Event()
        acceptor = socket.socket(fileno=descriptor)  # the same descriptor, without trio's turns

        def on_clients(ready: int) -> None:
            try:
                for _ in range(BURST):
                    self._acquire_nowait()
                    try:
                        client, _ = acceptor.accept()
                    except OSError:
                        self._release()
                        raise
                    self._begin(client, connections)
            except BlockingIOError:
                pass
            except (trio.WouldBlock, OSError):
                lane.forget(descriptor)
                wakeup.set()

        lane = self._lane
        self._on_close.append(wakeup.set)
        try:
            lane.watch(descriptor, READABLE, on_clients)
            await wakeup.wait()
        except OSError as error:
            logger.warning("clients are accepted by a task: %s", error.strerror)
        finally:
            self._on_close.remove(wakeup.set)
            acceptor.detach()
            if listener.socket.fileno() >= 0:
                lane.forget(descriptor)

    def _acquire_nowait(self) -> None:
        """A place for a connection. Raises ``trio.WouldBlock``."""
        self._slots.acquire_nowait()
        try:
            self._carried.places.acquire_nowait()
        except trio.WouldBlock:
            self._slots.release()
            raise

    def _release(self) -> None:
        self._slots.release()
        self._carried.places.release()

    def _begin(self, client: socket.socket, connections: trio.Nursery) -> None:
        """Carry a client, for which there is a place; at once, if that needs no task."""
        client.setblocking(False)
        if self._dial_now is None or not (targets := self._targets()):
            self._start_task(client, connections)
            return

        waiting = Waiting(client, self._lane)

        def on_answer(answer: MuxStream | OpenRefused | LinkError) -> None:
            if not self._carried.answered(waiting):
                self._release()
                if isinstance(answer, MuxStream):
                    answer.cut(ErrorCode.RESET, "the forwarder ends")
            elif waiting.broken or (waiting.said and isinstance(answer, LinkError)):
                # The client has gone; or nobody knows whether the guest has what it said, which must not be said twice.
                self._release()
                reset(client)
                if isinstance(answer, MuxStream):
                    answer.cut(ErrorCode.RESET, "the client has gone")
            elif isinstance(answer, MuxStream):
                _no_delay(client)
                self._carried.carry(answer, client, self._release)
            else:  # there may be another target, or another session soon
                self._start_task(client, connections, waiting.said)

        if not self._carried.wait(waiting):
            self._release()
        elif (send_early := self._dial_now(targets[0], on_answer)) is not None:
            waiting.listen(send_early)
        elif self._carried.answered(waiting):
            self._start_task(client, connections)

    def _start_task(self, client: socket.socket, connections: trio.Nursery, said: bytes = b"") -> None:
        """``said``: what was read from the client already."""
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            connections.start_soon(self._carry, stream, said)
        except RuntimeError:  # the nursery is over, and so is all that is forwarded
            reset(client)
            self._release()

    async def _carry(self, client: trio.SocketStream, said: bytes) -> None:
        try:
            async with await self._connect() as remote:
                if said:
                    await remote.send_all(said)
                if self._seen_as is None and isinstance(remote, MuxStream):
                    await pump(remote, client)
                else:
                    await splice(self._seen_as(client) if self._seen_as else client, remote)
        except (AgentctlProtocolError, trio.BrokenResourceError, OSError) as error:
            logger.debug("connection not carried: %s", error)
        except Exception:
            logger.exception("a forwarded connection failed")
        finally:
            # Without effect where the splice has closed it already; it may not have begun, or been cancelled.
            await abort(client, ErrorCode.REFUSED, "not carried")
            self._release()

    async def _connect(self) -> trio.abc.HalfCloseableStream:
        """The first target that answers. Raises what the last one that was tried said."""
        refusal = OpenRefused(ErrorCode.NOT_FOUND, "nothing listens there any more")
        for target in self._targets():
            try:
                return await self._dial(target)
            except OpenRefused as error:
                refusal = error
                if error.code not in _TRY_NEXT:
                    break
        raise refusal


class UnixForwarder:
    """A unix socket of the host that leads to ``target`` in the guest, such as Docker's.

    ``report`` is told why it cannot listen again after its name was taken away, and None when it can.
    """

    def __init__(
        self,
        path: Path,
        target: Target,
        dial: Dial,
        *,
        seen_as: SeenAs | None = None,
        carried: Connections | None = None,
        report: Callable[[UserError | OSError | None], None] | None = None,
    ) -> None:
        self.path = path
        self._target = target
        self._dial = dial
        self._seen_as = seen_as
        self._carried = carried
        self._report = report

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled, then unlink the path. Started when clients can connect.

        Raises what ``listen_unix`` raises, at first.
        """
        forwarder = self._forwarder()
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    nursery.start_soon(forwarder.serve, nursery)
                    while forwarder.in_place():
                        await trio.sleep(LOOK)
                    forwarder.close()
                    logger.info("%s is gone; listening there again", self.path)
                    forwarder = await self._another()
        finally:
            forwarder.close()

    def _forwarder(self) -> Forwarder:
        return Forwarder(
            [listen_unix(self.path)],
            lambda: (self._target,),
            self._dial,
            seen_as=self._seen_as,
            carried=self._carried,
            path=self.path,
        )

    async def _another(self) -> Forwarder:
        said = ""
        while True:
            try:
                forwarder = self._forwarder()
            except (UserError, OSError) as error:
                if str(error) != said:
                    logger.warning("cannot listen at %s: %s", self.path, error)
                said = str(error)
                if self._report is not None:
                    self._report(error)
                await trio.sleep(RETRY)
                continue
            if self._report is not None:
                self._report(None)
            return forwarder


class ForwardRunner:
    """Keeps the host's ports as a ``ForwardTable`` wants them, and tells the changes.

    Register ``on_listeners`` for the guest's notices and call ``link_lost`` when its session ends. Neither
    waits for anything; binding 4,096 ports takes 0.2 s.
    """

    def __init__(
        self,
        dial: Dial,
        publish: Callable[[Event], None],
        *,
        table: ForwardTable | None = None,
        listen: Listen = listen_tcp,
        owner: Callable[[HostAddress], str] | None = None,
        dial_now: DialNow | None = None,
        lane: Lane | None = None,
        carried: Connections | None = None,
    ) -> None:
        """``dial_now`` and ``lane`` are the link's, as for ``Forwarder``; ``owner`` says who has a port.

        ``carried`` is closed when it ends.
        """
        self._dial = dial
        self._dial_now, self._lane = dial_now, lane
        self._carried, self._room = carried or Connections(), Room()
        self._publish = publish
        self._table = table or ForwardTable()
        self._listen = listen
        self._owner = owner or PortOwners().owner
        self._forwarders: dict[HostEnd, Forwarder | UdpForwarder] = {}
        self._connections: trio.Nursery | None = None
        self._rules: tuple[Callable[[Listener], Decision], Iterable[Static]] | None = None
        self._changed = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every port is closed and every connection is reset."""
        try:
            async with trio.open_nursery() as self._connections:
                if self._rules is not None:
                    self._perform(self._table.change_rules(*self._rules))
                self._connections.start_soon(self._look_for_names)
                task_status.started()
                await self._keep_time()
        finally:
            self._connections = None
            self._carried.close()
            for forwarder in self._forwarders.values():
                forwarder.close()
            self._forwarders.clear()

    async def on_listeners(self, notice: Listeners) -> None:
        """Take in what the guest said about its listeners. Without effect while not running."""
        if self._connections is not None:
            self._perform(self._table.receive(notice, trio.current_time()))

    def change_rules(self, decide: Callable[[Listener], Decision], statics: Iterable[Static]) -> None:
        """Apply other rules, at once, or once it runs. Without effect on what is open and stays where it is."""
        if self._connections is not None:
            self._perform(self._table.change_rules(decide, statics))
        else:
            self._rules = decide, tuple(statics)

    def link_lost(self) -> None:
        """The guest's session is over: ports stay open until the next one says what listens."""
        self._table.link_lost()

    def rows(self) -> list[Forward]:
        """The state of every forward, for ``agentctl ports``; nothing is forwarded while not running."""
        return self._table.rows() if self._connections is not None else []

    async def _keep_time(self) -> None:
        while True:
            self._changed = trio.Event()
            deadline = self._table.deadline()
            with trio.move_on_at(math.inf if deadline is None else deadline):
                await self._changed.wait()
            self._perform(self._table.expire(trio.current_time()))

    async def _look_for_names(self) -> None:
        while True:
            await trio.sleep(LOOK)
            for host, forwarder in list(self._forwarders.items()):
                if isinstance(forwarder, Forwarder) and not forwarder.in_place():
                    logger.info("%s is gone; listening there again", host)
                    self._forwarders.pop(host).close()
                    self._perform(self._open(host))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case OpenPort(host):
                    self._perform(self._open(host))
                case ClosePort(host):
                    self._forwarders.pop(host).close()
                case Change():
                    self._publish(_event(effect))
        self._changed.set()

    def _open(self, host: HostEnd) -> list[Effect]:
        assert self._connections is not None
        now = trio.current_time()
        try:
            forwarder = self._forwarder(host)
        except UserError as error:  # something is at the path of a socket
            return self._table.bind_failed(host, errno.EADDRINUSE, now, error.message)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE and isinstance(host, HostAddress)
            owner = self._owner(host) if taken and isinstance(host, HostAddress) else ""
            return self._table.bind_failed(host, error.errno or errno.EIO, now, owner)
        self._forwarders[host] = forwarder
        self._connections.start_soon(forwarder.serve, self._connections)
        return self._table.bound(host)

    def _forwarder(self, host: HostEnd) -> Forwarder | UdpForwarder:
        if isinstance(host, HostAddress) and host.proto is Proto.UDP:
            if self._dial_now is None or self._lane is None:
                raise OSError(errno.EPROTONOSUPPORT, "datagrams need the link's lane")
            sockets = listen_udp(host.address, host.port)
            targets = partial(self._table.udp_targets, host)
            return UdpForwarder(sockets, targets, self._dial_now, self._lane, room=self._room)
        return Forwarder(
            [listen_unix(Path(host.path))] if isinstance(host, HostSocket) else self._listen(host),
            lambda: self._table.targets(host),
            self._dial,
            dial_now=self._dial_now,
            carried=self._carried,
            lane=self._lane,
            path=Path(host.path) if isinstance(host, HostSocket) else None,
        )


def _event(change: Change) -> Event:
    fields = {}
    match change.host:
        case HostAddress(proto, address, port):
            fields = {"port": str(port), "address": address, "proto": proto.value}
        case HostSocket(path):
            fields = {"path": path}
    if change.reason:
        fields["reason"] = change.reason
    return Event(time=time.time(), kind=change.kind, message=change.message, fields=fields)


def _no_delay(client: socket.socket) -> None:
    """As trio does it; a unix socket has no such thing."""
    with suppress(OSError):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
