"""Everything the agents and the command line say to each other, as typed messages.

Three kinds: a ``Request`` has one reply, a ``Target`` is what a stream is opened to, a ``Notice`` is
sent and forgotten. Each is a frozen dataclass; ``protocol.codec`` puts it on the wire as an array of
its fields in order. The law of change: fields are only ever appended, with a default, so that either
side may be one minor version behind; names and meanings never change within a major version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Generic, TypeVar

ReplyT = TypeVar("ReplyT")


class Request(Generic[ReplyT]):
    """A question with one answer of type ``REPLY``."""

    __slots__ = ()
    METHOD: ClassVar[str]
    REPLY: ClassVar[type]


class Target:
    """What a stream is opened to."""

    __slots__ = ()
    KIND: ClassVar[str]


class Notice:
    """News with no answer; delivered in the order sent."""

    __slots__ = ()
    TOPIC: ClassVar[str]


@dataclass(frozen=True, slots=True)
class Done:
    """The reply of a request that has nothing else to say."""


# --- host -> guest ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configured:
    """What the guest made of its configuration. ``clock_step_ns`` is by how much its clock moved."""

    clock_step_ns: int = 0


@dataclass(frozen=True, slots=True)
class Configure(Request[Configured]):
    """Sent by the host once per session, before anything else.

    ``clock_ns`` is the host's wall clock, ns since the epoch. ``user``/``uid`` name the guest's
    default user; its home is ``/home/USER.guest``, so that a mount of the host's home hides nothing.
    """

    METHOD: ClassVar[str] = "configure"
    REPLY: ClassVar[type] = Configured

    hostname: str
    clock_ns: int
    user: str
    uid: int
    authorized_keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A snapshot of the guest. Sizes in bytes, uptime in seconds; ``data_total`` is 0 without a disk."""

    kernel: str
    uptime: float
    memory_total: int
    memory_available: int
    cpus: int
    data_total: int
    data_free: int
    port_detection: str


@dataclass(frozen=True, slots=True)
class GetGuestInfo(Request[GuestInfo]):
    METHOD: ClassVar[str] = "guest-info"
    REPLY: ClassVar[type] = GuestInfo


@dataclass(frozen=True, slots=True)
class Shutdown(Request[Done]):
    """Power the guest off in good order (containers stopped as Docker does). Answered before it does."""

    METHOD: ClassVar[str] = "shutdown"
    REPLY: ClassVar[type] = Done


@dataclass(frozen=True, slots=True)
class DialTcp(Target):
    """A TCP connection made by the guest. ``address`` is numeric (IPv4 or IPv6 without brackets)."""

    KIND: ClassVar[str] = "tcp"

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class DialUnix(Target):
    """A connection to a unix stream socket of the guest."""

    KIND: ClassVar[str] = "unix"

    path: str


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A terminal's size in character cells."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Exec(Target):
    """A process in the guest; the stream carries ``protocol.execio`` packets both ways.

    ``user`` empty means the default user; ``cwd`` empty means that user's home, and a ``cwd`` that
    does not exist falls back to it. ``env`` is added to the user's environment. An empty ``argv`` is
    the user's login shell. ``tty`` gives it a terminal of that size, else it gets three pipes.
    """

    KIND: ClassVar[str] = "exec"

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""
    tty: WindowSize | None = None


# --- guest -> host ---------------------------------------------------------------------------------


class Proto(StrEnum):
    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """A listening socket of the guest's root network namespace.

    ``address`` is numeric (``0.0.0.0``, ``127.0.0.1``, ``::``, ``::1``). ``unit`` is the systemd unit
    or scope of the process that made it (``docker.service``), empty where it cannot be known.
    """

    proto: Proto
    address: str
    port: int
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Listeners(Notice):
    """What listens in the guest. The first of a session is complete (``full``), the others are changes.

    A long list comes as several notices; only the first of them is marked ``full``.
    """

    TOPIC: ClassVar[str] = "listeners"

    full: bool
    added: list[Listener]
    removed: list[Listener] = field(default_factory=list)


# --- command line -> host agent --------------------------------------------------------------------


class Stage(StrEnum):
    """Where an instance is on its way up or down."""

    STOPPED = "stopped"
    STARTING = "starting"
    BOOTING = "booting"
    DOCKER = "docker"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """What the host agent knows of its instance. Sizes in bytes, times in seconds since the epoch.

    ``restarts`` counts boots that had to be tried again, ``agent_restarts`` host agents that died and were
    started again, ``agent_sessions`` those of the control link, ``file_server_restarts`` the file servers that
    this host agent had to start again, all of the current run. ``bulk_memory`` bytes are shared with the VM for
    payloads; ``bulk_reason`` is a clause that says why there are none, and payloads travel in frames.
    """

    name: str
    stage: Stage
    detail: str
    hint: str
    accelerator: str
    cpus: int
    memory: int
    disk: int
    image: str
    qemu_pid: int
    agent_pid: int
    started_at: float
    restarts: int
    guest_connected: bool
    guest_digest: str
    host_digest: str
    docker_socket: str
    docker_context: str
    guest: GuestInfo | None = None
    agent_sessions: int = 0
    agent_restarts: int = 0
    accelerator_reason: str = ""
    mounts: int = 0
    mounts_working: int = 0
    file_server_pid: int = 0
    file_server_restarts: int = 0
    bulk_memory: int = 0
    bulk_reason: str = ""


@dataclass(frozen=True, slots=True)
class GetStatus(Request[InstanceStatus]):
    METHOD: ClassVar[str] = "status"
    REPLY: ClassVar[type] = InstanceStatus


class ForwardState(StrEnum):
    PENDING = "pending"
    LISTENING = "listening"
    CONFLICT = "conflict"
    DENIED = "denied"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Forward:
    """One row of ``agentctl ports``. ``host_address`` is empty for a listener that is ignored."""

    proto: Proto
    guest_address: str
    guest_port: int
    host_address: str
    host_port: int
    state: ForwardState
    reason: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Forwards:
    """A piece of the table, as long as fits into a frame. ``total`` counts the rows of the whole."""

    forwards: list[Forward]
    total: int = 0


@dataclass(frozen=True, slots=True)
class GetForwards(Request[Forwards]):
    """The rows from ``offset`` on, in order; what fits of them.

    The pieces that one client asks for belong to the table as it was when it asked for offset 0.
    """

    METHOD: ClassVar[str] = "forwards"
    REPLY: ClassVar[type] = Forwards

    offset: int = 0


class MountState(StrEnum):
    MOUNTED = "mounted"
    WAITING = "waiting"
    MISSING = "missing"
    DENIED = "denied"
    NOT_A_DIRECTORY = "not-a-directory"
    FULL = "full"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class MountSpec:
    """A folder of the host's and where the VM is to see it. All paths are absolute and normal.

    ``host_locks``: flock(2) and fcntl(2) locks reach the host. ``real_path`` is what ``host_path`` meant when the
    user chose it, without symlinks, and what is served; "" until somebody has looked. Two that differ in nothing
    else are equal.
    """

    host_path: str
    guest_path: str
    read_only: bool = False
    host_locks: bool = False
    real_path: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Mount:
    """One row of ``agentctl mounts``. ``reason`` and ``hint`` are empty if all is well.

    ``nodes`` the guest knows, ``descriptors`` are open for them on the host; ``lost`` counts files that could not be
    found again (ESTALE), ``calls`` what the guest has asked for. ``clock_skew_ms``: how far its clock is ahead.
    """

    spec: MountSpec
    state: MountState
    reason: str = ""
    hint: str = ""
    nodes: int = 0
    descriptors: int = 0
    lost: int = 0
    calls: int = 0
    clock_skew_ms: int = 0


@dataclass(frozen=True, slots=True)
class Mounts:
    """All mounts, those of the outer folders first."""

    mounts: list[Mount]


@dataclass(frozen=True, slots=True)
class GetMounts(Request[Mounts]):
    METHOD: ClassVar[str] = "mounts"
    REPLY: ClassVar[type] = Mounts


@dataclass(frozen=True, slots=True)
class AddMounts(Request[Mounts]):
    """Mount these as well, now and at each start; answered when they are there, or it is known why not."""

    METHOD: ClassVar[str] = "add-mounts"
    REPLY: ClassVar[type] = Mounts

    mounts: list[MountSpec]


@dataclass(frozen=True, slots=True)
class StopInstance(Request[Done]):
    """Shut the guest down and end the host agent; answered when the guest has gone."""

    METHOD: ClassVar[str] = "stop"
    REPLY: ClassVar[type] = Done

    force: bool = False


@dataclass(frozen=True, slots=True)
class Event(Notice):
    """A change of the instance's state, for progress lines and ``watch``. ``fields`` explain it."""

    TOPIC: ClassVar[str] = "event"

    time: float
    kind: str
    message: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subscribe(Request[Done]):
    """Send every ``Event`` from now on, after those of the current start so far."""

    METHOD: ClassVar[str] = "subscribe"
    REPLY: ClassVar[type] = Done
