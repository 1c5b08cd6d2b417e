"""What the host agent and its file server say to each other.

An ordinary link over a socket pair: the file server is ``Role.SERVER``. The host agent says what to share, the
file server what became of it. The end of the link is the end of the file server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from protocol.api import Notice, Request


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """A folder of the host, and where the guest has it. Both paths are absolute.

    ``id`` is the same for the same guest path, for as long as the guest's kernel runs. ``host_locks``: flock(2) and
    fcntl(2) locks of the guest are locks on the host.
    """

    id: int
    host_path: str
    guest_path: str
    read_only: bool = False
    host_locks: bool = False


class ShareStage(StrEnum):
    """How a folder is doing on the host."""

    SERVING = "serving"
    MISSING = "missing"
    DENIED = "denied"
    NOT_A_DIRECTORY = "not-a-directory"
    FULL = "full"


class GuestStage(StrEnum):
    """What the guest last said of a mount; ``WAITING`` until it has."""

    WAITING = "waiting"
    MOUNTED = "mounted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ShareState:
    """One share now. ``reason`` and ``hint`` are sentences, empty if all is well.

    ``nodes`` are the files that the guest's kernel knows, ``descriptors`` those open here for them. ``lost``
    counts what could not be kept: files that were not found again, locks that somebody took while the file
    server was started again. ``calls`` counts what the guest has asked of this process. ``clock_skew_ms`` is by
    how much the guest's clock was ahead when it mounted. ``revalidating``: what the guest was told is being compared
    with what is there, because changes may have gone unseen. ``unwatched`` counts the files and folders whose
    changes are not heard of, because the kernel watches no more of them: the guest asks for these each time.
    ``bytes_read`` and ``bytes_written`` count payloads, as ``calls`` does calls.
    """

    id: int
    stage: ShareStage
    guest: GuestStage
    reason: str = ""
    hint: str = ""
    nodes: int = 0
    descriptors: int = 0
    lost: int = 0
    calls: int = 0
    clock_skew_ms: int = 0
    revalidating: bool = False
    unwatched: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, slots=True)
class ShareStates:
    """All shares, in the order in which they were asked for. ``connected``: there is a session with the guest."""

    shares: list[ShareState]
    connected: bool = False


@dataclass(frozen=True, slots=True)
class ServeShares(Request[ShareStates]):
    """Serve exactly these. The guest hears of none before the first of these requests."""

    METHOD: ClassVar[str] = "serve-shares"
    REPLY: ClassVar[type] = ShareStates

    shares: list[SharedFolder] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GetShares(Request[ShareStates]):
    METHOD: ClassVar[str] = "get-shares"
    REPLY: ClassVar[type] = ShareStates


@dataclass(frozen=True, slots=True)
class SharesChanged(Notice):
    """Sent when the stage of a share has changed, or what explains it, or ``connected``."""

    TOPIC: ClassVar[str] = "shares-changed"

    states: ShareStates
