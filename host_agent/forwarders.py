"""Sockets of the host whose connections are carried into the guest, and the task that keeps them right.

``host_agent.forwards`` decides, this module does: it binds, accepts, dials the guest and splices. Its laws:

- A port is bound on 127.0.0.1 and ::1, or not at all.
- Closing a forwarder closes its listening sockets at once; established connections end by themselves.
- A connection that cannot be carried is reset, never left hanging; a failed one costs itself and no other.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from host_agent.errors import UserError
from host_agent.forwards import Change, ClosePort, Effect, ForwardTable, OpenPort
from protocol.api import Event, Forward, Listeners, Target
from protocol.errors import AgentctlProtocolError, ErrorCode, LinkError, OpenRefused
from protocol.lane import READABLE, Lane
from protocol.link import OnOpened
from protocol.muxstream import MuxStream
from protocol.pump import Pump, detached, pump, reset
from protocol.splice import Spliced, abort, splice

# Opens a stream to a target in the guest. Raises OpenRefused or LinkError; whether it waits for a link that
# is just being re-established, and for how long, is its own business.
Dial = Callable[[Target], Awaitable[trio.abc.HalfCloseableStream]]
# The same for who cannot wait: tells how it went, or returns False.
DialNow = Callable[[Target, OnOpened], bool]
# What to dial for the next connection, best first.
Targets = Callable[[], Sequence[Target]]
Listen = Callable[[int], list[trio.SocketListener]]
# A client as the guest is to hear it: the stream itself, or one that wraps it.
SeenAs = Callable[[trio.SocketStream], trio.abc.HalfCloseableStream]

# Half of the link's streams: one busy port may not starve all others. Further clients wait in the backlog.
MAX_CONNECTIONS = 1024
# Room for a burst while the accepting task is busy. The kernel cuts it to net.core.somaxconn (often 4096).
BACKLOG = 1024
# Clients accepted in a row, before others have their turn.
BURST = 16
# How long to leave clients in the backlog when descriptors or memory ran out, in seconds: no busy loop.
EXHAUSTED_PAUSE = 0.2
# sockaddr_un.sun_path has 108 bytes including the final NUL (unix(7)); macOS has 104.
MAX_UNIX_PATH = 107

_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})
# The answers of a listener that is not there any more: another one that shares the port may be.
_TRY_NEXT = frozenset({ErrorCode.REFUSED, ErrorCode.UNREACHABLE, ErrorCode.NOT_FOUND})

logger = logging.getLogger(__name__)


def listen_localhost(port: int) -> list[trio.SocketListener]:
    """Listen on ``port`` of 127.0.0.1 and ::1 (where the host has it): on all of them or on none.

    SO_REUSEADDR is needed to take a port whose last connections are in TIME_WAIT. On Linux it does not let
    two sockets listen on overlapping addresses: a wildcard listener of another program still is EADDRINUSE,
    and of two sockets that are bound but do not listen yet, the second ``listen`` is.

    Raises:
        OSError: with EADDRINUSE, EACCES, EMFILE and so on; nothing is left open.
    """
    sockets: list[socket.socket] = []
    try:
        sockets.append(_bound(socket.AF_INET, "127.0.0.1", port))
        try:
            sockets.append(_bound(socket.AF_INET6, "::1", port))
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
        # Listen only when both are bound, or a client of the first would be cut off when the second fails.
        for sock in sockets:
            sock.listen(BACKLOG)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return [_listener(sock) for sock in sockets]


def listen_unix(path: Path) -> trio.SocketListener:
    """Listen on a unix socket that only its owner may connect to, in place of a stale one if there is one.

    The socket gets its mode before it listens and its name after, so there is no moment at which a stranger
    could connect or the name leads nowhere.

    Raises:
        UserError: somebody answers at ``path``, something else than a socket is there, or it is too long.
        OSError: it cannot be created.
    """
    _check_unix_path(path)
    # Not longer than any reasonable socket name; the instance's lock keeps a second process away.
    temporary = path.with_name(f".{os.getpid()}")
    temporary.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(temporary))
        temporary.chmod(0o600)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError:
        sock.close()
        temporary.unlink(missing_ok=True)
        raise
    return _listener(sock)


class Connections:
    """Those that are carried without a task of their own, and clients for whom a stream is being opened."""

    def __init__(self) -> None:
        self._pumps: set[Pump] = set()
        self._waiting: set[socket.socket] = set()
        self._closed = False

    def wait(self, client: socket.socket) -> None:
        """``client`` waits for an answer, of which ``answered`` tells."""
        self._waiting.add(client)

    def answered(self, client: socket.socket) -> bool:
        """Whether it is to be carried on; if not, it has been reset."""
        self._waiting.discard(client)
        return not self._closed

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
        for client in self._waiting:
            reset(client)
        self._waiting.clear()


class Forwarder:
    """Accepts on some listening sockets and carries each connection to a target in the guest.

    With ``dial_now`` no task is needed for a connection that is accepted there at once; ``carried`` has those then.
    With ``lane``, the link's, clients are accepted there.
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
    ) -> None:
        self._lane = lane
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

    def close(self) -> None:
        """Stop listening, now; the next client is refused by the kernel."""
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
                    self._slots.acquire_nowait()
                    try:
                        client, _ = acceptor.accept()
                    except OSError:
                        self._slots.release()
                        raise
                    self._begin(client, connections)
            except BlockingIOError:
                pass
            except (trio.WouldBlock, OSError):
                lane.forget(descriptor)
                lane.stop()
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

    def _begin(self, client: socket.socket, connections: trio.Nursery) -> None:
        """Carry a client, for which there is a slot; at once, if that needs no task."""
        client.setblocking(False)
        if self._dial_now is None or not (targets := self._targets()):
            self._start_task(client, connections)
            return

        def on_answer(answer: MuxStream | OpenRefused | LinkError) -> None:
            if not self._carried.answered(client):
                self._slots.release()
                if isinstance(answer, MuxStream):
                    answer.cut(ErrorCode.RESET, "the forwarder ends")
            elif isinstance(answer, MuxStream):
                _no_delay(client)
                self._carried.carry(answer, client, self._slots.release)
            else:  # there may be another target, or another session soon
                self._start_task(client, connections)

        self._carried.wait(client)
        if not self._dial_now(targets[0], on_answer):
            self._carried.answered(client)
            self._start_task(client, connections)

    def _start_task(self, client: socket.socket, connections: trio.Nursery) -> None:
        if self._lane is not None:
            self._lane.stop()
        try:
            connections.start_soon(self._carry, trio.SocketStream(trio.socket.from_stdlib_socket(client)))
        except RuntimeError:  # the nursery is over, and so is all that is forwarded
            reset(client)
            self._slots.release()

    async def _carry(self, client: trio.SocketStream) -> None:
        try:
            async with await self._connect() as remote:
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
            self._slots.release()

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
    """A unix socket of the host that leads to ``target`` in the guest, such as Docker's."""

    def __init__(self, path: Path, target: Target, dial: Dial, *, seen_as: SeenAs | None = None) -> None:
        self.path = path
        self._target = target
        self._dial = dial
        self._seen_as = seen_as

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled, then unlink the path. Started when clients can connect.

        Raises what ``listen_unix`` raises.
        """
        listener = listen_unix(self.path)
        identity = _identity(self.path)
        forwarder = Forwarder([listener], lambda: (self._target,), self._dial, seen_as=self._seen_as)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                await forwarder.serve(nursery)
        finally:
            # Unlink before closing: who finds the name finds somebody who listens.
            if _identity(self.path) == identity:
                self.path.unlink(missing_ok=True)
            forwarder.close()


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
        listen: Listen = listen_localhost,
        dial_now: DialNow | None = None,
        lane: Lane | None = None,
    ) -> None:
        """``dial_now`` and ``lane`` are the link's, as for ``Forwarder``."""
        self._dial = dial
        self._dial_now, self._lane = dial_now, lane
        self._carried = Connections()
        self._publish = publish
        self._table = table or ForwardTable()
        self._listen = listen
        self._forwarders: dict[int, Forwarder] = {}
        self._connections: trio.Nursery | None = None
        self._changed = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every port is closed and every connection is reset."""
        try:
            async with trio.open_nursery() as self._connections:
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

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case OpenPort(port):
                    self._perform(self._open(port))
                case ClosePort(port):
                    self._forwarders.pop(port).close()
                case Change():
                    self._publish(_event(effect))
        self._changed.set()

    def _open(self, port: int) -> list[Effect]:
        assert self._connections is not None
        try:
            listeners = self._listen(port)
        except OSError as error:
            return self._table.bind_failed(port, error.errno or errno.EIO, trio.current_time())
        forwarder = Forwarder(
            listeners,
            lambda: self._table.targets(port),
            self._dial,
            dial_now=self._dial_now,
            carried=self._carried,
            lane=self._lane,
        )
        self._forwarders[port] = forwarder
        self._connections.start_soon(forwarder.serve, self._connections)
        return self._table.bound(port)


def _event(change: Change) -> Event:
    fields = {"port": str(change.port)} if change.port else {}
    if change.reason:
        fields["reason"] = change.reason
    return Event(time=time.time(), kind=change.kind, message=change.message, fields=fields)


def _bound(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def _no_delay(client: socket.socket) -> None:
    """As trio does it; a unix socket has no such thing."""
    with suppress(OSError):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _listener(sock: socket.socket) -> trio.SocketListener:
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _check_unix_path(path: Path) -> None:
    """Raise UserError unless a socket may be put at ``path``."""
    if (length := len(os.fsencode(path))) > MAX_UNIX_PATH:
        raise UserError(
            f"the socket path {path} is too long: {length} bytes, of which the system allows {MAX_UNIX_PATH}",
            hint="set AGENTCTL_HOME to a directory with a shorter path",
        )
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UserError(f"{path} exists and is not a socket", hint="move it away and try again")
    if _answers(path):
        raise UserError(f"another process listens on {path}", hint="stop it and try again")


def _answers(path: Path) -> bool:
    """Whether a connection to ``path`` is accepted. A full backlog counts: somebody has it open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
