"""What one side of a link answers: handlers, registered by the type of message they take.

The law: a handler sees only messages that decode to its type; anything else is answered before it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from protocol import codec
from protocol.api import Notice, Request, Target
from protocol.errors import DecodeError, ErrorCode, LocalProtocolError, OpenRefused, RpcError
from protocol.messages import Call
from protocol.muxstream import Incoming

RequestT = TypeVar("RequestT", bound=Request[Any])
TargetT = TypeVar("TargetT", bound=Target)
NoticeT = TypeVar("NoticeT", bound=Notice)


@dataclass(frozen=True, slots=True)
class BoundRequest:
    """A decoded request with the handler to await for its reply."""

    message: Request[Any]
    handler: Callable[[Any], Awaitable[Any]]

    async def run(self) -> list[Any]:
        """The encoded reply. Raises what the handler raises; ``TypeError`` for a reply of another type."""
        reply = await self.handler(self.message)
        if not isinstance(reply, self.message.REPLY):
            raise TypeError(f"{self.message.METHOD} was answered with a {type(reply).__name__}")
        return codec.encode(reply)


@dataclass(frozen=True, slots=True)
class _Streams:
    """Who takes streams of a kind."""

    cls: type[Any]
    handler: Callable[[Any, Incoming], Awaitable[None]]
    at_once: Callable[[Any, Incoming], bool] | None


class Service:
    """The handlers of one side; give each link its own when they differ by link."""

    def __init__(self) -> None:
        self._requests: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Any]]]] = {}
        self._streams: dict[str, _Streams] = {}
        self._notices: dict[str, tuple[type[Any], Callable[[Any], Awaitable[None]]]] = {}
        self._notices_at_once: dict[str, tuple[type[Any], Callable[[Any], None]]] = {}
        self.call: Callable[[Call], None] | None = None

    def on_request(self, cls: type[RequestT], handler: Callable[[RequestT], Awaitable[Any]]) -> None:
        """Answer ``cls`` with what ``handler`` returns, or with the ``RpcError`` it raises.

        Runs as a task of its own, which the peer's cancellation or the request's deadline cancels. Any
        other exception is logged here and becomes ``INTERNAL`` there.
        """
        _register(self._requests, cls.METHOD, (cls, handler))

    def on_stream(
        self,
        cls: type[TargetT],
        handler: Callable[[TargetT, Incoming], Awaitable[None]],
        at_once: Callable[[TargetT, Incoming], bool] | None = None,
    ) -> None:
        """Let ``handler`` accept or refuse streams to ``cls``; when it returns, the stream is closed.

        Runs as a task of its own, cancelled when the peer gives up before the answer. It may raise
        ``OpenRefused`` instead of calling ``Incoming.refuse``.

        ``at_once`` is asked first, where frames are read, and must neither wait nor raise: True if it has accepted
        the stream and carries it on by itself, so that there is nothing for a task to do.
        """
        _register(self._streams, cls.KIND, _Streams(cls, handler, at_once))

    def on_notice(self, cls: type[NoticeT], handler: Callable[[NoticeT], Awaitable[None]]) -> None:
        """Await ``handler`` for each ``cls``, one after another in the order sent: it must be quick."""
        _register(self._notices, cls.TOPIC, (cls, handler))

    def on_notice_at_once(self, cls: type[NoticeT], handler: Callable[[NoticeT], None]) -> None:
        """Call ``handler`` for each ``cls`` where frames are read, in order with calls and their results.

        It must neither wait nor raise.
        """
        _register(self._notices_at_once, cls.TOPIC, (cls, handler))

    def on_call(self, handler: Callable[[Call], None]) -> None:
        """Give every filesystem operation to ``handler``, which answers with ``Link.answer``, soon or later.

        It is called where frames are read, and must neither wait nor raise.
        """
        if self.call is not None:
            raise LocalProtocolError("calls have a handler already")
        self.call = handler

    # --- the link ----------------------------------------------------------------------------------

    def bind_request(self, method: str, args: object) -> BoundRequest:
        """Raises ``RpcError`` when nothing here answers it."""
        if (entry := self._requests.get(method)) is None:
            raise RpcError(ErrorCode.UNSUPPORTED, f"no such request: {_quoted(method)}")
        cls, handler = entry
        try:
            return BoundRequest(codec.decode(cls, args), handler)
        except DecodeError as error:
            raise RpcError(ErrorCode.INVALID, str(error)) from error

    def bind_stream(
        self, kind: str, args: object
    ) -> tuple[Callable[[Incoming], Awaitable[None]], Callable[[Incoming], bool] | None]:
        """The handler, and what to ask before it. Raises ``OpenRefused`` when nothing here takes it."""
        if (entry := self._streams.get(kind)) is None:
            raise OpenRefused(ErrorCode.UNSUPPORTED, f"no such stream: {_quoted(kind)}")
        handler, at_once = entry.handler, entry.at_once
        try:
            target = codec.decode(entry.cls, args)
        except DecodeError as error:
            raise OpenRefused(ErrorCode.INVALID, str(error)) from error
        return partial(handler, target), None if at_once is None else partial(at_once, target)

    def bind_notice(self, topic: str, args: object) -> Callable[[], Awaitable[None]] | None:
        """None for a topic that nobody here waits for. Raises ``DecodeError``."""
        if (entry := self._notices.get(topic)) is None:
            return None
        cls, handler = entry
        notice = codec.decode(cls, args)
        return lambda: handler(notice)

    def take_notice(self, topic: str, args: object) -> bool:
        """Whether it was one for a handler that is called at once, and has been. Raises ``DecodeError``."""
        if (entry := self._notices_at_once.get(topic)) is None:
            return False
        cls, handler = entry
        handler(codec.decode(cls, args))
        return True


def _quoted(text: str) -> str:
    """A name of the peer's, fit for an error message."""
    return repr(text[:64])


def _register(table: dict[str, Any], name: str, entry: Any) -> None:
    if name in table:
        raise LocalProtocolError(f"{name!r} has a handler already")
    table[name] = entry
