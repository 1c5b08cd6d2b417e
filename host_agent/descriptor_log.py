"""What the descriptor store holds, written down where no death of the host agent reaches it: in the queue of a socket.

Messages in a unix socket's queue, their descriptors included (SCM_RIGHTS, unix(7)), are there as long as anybody has
its two ends open. The keeper has them open and does nothing else with them; each host agent inherits them.

The law: whatever may be killed in between, the queue read from its head on is the story of what is held, told by names
kept and names given up. A story of which the first messages are missing is right if everything that is held is told
again behind it; so that is added first, and then the old messages are dropped, which closes what was given up.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from host_agent.fileserver.keepsakes import MAX_AT_ONCE, Kept, Message, Name, prepare, receive, send

logger = logging.getLogger(__name__)

#: Messages in the queue, which takes 274 by default, before it is told anew.
MOST_MESSAGES = 128

#: Descriptors in the queue, twice as many while it is told anew. No program may send any while its user has more of
#: them in queues than it may have open itself (too_many_unix_fds in Linux), and those of a desktop, which do send
#: some, may usually have 1,024. The rest are as safe as the host agent.
MOST_DESCRIPTORS = 256

#: Where the next look that takes nothing out of the queue begins, bytes from its head; -1 is always the head
#: (asm-generic/socket.h, socket(7); Python has no name for it).
_SO_PEEK_OFF: Final = 42


class DescriptorLog:
    """Of one store, which alone reads and writes it."""

    def __init__(self, head: socket.socket, tail: socket.socket) -> None:
        """Both ends are taken over."""
        self._head, self._tail = head, tail
        self._messages = 0  # in the queue
        self._told: set[Name] = set()  # kept in one of them
        self._is_stale = False  # they say more than is so
        self._complained = False
        prepare(head)
        prepare(tail)

    def read(self) -> Iterator[Message]:
        """The story so far, left where it is; whoever takes the descriptors owns them."""
        self._head.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        while (message := self._look_at_next()) is not None:
            self._messages += 1
            self._told.update(name for name, _ in message.kept)
            self._is_stale = True
            yield message
        self._head.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)

    def _look_at_next(self) -> Message | None:
        try:
            return receive(self._head, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EBADMSG:
                raise
            logger.warning("an agentctl of another version kept what this one cannot read: %s", error)
            return Message([], [], [])

    def append(self, gone: Sequence[Name], kept: Sequence[Kept]) -> None:
        """Go on with the story; ``tidy`` is to follow. What does not fit is told when there is room again."""
        named = [name for name in (*gone, *(name for name, _ in kept)) if name in self._told]
        fitting = kept[: MOST_DESCRIPTORS - len(self._told)]
        if len(fitting) < len(kept):
            self._complain()
        if named or fitting:
            self._is_stale = not self._send(named, fitting) or bool(named) or self._is_stale

    def tidy(self, held: Iterable[Kept]) -> None:
        """Tell anew what is held, if that has become less or the story long."""
        if not self._is_stale and self._messages <= MOST_MESSAGES:
            return
        old = self._messages
        if not self._tell(held):
            # There is no room beside the old messages, or not for all in any case.
            self._drop(self._messages)
            old = 0
            if not self._tell(held):
                self._complain()
        self._drop(old)
        self._is_stale = False

    def _tell(self, held: Iterable[Kept]) -> bool:
        self._told.clear()
        items = islice(held, MOST_DESCRIPTORS)
        while some := list(islice(items, MAX_AT_ONCE)):
            if not self._send((), some):
                return False
        return True

    def _send(self, gone: Sequence[Name], kept: Sequence[Kept]) -> bool:
        try:
            send(self._tail, gone, kept)
        except OSError:
            # EAGAIN: the queue is full. ETOOMANYREFS: this user has too many descriptors in queues.
            return False
        self._messages += 1
        self._told.update(name for name, _ in kept)
        return True

    def _complain(self) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("not all descriptors that are held would outlive the host agent")

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._head.recv(1)  # the rest of it, and its descriptors, the kernel throws away
        self._messages -= count

    def close(self) -> None:
        """The story stays."""
        self._head.close()
        self._tail.close()
