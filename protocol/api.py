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
class HostKeys:
    """By which the guest's sshd is known, as its files say them; none before its data disk is there."""

    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GetHostKeys(Request[HostKeys]):
    """Asked over the link, which leads to that VM and to no other, for the day on which the link is lost."""

    METHOD: ClassVar[str] = "host-keys"
    REPLY: ClassVar[type] = HostKeys


@dataclass(frozen=True, slots=True)
class GuestClock:
    """The guest's wall clock, ns since the epoch."""

    now_ns: int


@dataclass(frozen=True, slots=True)
class AdjustClock(Request[GuestClock]):
    """Move the guest's wall clock by ``by_ns``, and say what it shows then; by 0: only say it.

    By more than 100 ms it is set at once, by less it is made to run faster or slower for a while. The host says by
    how much, not to what, so that it does not matter how long the message takes.
    """

    METHOD: ClassVar[str] = "adjust-clock"
    REPLY: ClassVar[type] = GuestClock

    by_ns: int = 0


@dataclass(frozen=True, slots=True)
class DiskGrown:
    """How large the filesystem of the data disk is now, in bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class GrowDisk(Request[DiskGrown]):
    """Give the filesystem of the data disk, which has become larger, all of its ``size`` bytes, while it is in use."""

    METHOD: ClassVar[str] = "grow-disk"
    REPLY: ClassVar[type] = DiskGrown

    size: int


@dataclass(frozen=True, slots=True)
class DisksTrimmed:
    """How many bytes of free space were named to the host; most of them it never had to keep."""

    trimmed: int


@dataclass(frozen=True, slots=True)
class TrimDisks(Request[DisksTrimmed]):
    """Name all free space of the guest's disks to the host, which stops to keep it (FITRIM)."""

    METHOD: ClassVar[str] = "trim-disks"
    REPLY: ClassVar[type] = DisksTrimmed


@dataclass(frozen=True, slots=True)
class HostNetworkUsed:
    """What of it could not be done, in sentences; Docker starts in any case."""

    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UseHostNetwork(Request[HostNetworkUsed]):
    """What programs of the guest are to find of the host's network; the whole of it, in place of what was said before.

    DNS queries to ``name_server`` go to ``dns_port`` (UDP and TCP) of ``host``, numeric IPv4 addresses; with 0 they go
    where the machine's network takes them. ``environment`` is what logins and Docker have besides their own.
    ``certificates`` are trusted beside the distribution's, each in DER (RFC 5280). Docker starts after the first of
    these, or after a minute without.
    """

    METHOD: ClassVar[str] = "use-host-network"
    REPLY: ClassVar[type] = HostNetworkUsed

    name_server: str
    host: str
    dns_port: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    certificates: list[bytes] = field(default_factory=list)


class Effect(StrEnum):
    """What new settings did to a dockerd that ran already."""

    NONE = ""
    RELOADED = "reloaded"
    RESTARTED = "restarted"


@dataclass(frozen=True, slots=True)
class DockerSettingsUsed:
    """``problem``: why they are not used, in a sentence; then those of before are. ``details``: dockerd's own words."""

    effect: Effect = Effect.NONE
    problem: str = ""
    details: str = ""


@dataclass(frozen=True, slots=True)
class UseDockerSettings(Request[DockerSettingsUsed]):
    """What dockerd's daemon.json has beside the VM's own settings, a JSON object; the whole of it.

    Sent in each session. Docker starts after the first of these, or after a minute without.
    """

    METHOD: ClassVar[str] = "use-docker-settings"
    REPLY: ClassVar[type] = DockerSettingsUsed

    settings: str = "{}"


@dataclass(frozen=True, slots=True)
class ArchitecturesUsed:
    """Of which it cannot be done, and why, in sentences."""

    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UseArchitectures(Request[ArchitecturesUsed]):
    """Run programs of these architectures (Debian's names) as well, and of no others but the machine's own.

    What it takes is fetched from Debian the first time, and kept on the data disk.
    """

    METHOD: ClassVar[str] = "use-architectures"
    REPLY: ClassVar[type] = ArchitecturesUsed

    names: list[str]


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A snapshot of the guest. Sizes in bytes, uptime in seconds; ``data_total`` is 0 without a disk.

    ``port_dumps`` counts how often its agent has asked the kernel what listens.
    """

    kernel: str
    uptime: float
    memory_total: int
    memory_available: int
    cpus: int
    data_total: int
    data_free: int
    port_detection: str
    port_dumps: int = 0


@dataclass(frozen=True, slots=True)
class GetGuestInfo(Request[GuestInfo]):
    METHOD: ClassVar[str] = "guest-info"
    REPLY: ClassVar[type] = GuestInfo


@dataclass(frozen=True, slots=True)
class ContainerUsage:
    """What a container that runs uses: ``cpu``, seconds of one processor since its start; ``memory``, bytes now."""

    id: str
    name: str
    cpu: float
    memory: int
    processes: int


@dataclass(frozen=True, slots=True)
class GuestUsage:
    """What the guest uses. What flows is counted since its boot: who wants to know how much asks twice.

    ``time`` is the guest's clock that is never set, in seconds. ``cpu_busy``, ``cpu_waiting`` (for a disk) and
    ``cpu_stolen`` (by the host) are seconds of all processors together, sizes and traffic are bytes. ``data_*`` is the
    data disk, all 0 without one. Of the containers those with the most memory, if there are too many.
    """

    time: float
    cpus: int
    cpu_busy: float
    cpu_waiting: float
    cpu_stolen: float
    load: list[float]
    processes: int
    memory_total: int
    memory_available: int
    memory_cache: int
    data_total: int
    data_free: int
    data_read: int
    data_written: int
    network_received: int
    network_sent: int
    containers: list[ContainerUsage] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GetGuestUsage(Request[GuestUsage]):
    """Looked up when it is asked for, in /proc and the control groups; costs nothing where nobody asks."""

    METHOD: ClassVar[str] = "guest-usage"
    REPLY: ClassVar[type] = GuestUsage


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
class DialUdp(Target):
    """A UDP socket connected by the guest to a numeric address; the stream carries ``protocol.datagrams``."""

    KIND: ClassVar[str] = "udp"

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class DialName(Target):
    """A TCP connection to ``host``, a name as the guest resolves it; the first of its addresses that answers."""

    KIND: ClassVar[str] = "name"

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class HostEntrances:
    """Which of the sockets the guest does not listen on, and in a clause why; on the others it does."""

    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OpenHostEntrances(Request[HostEntrances]):
    """Listen on behalf of the host on the unix sockets ``paths``, and on no others; what is open already stays.

    Sent in each session. Each connection becomes a ``DialHost`` stream.
    """

    METHOD: ClassVar[str] = "host-entrances"
    REPLY: ClassVar[type] = HostEntrances

    paths: list[str]


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A terminal's size in character cells."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Exec(Target):
    """A process in the guest; the stream carries ``protocol.execio`` packets both ways.

    ``user`` empty means the default user; ``cwd`` empty means that user's home, which a relative one begins at, and
    a ``cwd`` that does not exist falls back to it, unless it is ``cwd_required``. ``env`` is added to the user's
    environment. An empty ``argv`` is the user's login shell. ``tty`` gives it a terminal of that size, else it gets
    three pipes.
    """

    KIND: ClassVar[str] = "exec"

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""
    tty: WindowSize | None = None
    cwd_required: bool = False


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


@dataclass(frozen=True, slots=True)
class Owner:
    """Who listens there: the name of a process, and of a container; "" for what is not known.

    Of a port that Docker publishes it is the process that listens in the container.
    """

    proto: Proto
    address: str
    port: int
    process: str = ""
    container: str = ""


@dataclass(frozen=True, slots=True)
class Owners:
    """Those that could be found out, of the lowest ports."""

    owners: list[Owner]


@dataclass(frozen=True, slots=True)
class GetOwners(Request[Owners]):
    """From the host to the guest: who listens now. Looked up when it is asked for."""

    METHOD: ClassVar[str] = "owners"
    REPLY: ClassVar[type] = Owners


@dataclass(frozen=True, slots=True)
class DialHost(Target):
    """A connection to what the host has behind the guest's socket ``entrance``. Without a rule it is refused."""

    KIND: ClassVar[str] = "host"

    entrance: str


# --- command line -> host agent --------------------------------------------------------------------


class Stage(StrEnum):
    """Where an instance is on its way up or down."""

    STOPPED = "stopped"
    STARTING = "starting"
    BOOTING = "booting"
    DOCKER = "docker"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"


class LinkState(StrEnum):
    """Of the connection to a machine that is attached."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Attachment:
    """The machine that an attached instance is, and how the connection to it is doing.

    ``address`` is what it was attached by, ``user`` who we are there. ``link`` is as it is since ``since``, seconds
    since the epoch; ``reason`` and ``hint`` say why it is not connected, and ``attempts`` counts how often that was
    tried since it was. ``python`` runs the agent there. ``mounting`` is how folders come to be there: "root",
    "fusermount3", or "" if they cannot; ``ports`` how it is learnt what listens. ``keep``: what runs there goes on when
    nobody is attached. ``packs``: copies may be packed on their way.
    """

    address: str
    link: LinkState
    since: float = 0.0
    reason: str = ""
    hint: str = ""
    attempts: int = 0
    user: str = ""
    python: str = ""
    mounting: str = ""
    ports: str = ""
    keep: bool = False
    packs: bool = False


class Transport(StrEnum):
    """What carries the control link of a VM."""

    NONE = "none"
    VIRTIO_SERIAL = "virtio-serial"
    SSH = "ssh"


@dataclass(frozen=True, slots=True)
class ControlLink:
    """How a VM's guest agent is reached, since ``since``, seconds since the epoch.

    ``reason`` is a clause: why it is not virtio-serial. ``problem`` and ``hint`` say why it is not SSH either,
    which was tried ``attempts`` times since there was a session.
    """

    transport: Transport
    since: float = 0.0
    reason: str = ""
    problem: str = ""
    hint: str = ""
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """What the host agent knows of its instance. Sizes in bytes, times in seconds since the epoch.

    ``restarts`` counts boots that had to be tried again, ``agent_restarts`` host agents that died and were
    started again, ``agent_sessions`` those of the control link, ``file_server_restarts`` the file servers that
    this host agent had to start again, all of the current run. ``bulk_memory`` bytes are shared with the VM for
    payloads; ``bulk_reason`` is a clause that says why there are none, and payloads travel in frames.
    ``disk_allocated`` is what the data disk takes of the host's, where ``host_free`` bytes are left; ``disk_state`` is
    "low" where that is little, and "full" where the VM waits for more. ``warnings``: what of the guest is not as it was
    asked for, in sentences. ``attached`` is None of a VM; of a machine that is attached, what only a VM has is empty.
    ``control`` is None where no VM runs.
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
    disk_state: str = ""
    disk_allocated: int = 0
    host_free: int = 0
    warnings: list[str] = field(default_factory=list)
    runtime: str = "docker"
    containerd_socket: str = ""
    attached: Attachment | None = None
    control: ControlLink | None = None


@dataclass(frozen=True, slots=True)
class GetStatus(Request[InstanceStatus]):
    METHOD: ClassVar[str] = "status"
    REPLY: ClassVar[type] = InstanceStatus


@dataclass(frozen=True, slots=True)
class Usage:
    """What an instance uses, as its host agent knows it: for two of them ``top`` says what flows.

    ``received`` and ``sent`` are bytes that connections of the host have brought from the guest and taken to it since
    the host agent was started; ``guest`` is None while it does not answer.
    """

    received: int
    sent: int
    guest: GuestUsage | None = None


@dataclass(frozen=True, slots=True)
class GetUsage(Request[Usage]):
    METHOD: ClassVar[str] = "usage"
    REPLY: ClassVar[type] = Usage


@dataclass(frozen=True, slots=True)
class SettingsReloaded:
    """What that did, and what it did not, in sentences."""

    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReloadSettings(Request[SettingsReloaded]):
    """Read again, from the configuration's file, what is to run in the guest, and have that now.

    Answered when it is done, which may take as long as Docker takes to stop all containers and to start.
    """

    METHOD: ClassVar[str] = "reload-settings"
    REPLY: ClassVar[type] = SettingsReloaded


class ForwardState(StrEnum):
    PENDING = "pending"
    LISTENING = "listening"
    CONFLICT = "conflict"
    DENIED = "denied"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Forward:
    """One row of ``agentctl ports``. ``host_address`` is empty for a listener that is ignored.

    Of a unix socket of the host it is the path, and ``host_port`` is 0. ``process`` and ``container`` are those of
    ``Owner``, where they were asked for.
    """

    proto: Proto
    guest_address: str
    guest_port: int
    host_address: str
    host_port: int
    state: ForwardState
    reason: str = ""
    unit: str = ""
    process: str = ""
    container: str = ""


@dataclass(frozen=True, slots=True)
class Forwards:
    """A piece of the table, as long as fits into a frame. ``total`` counts the rows of the whole."""

    forwards: list[Forward]
    total: int = 0


@dataclass(frozen=True, slots=True)
class GetForwards(Request[Forwards]):
    """The rows from ``offset`` on, in order; what fits of them.

    The pieces that one client asks for belong to the table as it was when it asked for offset 0. ``owners``, at
    offset 0: with who listens, for which the guest has to be asked.
    """

    METHOD: ClassVar[str] = "forwards"
    REPLY: ClassVar[type] = Forwards

    offset: int = 0
    owners: bool = False


@dataclass(frozen=True, slots=True)
class PortRule:
    """A line of the user's list: which listeners of the guest appear where on the host, or do not (``ignore``).

    It is about ``ports`` ports from ``guest_port`` on, which appear from ``host_port`` on, or, of one port, at the
    unix socket ``host_socket``. Without ``proto`` it is about each. ``static``: there without a listener, too.
    """

    proto: Proto | None = None
    guest_ip: str = "127.0.0.1"
    guest_ip_must_be_zero: bool = False
    guest_port: int = 1
    ports: int = 65535
    host_ip: str = "localhost"
    host_port: int = 1
    host_socket: str = ""
    ignore: bool = False
    static: bool = False


@dataclass(frozen=True, slots=True)
class PortSettings:
    """What the user wants of ports: rules, the first that matches wins, and what holds where none does.

    ``lan``: who listens on all addresses of the guest does so on the host. ``privileged_offset``: what is added to
    a port below 1024, or 0.
    """

    rules: list[PortRule] = field(default_factory=list)
    lan: bool = False
    privileged_offset: int = 0


@dataclass(frozen=True, slots=True)
class GetPortSettings(Request[PortSettings]):
    METHOD: ClassVar[str] = "port-settings"
    REPLY: ClassVar[type] = PortSettings


@dataclass(frozen=True, slots=True)
class ChangePorts(Request[PortSettings]):
    """Change the settings, now and for each start, and answer what they are then. None leaves one as it is.

    Rules that are added come first; both lists may be empty. To remove a rule that is not there is an error.
    """

    METHOD: ClassVar[str] = "change-ports"
    REPLY: ClassVar[type] = PortSettings

    add: list[PortRule] = field(default_factory=list)
    remove: list[PortRule] = field(default_factory=list)
    lan: bool | None = None
    privileged_offset: int | None = None


@dataclass(frozen=True, slots=True)
class SocketForward:
    """A unix socket that appears on the other side: of the guest on the host or (``reverse``) of the host in the guest.

    ``guest`` and ``host`` are absolute paths; with ``reverse`` ``host`` may be ``ADDRESS:PORT`` instead.
    """

    guest: str
    host: str
    reverse: bool = False


@dataclass(frozen=True, slots=True)
class SocketRow:
    """How one is doing; ``reason`` is a clause, empty if all is well."""

    forward: SocketForward
    state: ForwardState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SocketRows:
    """All of them, in the order in which they were added."""

    rows: list[SocketRow]


@dataclass(frozen=True, slots=True)
class GetSocketForwards(Request[SocketRows]):
    METHOD: ClassVar[str] = "socket-forwards"
    REPLY: ClassVar[type] = SocketRows


@dataclass(frozen=True, slots=True)
class ChangeSocketForwards(Request[SocketRows]):
    """Add and remove, now and for each start. To remove one that is not there is an error."""

    METHOD: ClassVar[str] = "change-socket-forwards"
    REPLY: ClassVar[type] = SocketRows

    add: list[SocketForward] = field(default_factory=list)
    remove: list[SocketForward] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Disk:
    """The data disk, in bytes: its size, what the VM uses of it, what it takes on the host and what is free there.

    ``used`` is None where the VM cannot be asked. ``overlay`` is what the root takes that is thrown away at each
    start; ``given_back`` what the host has after a ``CompactDisk`` that it had not before.
    """

    size: int
    allocated: int
    free: int
    used: int | None = None
    overlay: int = 0
    given_back: int = 0


@dataclass(frozen=True, slots=True)
class GetDisk(Request[Disk]):
    METHOD: ClassVar[str] = "disk"
    REPLY: ClassVar[type] = Disk


@dataclass(frozen=True, slots=True)
class ChangeDisk(Request[Disk]):
    """Make the data disk ``size`` bytes large, now and for each start; a smaller one than it has is an error."""

    METHOD: ClassVar[str] = "change-disk"
    REPLY: ClassVar[type] = Disk

    size: int


@dataclass(frozen=True, slots=True)
class CompactDisk(Request[Disk]):
    """Give back to the host what the VM's disks do not need; answered when that is done."""

    METHOD: ClassVar[str] = "compact-disk"
    REPLY: ClassVar[type] = Disk


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
    ``revalidating``: changes on the host may have gone unseen, and what the guest has is being compared with what is
    there. ``unwatched`` counts the files and folders that the host's kernel does not watch, so that the guest asks for
    them each time. ``bytes_read`` and ``bytes_written`` are what calls have brought to the guest and taken from it.
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
    revalidating: bool = False
    unwatched: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


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
class RemoveMounts(Request[Mounts]):
    """Mount what is at these paths of the guest no longer, now and at each start. A path that is none is an error."""

    METHOD: ClassVar[str] = "remove-mounts"
    REPLY: ClassVar[type] = Mounts

    guest_paths: list[str]


class ViewStage(StrEnum):
    """How the view of the guest's files is."""

    OFF = "off"
    STARTING = "starting"
    MOUNTED = "mounted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ViewPlace:
    """A tree of the guest's that the view shows; ``path`` is below the view's own."""

    path: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class View:
    """``path`` is on this machine, ``owner`` whose the files are shown as (``me`` or ``guest``). ``connected``: the
    guest answers. ``reason`` and ``hint`` are sentences, empty if all is well."""

    stage: ViewStage
    path: str
    owner: str
    connected: bool = False
    reason: str = ""
    hint: str = ""
    places: list[ViewPlace] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GetView(Request[View]):
    METHOD: ClassVar[str] = "view"
    REPLY: ClassVar[type] = View


@dataclass(frozen=True, slots=True)
class StartView(Request[View]):
    """Show the guest's files at ``path``; answered when they can be looked at, or it is known why not. One that is
    there already, for the same path and owner, is left alone."""

    METHOD: ClassVar[str] = "start-view"
    REPLY: ClassVar[type] = View

    path: str
    owner: str


@dataclass(frozen=True, slots=True)
class EndView(Request[View]):
    """Show them no more."""

    METHOD: ClassVar[str] = "end-view"
    REPLY: ClassVar[type] = View


@dataclass(frozen=True, slots=True)
class ServeView(Request[Done]):
    """(To the guest.) Have the process run that serves the view; ``wanted`` false: have it run no more."""

    METHOD: ClassVar[str] = "serve-view"
    REPLY: ClassVar[type] = Done

    wanted: bool = True


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
    """Send every ``Event`` from now on, after those of the current start so far; without these if ``only_new``."""

    METHOD: ClassVar[str] = "subscribe"
    REPLY: ClassVar[type] = Done

    only_new: bool = False
