"""Two byte streams joined: what one end says is what the other end hears.

The law: an end of file on one side is one on the other (half-close), a reset is a reset, and a slow
reader slows its writer down; there is one chunk a direction in memory and no queue. Whatever ends the
splice, both streams are closed when it returns. Uses trio; works for sockets, link streams and pipes.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import trio

from protocol.errors import ErrorCode

CHUNK = 64 * 1024
"""Bytes read at a time: one full payload of the control link."""

ABORT_TIMEOUT = 2.0
"""Seconds to tell the far side of a reset; after that the stream is closed without."""

LINGER_NONE = struct.pack("ii", 1, 0)
"""struct linger {on, 0 s}: close() then sends RST instead of FIN (socket(7))."""


@runtime_checkable
class Resettable(Protocol):
    """A stream that can be cut with a reason (a link's ``MuxStream``)."""

    async def reset(self, code: ErrorCode, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Spliced:
    """How a splice ended. Bytes delivered from a to b and from b to a; ``error`` is empty if both ended."""

    a_to_b: int
    b_to_a: int
    error: str = ""


async def abort(stream: trio.abc.AsyncResource, code: ErrorCode, message: str) -> None:
    """Close ``stream`` so that its peer sees a reset and not an end of file. Never raises.

    A TCP socket sends RST, a link's stream its reset with ``code`` and ``message``; anything else has
    no such notion and is just closed. Bounded by ``ABORT_TIMEOUT``, even within a cancelled scope.
    """
    with trio.move_on_after(ABORT_TIMEOUT) as scope:
        scope.shield = True
        try:
            if isinstance(stream, Resettable):
                await stream.reset(code, message)
            elif isinstance(stream, trio.SocketStream):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it is already gone, which is what we wanted
    await _close_now(stream)


async def _close_now(stream: trio.abc.AsyncResource) -> None:
    with trio.CancelScope(shield=True):
        with suppress(OSError, trio.BrokenResourceError):
            await trio.aclose_forcefully(stream)


class _Pump:
    """One direction. ``run`` returns when the source has ended and the sink has been told so."""

    def __init__(self, source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream) -> None:
        self._source, self._sink = source, sink
        self.moved = 0

    async def run(self) -> None:
        while data := await self._source.receive_some(CHUNK):
            await self._sink.send_all(data)
            self.moved += len(data)
        await self._sink.send_eof()


async def splice(a: trio.abc.HalfCloseableStream, b: trio.abc.HalfCloseableStream) -> Spliced:
    """Carry bytes both ways until both sides have ended, or one of them breaks.

    A broken side resets the other one. Cancelled: both sides are reset. Never raises for what the
    streams do; anything else than a broken or closed stream is a bug and propagates.
    """
    there, back = _Pump(a, b), _Pump(b, a)
    error = "cancelled"
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run)
            nursery.start_soon(back.run)
        error = ""
    except* (trio.BrokenResourceError, trio.ClosedResourceError) as broken:
        error = _reason(broken)
    finally:
        try:
            await (abort(a, ErrorCode.RESET, error) if error else _close_gracefully(a))
        finally:  # closing may be cancelled, too
            await (abort(b, ErrorCode.RESET, error) if error else _close_gracefully(b))
    return Spliced(there.moved, back.moved, error)


async def _close_gracefully(stream: trio.abc.AsyncResource) -> None:
    with suppress(OSError, trio.BrokenResourceError):
        await stream.aclose()


def _reason(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error.__cause__ or error) or type(error).__name__
