"""Sockets of the guest that lead to the host: the agent listens, each connection is a stream to the host.

The law: the list is the host's, and replaced as a whole; what is on it stays open over sessions, what is not is closed
and its socket's name removed, as are all when the agent ends. A client that comes while there is no session waits
``PATIENCE`` for one, and is then hung up on; no client is left hanging for longer, and one that leaves has left. A
socket belongs to the default user and is nobody else's to connect to. Each time the host says its list, what has lost
its name has it again, and what could not be opened is tried.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from guest_agent.spawn import Account
from protocol.api import DialHost, HostEntrances, OpenHostEntrances
from protocol.errors import ErrorCode, LinkError, OpenRefused, RpcError
from protocol.link import Link, Service
from protocol.pump import pump
from protocol.splice import abort

log = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds that a client waits for a session: as long as clients of the host's ports do."""

LOOK = 1.0
"""How often a client that waits is looked at, whether it has gone, in seconds."""

MAX_ENTRANCES = 72
"""Each takes a descriptor, and a task. The user may ask for 64 (host_agent.socket_rules); the others are agentctl's."""

MAX_CONNECTIONS = 256
"""Of all entrances together, an eighth of the link's streams. Further clients wait in the backlog."""

MAX_UNIX_PATH = 107
"""Bytes of sockaddr_un.sun_path without the final NUL (unix(7)); a longer name could be made, and never reached."""

BACKLOG = 128

EXHAUSTED_PAUSE = 0.2
"""Seconds to leave clients in the backlog when descriptors or memory ran out."""

MAX_REASON = 200
"""Characters of a reason, so that all of them fit into one answer."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A socket that is listened on. ``identity`` is its device and inode number."""

    path: str
    listener: trio.SocketListener
    identity: tuple[int, int] | None

    def in_place(self) -> bool:
        """Whether who looks for it still finds it."""
        return self.identity is not None and self.identity == _identity(self.path)

    def unlink(self) -> None:
        """Remove the name, before the listener is closed: who finds it finds somebody who listens."""
        if self.in_place():
            with suppress(OSError):
                os.unlink(self.path)

    def close(self) -> None:
        self.unlink()
        self.listener.socket.close()


class Entrances:
    """All of them; outlives sessions. ``account`` is asked who the default user is."""

    def __init__(self, account: Callable[[], Account]) -> None:
        self._account = account
        self._open: dict[str, _Opened] = {}
        self._reasons: dict[str, str] = {}
        self._clients: trio.Nursery | None = None
        self._link: Link | None = None
        self._changed = trio.Event()
        self._replacing = trio.Lock()
        self._slots = trio.Semaphore(MAX_CONNECTIONS)

    def register(self, service: Service) -> None:
        """Answer ``OpenHostEntrances`` on a link."""
        service.on_request(OpenHostEntrances, self.replace)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then all are closed."""
        try:
            async with trio.open_nursery() as self._clients:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._clients = None
            for opened in self._open.values():
                opened.close()
            self._open.clear()

    @contextmanager
    def session(self, link: Link) -> Iterator[None]:
        """Within the block connections go through ``link``."""
        self._publish(link)
        try:
            yield
        finally:
            if self._link is link:
                self._publish(None)

    def _publish(self, link: Link | None) -> None:
        self._link = link
        self._changed.set()
        self._changed = trio.Event()

    async def replace(self, request: OpenHostEntrances) -> HostEntrances:
        """Open what is new, close what is not on the list. Raises ``RpcError`` for a list that cannot be."""
        wanted = request.paths
        if len(wanted) > MAX_ENTRANCES:
            raise RpcError(ErrorCode.LIMIT, f"{len(wanted)} entrances; {MAX_ENTRANCES} are possible")
        # In threads: a path may lead through a folder of the host's, which may be slow.
        async with self._replacing:
            for path, opened in list(self._open.items()):
                if path not in wanted or not await trio.to_thread.run_sync(opened.in_place):
                    await trio.to_thread.run_sync(opened.unlink)
                    self._open.pop(path, None)  # unless the agent has ended meanwhile
                    opened.listener.socket.close()
            reasons = await self._open_all([path for path in wanted if path not in self._open])
            for path, reason in reasons.items():
                if self._reasons.get(path) != reason:
                    log.info("entrance.failed path=%r reason=%s", path, reason)
            self._reasons = reasons
            return HostEntrances(reasons)

    async def _open_all(self, paths: Sequence[str]) -> dict[str, str]:
        """Why some of them are not open."""
        reasons: dict[str, str] = {}
        for path in paths:
            try:
                opened = await trio.to_thread.run_sync(_listen, path, self._account())
            except (OSError, ValueError, KeyError) as error:
                reasons[path] = _reason(error)[:MAX_REASON]
                continue
            if self._clients is None:
                opened.close()
                raise RpcError(ErrorCode.CANCELLED, "the guest agent ends")
            self._open[path] = opened
            self._clients.start_soon(self._serve, opened, self._clients)
        return reasons

    async def _serve(self, opened: _Opened, clients: trio.Nursery) -> None:
        while True:
            await self._slots.acquire()
            try:
                client = await opened.listener.accept()
            except trio.ClosedResourceError:
                self._slots.release()
                return
            except OSError as error:
                # Out of descriptors or memory, which others must give back first.
                self._slots.release()
                log.warning("entrance.accept path=%r error=%s", opened.path, error.strerror)
                await trio.sleep(EXHAUSTED_PAUSE)
                continue
            clients.start_soon(self._carry, client, opened.path)

    async def _carry(self, client: trio.SocketStream, entrance: str) -> None:
        try:
            with trio.move_on_after(PATIENCE) as waiting:
                while (link := await self._session_for(client)) is not None:
                    try:
                        stream = await link.open(DialHost(entrance))
                    except LinkError:  # the next session may be better
                        if self._link is link:
                            self._publish(None)
                        continue
                    waiting.deadline = math.inf
                    await pump(stream, client)
                    return
        except OpenRefused as error:
            log.info("entrance.refused path=%r reason=%s", entrance, error.message)
        finally:
            # Without effect where it was carried to its end.
            await abort(client, ErrorCode.REFUSED, "not carried")
            self._slots.release()

    async def _session_for(self, client: trio.SocketStream) -> Link | None:
        """The session of now, or the next; None if the client has gone before."""
        while self._link is None:
            with trio.move_on_after(LOOK):
                await self._changed.wait()
            if self._link is None and _gone(client.socket.fileno()):
                return None
        return self._link


def _listen(path: str, owner: Account) -> _Opened:
    """Raises ``OSError``; ``ValueError`` for what cannot be listened on."""
    if not os.path.isabs(path) or "\0" in path:
        raise ValueError("the path of a socket is absolute")
    if (length := len(os.fsencode(path))) > MAX_UNIX_PATH:
        raise ValueError(f"its path is too long: {length} bytes, of which the system allows {MAX_UNIX_PATH}")
    sock = _bound_socket(path, owner)
    sock.setblocking(False)
    return _Opened(path, trio.SocketListener(trio.socket.from_stdlib_socket(sock)), _identity(path))


def _bound_socket(path: str, owner: Account) -> socket.socket:
    """A listening socket at ``path``, in place of one that nobody listens at any more.

    It has its mode, its owner and its listener before it has its name: nobody else can connect, at no moment.
    """
    _check_free(path)
    _make_folders(os.path.dirname(path))
    temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}")
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind(2) gives the file the mode of the socket, less the umask
        with _as_address(temporary) as address:
            sock.bind(address)
        if os.geteuid() == 0:
            os.chown(temporary, owner.uid, owner.gid, follow_symlinks=False)
        sock.listen(BACKLOG)
        os.rename(temporary, path)
    except OSError:
        sock.close()
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return sock


@contextmanager
def _as_address(path: str) -> Iterator[str]:
    """What bind(2) takes for ``path``: one that is too long by a few bytes is named through its folder."""
    if len(os.fsencode(path)) <= MAX_UNIX_PATH:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def _gone(descriptor: int) -> bool:
    """Whether the other end of a unix socket is closed, and has left nothing to be read. To have ended what it sends
    is not enough: it may wait for an answer."""
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLHUP for _, events in poll.poll(0)):
        return False
    unread: tuple[int] = struct.unpack("=i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return unread == (0,)


def _check_free(path: str) -> None:
    """Raise ``ValueError`` unless a socket may be put at ``path``."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ValueError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody has it open
    raise ValueError(f"another process listens at {path}")


def _make_folders(path: str) -> None:
    """The folders on the way that are missing; each belongs to whom the one belongs that it is in."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_folders(parent)
    os.mkdir(path, 0o755)
    owner = os.stat(parent)
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _reason(error: OSError | ValueError | KeyError) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return str(error.args[0] if error.args else error)  # a KeyError quotes itself
    return os.strerror(error.errno)
