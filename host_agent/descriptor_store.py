"""Descriptors that the file server must not lose by being killed: kept here, for the next one.

Like systemd's file descriptor store, but that the names say all there is to know: nothing is understood here.
The file server says over a socket of their own what is to be kept and what is not any more (``fileserver.keepsakes``);
what it has kept when it ends is in the socket of the next one before that is started.

The laws: what a server has sent is taken in also after its end, and before the next one begins; at most ``limit``
descriptors are held, since each is a file of the user's that cannot be given back to the disk; and a host agent that
is killed loses nothing. For that the server's channel and a log of what is held are the keeper's: each message is in
one of the two at every moment, and the next host agent finds it there.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Final

import trio

from fileserver.keepsakes import MAX_AT_ONCE, MAX_KEPT, Kept, Message, Name, prepare, receive, send
from host_agent.descriptor_log import DescriptorLog

logger = logging.getLogger(__name__)

NAP: Final = 0.05
"""Seconds between two looks at what the file server says. It has one message for each file that the guest removes,
and each that finds us waiting wakes us, 0.2 ms of a processor that the removals need. What waits is in the queue, as
safe as here; that takes 500 messages, and a guest removes 2,000 files a second at the most."""


def make_room(limit: int = MAX_KEPT) -> int:
    """See to it that ``limit`` descriptors may be open, and as many for the rest of the process; how many may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * limit
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return limit if soft == resource.RLIM_INFINITY else min(limit, soft // 2)


class DescriptorStore:
    """What is held for one file server after another. ``close`` gives it back, but for what the keeper has."""

    def __init__(self, limit: int | None = None, inherited: Sequence[int] = ()) -> None:
        """``inherited`` are the keeper's four sockets, of which copies are made; without them it all ends with us."""
        self._limit = make_room() if limit is None else limit
        self._held: dict[Name, int] = {}
        self.refused = self.unreadable = 0
        sockets = [socket.socket(fileno=os.dup(descriptor)) for descriptor in inherited]
        self._channel = sockets[:2]
        self._log = DescriptorLog(*sockets[2:]) if sockets else None
        if self._log is not None:
            self._remember(self._log)

    def __len__(self) -> int:
        return len(self._held)

    def _remember(self, log: DescriptorLog) -> None:
        for message in log.read():
            self._apply(message)
        self._tidy()
        if self._held:
            logger.info("%d descriptors are taken over", len(self._held))

    @contextmanager
    def opened(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """The two ends for one server: ours, to ``follow``, and its own, with all that is held.

        At the end both are closed, and what it has sent is taken in. Raises ``OSError``.
        """
        ours, theirs = [end.dup() for end in self._channel] or socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        with ours, theirs:
            prepare(ours)
            self.take_in(ours)  # of a server whose host agent was killed
            _throw_away(theirs)
            self._hand_over(ours)
            try:
                yield ours, theirs
            finally:
                theirs.close()
                self.take_in(ours)

    def _hand_over(self, ours: socket.socket) -> None:
        items = iter(list(self._held.items()))
        while some := list(islice(items, MAX_AT_ONCE)):
            try:
                send(ours, (), some)
            except OSError as error:  # what the next server does not know of it cannot give up
                names = [name for name, _ in (*some, *items)]
                logger.warning("%d descriptors could not be handed over: %s", len(names), error)
                self._discard(names)
                if self._log is not None:
                    self._log.append(names, (), self._held)
        self._tidy()

    async def follow(self, ours: socket.socket) -> None:
        """Take in what the server says, to its end."""
        while self.take_in(ours):
            await trio.sleep(NAP)
            await trio.lowlevel.wait_readable(ours)

    def take_in(self, ours: socket.socket) -> bool:
        """Take in what it has said. False: it will say no more.

        What does not make sense is passed over: each message is for itself. Of what it may have said is gone a copy is
        kept until the next server, which does not claim it; what it may have kept is like what had no room.
        """
        try:
            while (message := self._look_at_next(ours)) is not None:
                self._apply(message)
                if self._log is not None:
                    held = [kept for kept in message.kept if self._is_held(kept)]
                    self._log.append(message.gone, held, self._held)
                ours.recv(1)
        except BlockingIOError:
            return True
        except OSError as error:
            # Of the channel, and not of a message: that is there for the next look.
            logger.warning("the file server's descriptors: %s", error)
        finally:
            self._tidy()
        return False

    def _look_at_next(self, ours: socket.socket) -> Message | None:
        while True:
            try:
                return receive(ours, socket.MSG_PEEK)
            except OSError as error:
                if error.errno != errno.EBADMSG:
                    raise
                if not self.unreadable:
                    logger.warning("not a message about descriptors; others are only counted: %s", error)
                self.unreadable += 1
                ours.recv(1)

    def _tidy(self) -> None:
        if self._log is not None:
            self._log.tidy(self._held)

    def _apply(self, message: Message) -> None:
        self._discard(message.gone)
        for name, descriptor in message.kept:
            self._discard([name])
            if len(self._held) < self._limit:
                self._held[name] = descriptor
            else:
                os.close(descriptor)
                self._refuse(1)
        self._refuse(len(message.lost))

    def _is_held(self, kept: Kept) -> bool:
        name, descriptor = kept
        return self._held.get(name) == descriptor

    def _refuse(self, count: int) -> None:
        if count and not self.refused:
            logger.warning("the descriptor store has no room; from now on they are only counted")
        self.refused += count

    def _discard(self, names: list[Name]) -> None:
        for name in names:
            if (descriptor := self._held.pop(name, -1)) >= 0:
                os.close(descriptor)

    def close(self) -> None:
        self._discard(list(self._held))
        for end in self._channel:
            end.close()
        if self._log is not None:
            self._log.close()


def _throw_away(theirs: socket.socket) -> None:
    """What was meant for a server that did not come to read it."""
    theirs.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            theirs.recv(1)
