"""Requests under way, in both directions: ids, deadlines, cancellation.

The law: every request is answered exactly once, even a cancelled one. So a caller that gave up keeps
the id until the late answer has come, an answer nobody asked for is the peer's error, and both sides
agree at any moment how many requests are pending. Time is an argument, in seconds of any one clock.
"""

from __future__ import annotations

import math
from typing import Final

from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError, RpcError

# Pending requests in one direction. Far more than a person's commands or the agents' own questions need;
# each may hold a task and up to a header's worth of arguments.
MAX_REQUESTS: Final = 1024
# Ids are never reused on a link; at a million a second this lasts 285 years.
MAX_ID: Final = 2**53 - 1
# Seconds. Longer than any link lives, and safe to add to any clock.
MAX_TIMEOUT: Final = 1e9

_NEVER = math.inf


class IdSpace:
    """The ids that one side hands out: all of one parity, always increasing, never reused."""

    __slots__ = ("_first", "last")

    def __init__(self, first: int) -> None:
        self._first = first
        self.last = first - 2

    def take(self) -> int:
        """The next id."""
        if self.last + 2 > MAX_ID:
            raise LocalProtocolError("this link has used up its ids")
        self.last += 2
        return self.last

    def claim(self, number: int) -> None:
        """The peer used ``number`` for something new. Raises ``RemoteProtocolError`` if it may not."""
        if (number - self._first) % 2 or not self.last < number <= MAX_ID:
            raise RemoteProtocolError(f"id {number} is not a new id of the peer's")
        self.last = number

    def used(self, number: int) -> bool:
        """Whether ``number`` has been handed out."""
        return self._first <= number <= self.last and (number - self._first) % 2 == 0


class OutgoingRequests:
    """Requests of this side that the peer has yet to answer."""

    def __init__(self, first_id: int) -> None:
        self._ids = IdSpace(first_id)
        self._deadlines: dict[int, float] = {}
        self._abandoned: set[int] = set()

    def check_room(self) -> None:
        """Raises ``RpcError`` (code ``LIMIT``) when too many are pending, abandoned ones included."""
        if len(self._deadlines) + len(self._abandoned) >= MAX_REQUESTS:
            raise RpcError(ErrorCode.LIMIT, f"{MAX_REQUESTS} requests are already waiting for an answer")

    def begin(self, timeout: float | None, now: float) -> int:
        """A new request; returns its id."""
        if timeout is not None and not 0 <= timeout <= MAX_TIMEOUT:
            raise LocalProtocolError(f"a timeout of {timeout} s")
        self.check_room()
        request = self._ids.take()
        self._deadlines[request] = _NEVER if timeout is None else now + timeout
        return request

    def settle(self, request: int) -> bool:
        """The answer came; False if nobody waits for it any more.

        Raises ``RemoteProtocolError`` for the answer to no question, or a second one.
        """
        if self._deadlines.pop(request, None) is not None:
            return True
        if request not in self._abandoned:
            raise RemoteProtocolError(f"an answer to request {request}, which is not pending")
        self._abandoned.remove(request)
        return False

    def abandon(self, request: int) -> bool:
        """The caller gave up; False if the request was not pending (answered, or given up before)."""
        if self._deadlines.pop(request, None) is None:
            return False
        self._abandoned.add(request)
        return True

    def next_deadline(self) -> float:
        """When the next request times out; infinity for never."""
        return min(self._deadlines.values(), default=_NEVER)

    def expire(self, now: float) -> list[int]:
        """Abandon the requests whose deadline has passed, and return them."""
        late = [request for request, deadline in self._deadlines.items() if deadline <= now]
        for request in late:
            self.abandon(request)
        return late


class IncomingRequests:
    """Requests of the peer that this side has yet to answer."""

    def __init__(self, first_id: int) -> None:
        self._ids = IdSpace(first_id)
        self._deadlines: dict[int, float] = {}

    def begin(self, request: int, timeout: float | None, now: float) -> bool:
        """The peer asks; False if too much is pending already: answer with ``LIMIT``.

        Raises ``RemoteProtocolError`` for an id that is not new, or a timeout that is no duration.
        """
        if timeout is not None and not 0 <= timeout <= MAX_TIMEOUT:
            raise RemoteProtocolError(f"request {request} with a timeout of {timeout} s")
        self._ids.claim(request)
        if len(self._deadlines) >= MAX_REQUESTS:
            return False
        self._deadlines[request] = _NEVER if timeout is None else now + timeout
        return True

    def cancel(self, request: int) -> bool:
        """The peer gave up; False if the answer is already on its way.

        Raises ``RemoteProtocolError`` if it never asked.
        """
        if not self._ids.used(request):
            raise RemoteProtocolError(f"cancellation of request {request}, which never was")
        return request in self._deadlines

    def check(self, request: int) -> None:
        """Raises ``LocalProtocolError`` unless an answer to ``request`` is due."""
        if request not in self._deadlines:
            raise LocalProtocolError(f"request {request} is not waiting for an answer")

    def answer(self, request: int) -> None:
        """This side answers. Raises ``LocalProtocolError`` unless exactly one answer is due."""
        self.check(request)
        del self._deadlines[request]

    def next_deadline(self) -> float:
        """When the peer's next request has lasted too long; infinity for never."""
        return min(self._deadlines.values(), default=_NEVER)

    def expire(self, now: float) -> list[int]:
        """The requests whose deadline has passed. They stay pending until answered; each is told once."""
        late = [request for request, deadline in self._deadlines.items() if deadline <= now]
        for request in late:
            self._deadlines[request] = _NEVER
        return late
