"""Descriptors that outlive this process: copies of them are with the host agent, which hands them to the next one.

A file that has no name any more, and a lock, are lost when the last descriptor is closed, as it is when a process is
killed. So what a guest still has of such things is in ``host_agent.descriptor_store`` as well. The laws:
- A copy is on its way before the answer to the guest that makes it matter. What was sent survives us: it is in the
  kernel's queue of a socket that the host agent reads, also after our end.
- Nobody ever waits for the host agent. What its queue does not take is sent later; what the store has no room for
  is counted and logged, and would be lost with this process, as it would be without a store.
- Names say what is kept and are never used for something else during one run of the guest's kernel. A name that is
  given up is so for good or until the same is kept again; both ends see that in one order.

A message is a msgpack array of the names given up and of those kept, in this order, and the descriptors of the latter
(SCM_RIGHTS, unix(7)). Both ends send the same: what an earlier server had kept is in the socket when one is started.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from typing import Final, NamedTuple

import msgpack

logger = logging.getLogger(__name__)

MAX_KEPT: Final = 4096
"""Descriptors in the store. A guest that has more deleted files open, or locks, is a rare one."""

MAX_AT_ONCE: Final = 250
"""Descriptors in one message: the kernel takes 253 (SCM_MAX_FD)."""

MAX_GONE: Final = 1024
"""Names in one message that are given up."""

SEND_BUFFER: Final = 1 << 20
"""Bytes asked for; Linux grants 416 KiB, 500 messages of one descriptor."""

_GATHERED: Final = 64
"""Names given up that wait for another message to go with, for a second at most: most deleted files are forgotten at
once, and none of those is worth a system call and a look of the host agent's."""

_MAX_MESSAGE: Final = 64 << 10
"""Bytes: a name has at most 27."""


class What(IntEnum):
    """What a descriptor is of, and what the numbers in its name are."""

    NODE = 0  # node: O_PATH
    FLOCK = 1  # handle: what flock(2) locks
    RANGES = 2  # node, owner: what fcntl(2) locks


class Name(NamedTuple):
    """Of a descriptor in the store."""

    what: int
    share: int
    number: int
    owner: int = 0


Kept = tuple[Name, int]
"""A name and its descriptor."""


def prepare(channel: socket.socket) -> None:
    """For both ends: never wait."""
    channel.setblocking(False)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def send(channel: socket.socket, gone: Iterable[Name], kept: Sequence[Kept]) -> None:
    """One message. Raises ``BlockingIOError`` if there is no room for it now, ``OSError``; then nothing was sent."""
    data = msgpack.packb(([*gone], [name for name, _ in kept]))
    fds = array.array("i", [fd for _, fd in kept])
    channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])


@dataclass(frozen=True, slots=True)
class Message:
    """What was received; whoever takes the descriptors of ``kept`` owns them. ``lost`` have come without one: this
    process has as many open as it may."""

    gone: list[Name]
    kept: list[Kept]
    lost: list[Name]


def receive(channel: socket.socket, flags: int = 0) -> Message | None:
    """The next message; None at the end. It is taken out of the queue unless ``flags`` has ``MSG_PEEK``.

    Raises ``BlockingIOError`` if there is none now, and ``OSError``: EBADMSG for what is no message.
    """
    fds = array.array("i")
    room, flags = socket.CMSG_SPACE(MAX_AT_ONCE * fds.itemsize), flags | socket.MSG_CMSG_CLOEXEC
    try:
        received = channel.recvmsg(_MAX_MESSAGE, room, flags)
    except ConnectionResetError:
        # Said once if the other end died before it had read everything; what it sent is there.
        received = channel.recvmsg(_MAX_MESSAGE, room, flags)
    data, ancillary, _, _ = received
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        return None
    try:
        gone, kept = ([Name(*map(int, name)) for name in names] for names in msgpack.unpackb(data))
        if len(fds) > len(kept):
            raise ValueError(f"{len(fds)} descriptors by {len(kept)} names")
    except (TypeError, ValueError, OverflowError) as error:
        for descriptor in fds:
            os.close(descriptor)
        raise OSError(errno.EBADMSG, str(error)) from None
    return Message(gone, list(zip(kept, fds, strict=False)), kept[len(fds) :])


@dataclass(frozen=True, slots=True)
class Inherited:
    """What an earlier server has kept of a share. Whoever takes a descriptor out owns it."""

    nodes: dict[int, int] = field(default_factory=dict)
    locks: dict[Name, int] = field(default_factory=dict)


class Keepsakes:
    """This process's side of the store. Thread-safe; no call waits for anything but memory."""

    def __init__(self, channel: socket.socket | None = None) -> None:
        """``channel`` is taken over; without one nothing is kept."""
        self._channel = channel
        self._lock = threading.Lock()
        self._kept: dict[Name, ShareKeepsakes | None] = {}  # in the store, or on the way there; for whom
        self._waiting: dict[Name, int] = {}  # what the queue did not take: copies
        self._gone: list[Name] = []  # given up, and the store does not know yet
        self._inherited: dict[Name, int] = {}
        self._complained = False
        self.refused = 0
        if channel is not None:
            prepare(channel)
            self._inherit(channel)

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, share: int) -> ShareKeepsakes:
        """Those of a share."""
        return ShareKeepsakes(self, share)

    # --- from the server before --------------------------------------------------------------------

    def _inherit(self, channel: socket.socket) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: all was sent before we were started
            while (message := receive(channel)) is not None:
                self._inherited.update(message.kept)
                self._kept.update(dict.fromkeys(self._inherited))
                self._gone += message.lost
        if self._inherited:
            logger.info("%d descriptors are taken over", len(self._inherited))

    def claim(self, owner: ShareKeepsakes) -> Inherited:
        """What was kept of the share; the second time nothing."""
        found = Inherited()
        with self._lock:
            for name in [name for name in self._inherited if name.share == owner.share]:
                descriptor = self._inherited.pop(name)
                self._kept[name] = owner
                if name.what == What.NODE:
                    found.nodes[name.number] = descriptor
                else:
                    found.locks[name] = descriptor
        return found

    def give_up_unclaimed(self) -> None:
        """What nobody has claimed is of a guest, or a share, that is not there any more."""
        with self._lock:
            names = list(self._inherited)
        for name in names:
            with self._lock:
                descriptor = self._inherited.pop(name, -1)
            if descriptor >= 0:
                os.close(descriptor)
                self.give_up(name)
        self.flush()

    # --- keeping and giving up ---------------------------------------------------------------------

    def keep(self, name: Name, descriptor: int, owner: ShareKeepsakes) -> None:
        """Have a copy of ``descriptor`` outlive us, unless there is one by this name."""
        if self._channel is None:
            return
        with self._lock:
            if name in self._kept:
                return
            if len(self._kept) >= MAX_KEPT:
                self._refuse("it is full")
                return
            if (
                not self._waiting
                and len(self._gone) <= MAX_GONE
                and self._send(self._gone, [(name, descriptor)])
            ):
                self._gone.clear()
            else:
                try:
                    self._waiting[name] = os.dup(descriptor)
                except OSError as error:
                    self._refuse(str(error))
                    return
                self._flush()
            self._kept[name] = owner

    def give_up(self, name: Name, *, now: bool = False) -> None:
        """Have the copy closed; soon, unless it must be ``now``. It is no error if there is none."""
        if name not in self._kept:  # the usual case, on the way of every lookup that finds something new
            return
        with self._lock:
            if name in self._kept:
                self._give_up(name)
                if now or len(self._gone) >= _GATHERED:
                    self._flush()

    def give_up_all(self, owner: ShareKeepsakes) -> None:
        """Everything that was kept for ``owner``."""
        with self._lock:
            for name in [name for name, whose in self._kept.items() if whose is owner]:
                self._give_up(name)
            self._flush()

    def _give_up(self, name: Name) -> None:
        del self._kept[name]
        if (copy := self._waiting.pop(name, -1)) >= 0:
            os.close(copy)
        else:
            self._gone.append(name)

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th...
            logger.warning("the descriptor store: %s; %d were not kept", reason, self.refused)

    # --- sending -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what waits, as far as the queue takes it. To be called once a second."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        while self._waiting or self._gone:
            gone = self._gone[:MAX_GONE]
            # A name may be given up and kept again, in this order.
            all_gone = len(gone) == len(self._gone)
            kept = list(islice(self._waiting.items(), MAX_AT_ONCE)) if all_gone else []
            if not self._send(gone, kept):
                return
            del self._gone[: len(gone)]
            for name, copy in kept:
                del self._waiting[name]
                os.close(copy)

    def _send(self, gone: Sequence[Name], kept: Sequence[Kept]) -> bool:
        if self._channel is None:
            return False
        try:
            send(self._channel, gone, kept)
        except BlockingIOError:
            return False
        except OSError as error:  # EPIPE: the host agent ends, and so do we; ETOOMANYREFS: it is busy
            if not self._complained:
                self._complained = True
                logger.warning("the descriptor store cannot be told: %s", error)
            return False
        self._complained = False
        return True

    def close(self) -> None:
        """The store goes on without us."""
        with self._lock:
            self._flush()
            for descriptor in (*self._waiting.values(), *self._inherited.values()):
                os.close(descriptor)
            self._waiting.clear()
            self._inherited.clear()
            if self._channel is not None:
                self._channel.close()
                self._channel = None


class ShareKeepsakes:
    """Those of one share."""

    def __init__(self, keepsakes: Keepsakes, share: int) -> None:
        self.share = share
        self._keepsakes = keepsakes

    def claim(self) -> Inherited:
        """What an earlier server kept of this share."""
        return self._keepsakes.claim(self)

    def discard(self, kept: Inherited) -> None:
        """Give up what was claimed and is of no use."""
        names = {Name(What.NODE, self.share, number): fd for number, fd in kept.nodes.items()} | kept.locks
        for name, descriptor in names.items():
            os.close(descriptor)
            self._keepsakes.give_up(name, now=True)

    def keep_node(self, number: int, descriptor: int) -> None:
        """A file whose last name is going."""
        self._keepsakes.keep(Name(What.NODE, self.share, number), descriptor, self)

    def give_up_node(self, number: int) -> None:
        """It has a name again, or the guest has forgotten it."""
        self._keepsakes.give_up(Name(What.NODE, self.share, number))

    def flock(self, handle: int) -> Name:
        """The name of what a handle has locked."""
        return Name(What.FLOCK, self.share, handle)

    def ranges(self, node: int, owner: int) -> Name:
        """The name of what an owner has locked."""
        return Name(What.RANGES, self.share, node, owner)

    def keep_lock(self, name: Name, descriptor: int) -> None:
        """An open file description that holds a lock."""
        self._keepsakes.keep(name, descriptor, self)

    def give_up_lock(self, name: Name) -> None:
        """It holds none any more: nothing is to be open for long that is open for writing."""
        self._keepsakes.give_up(name, now=True)

    def give_up_all(self) -> None:
        """The share is served no more."""
        self._keepsakes.give_up_all(self)
