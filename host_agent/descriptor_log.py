"""What the descriptor store holds, written down where no death of the host agent reaches it: in the queue of a socket.

Messages in a unix socket's queue, their descriptors included (SCM_RIGHTS, unix(7)), are there as long as anybody has
its two ends open. The keeper has them open and does nothing else with them; each host agent inherits them.

The law: whatever may be killed in between, the queue read from its head on is the story of what is held, told by names
kept and names given up. A message at the head may go if what it alone says is kept is told again behind it, or is held
no more. So that is told first, and then the old messages are dropped, which closes what was given up. Where there is
no room for all of that at a time, it goes by parts, down to one name; no message goes before its last one.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from fileserver.keepsakes import MAX_AT_ONCE, Kept, Message, Name, prepare, receive, send

logger = logging.getLogger(__name__)

#: Messages in the queue, which takes 274 by default, before it is told anew: there must be room for that beside them.
MOST_MESSAGES = 128

#: Descriptors in the queue, twice as many while it is told anew. No program may send any while its user has more of
#: them in queues than it may have open itself (too_many_unix_fds in Linux), and those of a desktop, which do send
#: some, may usually have 1,024. The rest are as safe as the host agent.
MOST_DESCRIPTORS = 256

#: Where the next look that takes nothing out of the queue begins, bytes from its head; -1 is always the head
#: (asm-generic/socket.h, socket(7); Python has no name for it).
_SO_PEEK_OFF: Final = 42


class DescriptorLog:
    """Of one store, which alone reads and writes it. ``held`` is always what is to be told: all that the store has."""

    def __init__(self, head: socket.socket, tail: socket.socket) -> None:
        """Both ends are taken over."""
        self._head, self._tail = head, tail
        self._story: deque[set[Name]] = deque()  # of each message the names that no later one speaks of
        self._told: dict[Name, set[Name]] = {}  # which of these a name is in
        self._is_stale = False  # there are descriptors in the queue that are held no more
        self._complained = False
        prepare(head)
        prepare(tail)

    def read(self) -> Iterator[Message]:
        """The story so far, left where it is; whoever takes the descriptors owns them."""
        self._head.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        while (message := self._look_at_next()) is not None:
            self._note(message.gone, [name for name, _ in message.kept])
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

    def append(self, gone: Sequence[Name], kept: Sequence[Kept], held: Mapping[Name, int]) -> None:
        """Go on with the story; ``tidy`` is to follow. On return it does not say that ``gone`` are held."""
        if len(self._story) >= MOST_MESSAGES and self._tell_anew(held):
            return
        named = [name for name in (*gone, *(name for name, _ in kept)) if name in self._told]
        fitting = kept[: self._room]
        if len(fitting) < len(kept):
            self._complain()
        if not named and not fitting:
            return
        self._is_stale = self._is_stale or bool(named)
        if not self._send(named, fitting) and not self._tell_anew(held):
            self._give_up(named)

    def tidy(self, held: Mapping[Name, int]) -> None:
        """Tell anew what is held, if that has become less or the story long."""
        if self._is_stale or len(self._story) > MOST_MESSAGES:
            self._tell_anew(held)

    def _tell_anew(self, held: Mapping[Name, int]) -> bool:
        """Replace all messages. False: there was no room, and some are still there."""
        old = len(self._story)
        while old := self._drop_what_says_nothing(old, held):
            if not self._send_some(self._names(old, held), held):
                self._complain()
                return False
        self._is_stale = False
        rest = [name for name in held if name not in self._told][: self._room]
        while rest and (sent := self._send_some(rest, held)):
            del rest[:sent]
        if rest:
            self._complain()
        return True

    def _drop_what_says_nothing(self, old: int, held: Mapping[Name, int]) -> int:
        """Of the ``old`` first messages those up to one that alone says what is held; returns how many are left."""
        while old and not any(name in held for name in self._story[0]):
            self._drop_first()
            old -= 1
        return old

    def _names(self, messages: int, held: Mapping[Name, int]) -> list[Name]:
        """What is held of the first ``messages``, as much of it as goes at once."""
        names = (name for told in islice(self._story, messages) for name in told if name in held)
        return list(islice(names, MAX_AT_ONCE))

    def _send_some(self, names: Sequence[Name], held: Mapping[Name, int]) -> int:
        """Tell of as many of ``names``, from the first on, as there is room for; how many."""
        count = min(len(names), MAX_AT_ONCE)
        while count and not self._send((), [(name, held[name]) for name in names[:count]]):
            count //= 2
        return count

    def _give_up(self, names: Sequence[Name]) -> None:
        """Say that ``names`` are kept no more, whatever has to go for that.

        What goes is lost only if we are killed, too; what was given up must not come back in any case.
        """
        while (told := [name for name in names if name in self._told]) and not self._send(told, ()):
            self._drop_first()

    def _send(self, gone: Sequence[Name], kept: Sequence[Kept]) -> bool:
        try:
            send(self._tail, gone, kept)
        except OSError:
            # EAGAIN: the queue is full. ETOOMANYREFS: this user has too many descriptors in queues.
            return False
        self._note(gone, [name for name, _ in kept])
        return True

    def _note(self, gone: Sequence[Name], kept: Sequence[Name]) -> None:
        """A message more."""
        for name in (*gone, *kept):
            if (before := self._told.pop(name, None)) is not None:
                before.discard(name)
        told = set(kept)
        self._told.update(dict.fromkeys(kept, told))
        self._story.append(told)

    def _drop_first(self) -> None:
        self._head.recv(1)  # the rest of it, and its descriptors, the kernel throws away
        for name in self._story.popleft():
            del self._told[name]

    @property
    def _room(self) -> int:
        """Descriptors that may be added."""
        return max(0, MOST_DESCRIPTORS - len(self._told))

    def _complain(self) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("not all descriptors that are held would outlive the host agent")

    def close(self) -> None:
        """The story stays."""
        self._head.close()
        self._tail.close()
