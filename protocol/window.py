"""Credit windows: how many bytes of a stream may be under way.

The law: a sender never has more bytes unconsumed than its receiver granted, so a receiver's buffer is
bounded by its own grant, whatever the sender does.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import LocalProtocolError, RemoteProtocolError

# Per stream and direction. HTTP/2 starts with 64 KiB; twice that keeps a full chunk under way while the
# credit for the one before it travels back (a round trip over virtio-serial takes 1-2 ms, a chunk too).
INITIAL_WINDOW: Final = 128 * 1024
# What a peer may grant in total; far above any real window, far below where arithmetic needs thought.
MAX_WINDOW: Final = 2**31 - 1


class SendWindow:
    """The bytes that may still be sent.

    ``available`` starts at what the receiver announced. Sending n bytes takes n, a credit of n adds n.
    It never gets negative (that would be our bug) nor above ``MAX_WINDOW`` (that is the peer's).
    """

    __slots__ = ("available",)

    def __init__(self, size: int = 0) -> None:
        self.available = 0
        if size:
            self.grant(size)

    def spend(self, count: int) -> None:
        """``count`` bytes are being sent. Raises ``LocalProtocolError`` without credit for them."""
        if count > self.available:
            raise LocalProtocolError(f"{count} bytes sent with credit for {self.available}")
        self.available -= count

    def grant(self, count: int) -> None:
        """The peer granted ``count`` more bytes. Raises ``RemoteProtocolError`` for a senseless grant."""
        if not 0 < count <= MAX_WINDOW - self.available:
            raise RemoteProtocolError(f"a credit of {count} bytes on top of {self.available}")
        self.available += count


class ReceiveWindow:
    """The bytes the peer may still send, and when to grant more.

    The peer starts with ``size`` bytes of credit. Each byte is in one of four places, and their sum is
    always ``size``:

        available   credit the peer still holds (or has used for bytes that are still under way)
        buffered    received, not yet consumed by the application
        consumed    consumed, the credit for it not yet returned
        returned    (back in ``available``)

    So ``available + buffered + consumed == size``. A byte received moves from available to buffered;
    one that arrives when available is 0 breaks the protocol. A byte consumed moves from buffered to
    consumed. When consumed reaches half of ``size``, all of it is returned in one credit: often enough
    that a steady sender never stalls, seldom enough that credits stay under 1 % of the frames' bytes.
    """

    __slots__ = ("_available", "_buffered", "_consumed", "_size")

    def __init__(self, size: int = INITIAL_WINDOW) -> None:
        self._size = size
        self._available = size
        self._buffered = 0
        self._consumed = 0

    @property
    def size(self) -> int:
        """What the peer was granted at the start, in bytes."""
        return self._size

    def receive(self, count: int) -> None:
        """``count`` bytes arrived. Raises ``RemoteProtocolError`` if the peer had no credit for them."""
        if count > self._available:
            raise RemoteProtocolError(f"{count} bytes of data with credit for {self._available}")
        self._available -= count
        self._buffered += count

    def receive_at_once(self, count: int) -> bool:
        """``receive``, if the peer had credit; else False, and nothing has happened."""
        if count > self._available:
            return False
        self._available -= count
        self._buffered += count
        return True

    def consume(self, count: int) -> int:
        """The application took ``count`` bytes; returns the credit to send now, mostly 0."""
        if count > self._buffered:
            raise LocalProtocolError(f"{count} bytes consumed of {self._buffered} received")
        self._buffered -= count
        self._consumed += count
        if self._consumed * 2 < self._size:
            return 0
        credit, self._consumed = self._consumed, 0
        self._available += credit
        return credit
