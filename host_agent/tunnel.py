"""``agentctl tunnel``: a SOCKS5 proxy on localhost whose connections are made in the VM.

So whatever the guest reaches, the containers' own addresses above all, is reached from here without a route, a
network device or any right. The law: the proxy is this process and nothing else; each connection is a stream of its
session with the host agent, and when the process ends, for whatever reason, so do they all.

A host agent that is killed is waited for; clients that come meanwhile wait, too.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections.abc import Awaitable, Callable

import trio

from host_agent import socks
from host_agent.client import RESTART_TIME, ConnectionLost, connected
from host_agent.errors import ExitCode, UserError
from host_agent.forwarders import EXHAUSTED_PAUSE, listen_localhost
from host_agent.groups import collapsed
from host_agent.paths import InstancePaths
from protocol.api import DialName, DialTcp, Target
from protocol.errors import ErrorCode, LinkError, OpenRefused
from protocol.link import Link
from protocol.muxstream import MuxStream
from protocol.pump import pump
from protocol.splice import abort

logger = logging.getLogger(__name__)

#: A quarter of the link's streams: the ports and Docker need theirs, too. Further clients wait in the backlog.
MAX_CONNECTIONS = 512

#: How long a client may take to say what it wants, seconds. It is a program of this machine, and nobody types.
NEGOTIATION_TIME = 10.0

#: How long a connection may take, seconds: a guest agent that is being started again (20), then the connect (15),
#: each of which says better than we could why it failed.
DIAL_TIME = 40.0

#: Between two attempts to reach a host agent that hangs up at once, seconds.
RECONNECT_DELAY = 0.1

#: Bytes read at a time from a client that negotiates.
CHUNK = 4096

# Opens a stream to a target in the guest. Raises OpenRefused.
DialGuest = Callable[[Target], Awaitable[MuxStream]]


class Proxy:
    """Serves SOCKS5 clients with connections that ``dial`` makes."""

    def __init__(self, dial: DialGuest) -> None:
        self._dial = dial
        self._slots = trio.Semaphore(MAX_CONNECTIONS)

    async def serve(self, listener: trio.SocketListener, clients: trio.Nursery) -> None:
        """Accept until cancelled; each client is a task of ``clients``."""
        while True:
            await self._slots.acquire()
            try:
                client = await listener.accept()
            except OSError as error:
                # Out of descriptors or memory, which others must give back first.
                self._slots.release()
                logger.warning("cannot accept: %s", error.strerror)
                await trio.sleep(EXHAUSTED_PAUSE)
                continue
            clients.start_soon(self._carry, client)

    async def _carry(self, client: trio.SocketStream) -> None:
        try:
            if (request := await self._negotiate(client)) is not None:
                await self._connect(client, request)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("connection not carried: %s", error)
        finally:
            # Without effect where it was carried to its end, or refused.
            await abort(client, ErrorCode.RESET, "not carried")
            self._slots.release()

    async def _negotiate(self, client: trio.SocketStream) -> socks.Connect | None:
        """What the client wants; None if it has left, took too long or was refused."""
        negotiation = socks.Negotiation()
        with trio.move_on_after(NEGOTIATION_TIME):
            while data := await client.receive_some(CHUNK):
                for event in negotiation.receive(bytes(data)):
                    match event:
                        case socks.Send(answer):
                            await client.send_all(answer)
                        case socks.Refuse(answer, reason):
                            logger.info("client refused: %s", reason)
                            await _refuse(client, answer)
                            return None
                        case socks.Connect():
                            return event
        return None

    async def _connect(self, client: trio.SocketStream, request: socks.Connect) -> None:
        address = DialTcp if request.numeric else DialName
        try:
            stream = await self._dial(address(request.host, request.port))
        except OpenRefused as error:
            logger.info("%s", error.message)
            await _refuse(client, socks.reply(socks.reply_code(error.code)))
            return
        try:
            await client.send_all(socks.reply(socks.ReplyCode.SUCCEEDED))
            if request.early:
                await stream.send_all(request.early)
            await pump(stream, client)
        finally:
            await abort(stream, ErrorCode.RESET, "the client has gone")


async def _refuse(client: trio.SocketStream, answer: bytes) -> None:
    """The answer, and an end of file behind it: a reset could overtake it."""
    await client.send_all(answer)
    await client.send_eof()
    with trio.move_on_after(NEGOTIATION_TIME):
        while await client.receive_some(CHUNK):
            pass
    await client.aclose()


class Session:
    """The session with the host agent, and the next one when that one is lost."""

    def __init__(self, paths: InstancePaths) -> None:
        self._paths = paths
        self._link: Link | None = None
        self._changed = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started when there is one. Raises ``UserError`` when the instance is not there any more."""
        started = False
        while True:
            try:
                async with connected(self._paths, patience=RESTART_TIME) as link:
                    self._publish(link)
                    if not started:
                        started = True
                        task_status.started()
                    await trio.sleep_forever()
            except ConnectionLost as error:
                logger.info("%s", error)
            finally:
                self._publish(None)
            await trio.sleep(RECONNECT_DELAY)

    def _publish(self, link: Link | None) -> None:
        self._link = link
        self._changed.set()
        self._changed = trio.Event()

    async def dial(self, target: Target) -> MuxStream:
        """A stream to ``target``, of this session or, if that is lost, the next. Raises ``OpenRefused``."""
        while True:
            if (link := self._link) is None:
                await self._changed.wait()
                continue
            try:
                return await link.open(target, timeout=DIAL_TIME)
            except LinkError:
                if self._link is link:
                    self._publish(None)


def listen(port: int) -> list[trio.SocketListener]:
    """Listen on ``port`` of localhost. Raises ``UserError``."""
    try:
        return listen_localhost(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"another program listens on port {port} of localhost"
        elif error.errno == errno.EACCES:
            message = f"you may not listen on port {port}"
        else:
            message = f"port {port} of localhost: {error.strerror}"
        raise UserError(message, "choose another: agentctl tunnel --port N", ExitCode.BUSY) from None


async def run(paths: InstancePaths, port: int, on_ready: Callable[[], None]) -> None:
    """Serve on ``port`` of localhost until SIGINT or SIGTERM. ``on_ready`` is called when clients can connect.

    Raises ``UserError``: the instance does not run (any more), or the port cannot be had.
    """
    session = Session(paths)
    with collapsed():
        async with trio.open_nursery() as nursery:
            await nursery.start(_end_on_signal, nursery.cancel_scope)
            await nursery.start(session.run)
            listeners = listen(port)
            on_ready()
            proxy = Proxy(session.dial)
            try:
                for listener in listeners:
                    nursery.start_soon(proxy.serve, listener, nursery)
                await trio.sleep_forever()
            finally:
                for listener in listeners:
                    listener.socket.close()


async def _end_on_signal(scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        task_status.started()
        async for _ in received:
            scope.cancel()
