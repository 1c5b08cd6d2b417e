"""What can go wrong on a link, and whose fault it is.

The law here: an error of the peer (``RemoteProtocolError``) ends the link and nothing else; an error
of the caller (``LocalProtocolError``) is a bug on this side and leaves the link alone; a *failure*
(``RpcError``, ``OpenRefused``, ``StreamReset``) is an ordinary answer and ends only what it answers.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names that travel on the wire in failures, refusals, resets and goodbyes."""

    CANCELLED = "cancelled"
    DENIED = "denied"
    GONE = "gone"
    INTERNAL = "internal"
    INVALID = "invalid"
    LIMIT = "limit"
    NOT_FOUND = "not-found"
    PROTOCOL = "protocol"
    REFUSED = "refused"
    RESET = "reset"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    UNSUPPORTED = "unsupported"
    VERSION = "version"

    @classmethod
    def parse(cls, text: str) -> ErrorCode:
        """The code named by ``text``; a name this side does not know yet is ``INTERNAL``."""
        try:
            return cls(text)
        except ValueError:
            return cls.INTERNAL


class AgentctlProtocolError(Exception):
    """Base of everything this package raises."""


class LocalProtocolError(AgentctlProtocolError):
    """This side asked for something the protocol does not allow (a bug here)."""


class LinkError(AgentctlProtocolError):
    """The link is over; whatever was pending on it has failed."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.GONE) -> None:
        super().__init__(message)
        self.code = code


class RemoteProtocolError(LinkError):
    """The peer broke the protocol; the link is over."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.PROTOCOL) -> None:
        super().__init__(message, code)


class LinkClosed(LinkError):
    """The link ended in good order, or its transport went away."""


class DecodeError(AgentctlProtocolError):
    """A wire value does not have the shape its type declares."""


class RemoteFailure(AgentctlProtocolError):
    """The peer answered, and the answer is no."""

    def __init__(self, code: ErrorCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class RpcError(RemoteFailure):
    """A request failed. Handlers raise it; callers catch it."""


class OpenRefused(RemoteFailure):
    """The peer would not open the stream."""


class StreamReset(RemoteFailure):
    """A stream was cut, in both directions, before its end."""
