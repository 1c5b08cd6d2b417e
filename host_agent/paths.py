"""Where things are on the host: one private folder per user, one folder below it per instance.

The law: every folder is 0700 and owned by the user, so whatever is inside, sockets above all, is the
user's alone. ``AGENTCTL_HOME`` moves the whole of it (another disk, a test); the default is
``~/.agentctl``, short because the path of a unix socket is limited to 103 bytes.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from host_agent.errors import ExitCode, UserError
from provision.machine import MAX_SOCKET_PATH

DEFAULT_INSTANCE = "default"

#: It is part of folders, of a docker context and of the guest's host name.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def check_name(name: str) -> None:
    """Raise ``UserError`` (USAGE) if an instance cannot be called that."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is not a name for an instance",
            "lower case letters, digits and hyphens between them, 32 at the most",
            ExitCode.USAGE,
        )


@dataclass(frozen=True, slots=True)
class InstancePaths:
    """The files of one instance."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def lock(self) -> Path:
        """Held (flock) by the keeper and the host agent as long as either lives; the only proof of life."""
        return self.directory / "lock"

    @property
    def up_lock(self) -> Path:
        """Held by the one ``up`` or ``delete`` that is at work."""
        return self.directory / "up.lock"

    @property
    def config(self) -> Path:
        """What the user asks for, and edits."""
        return self.directory / "config.yaml"

    @property
    def config_lock(self) -> Path:
        """Held for the moment in which the configuration is read, changed and written."""
        return self.directory / "config.lock"

    @property
    def config_draft(self) -> Path:
        """What is being edited of it, and what is kept of that if it was not understood; of an instance not there yet,
        too."""
        return self.home.root / f"config-{self.name}.draft.yaml"

    @property
    def old_config(self) -> Path:
        """The configuration as it was before there were comments in it."""
        return self.directory / "config.json"

    @property
    def machine(self) -> Path:
        """What belongs to the configuration and is not for people: the machine's identity, where folders really are."""
        return self.directory / "machine.json"

    @property
    def home(self) -> Home:
        return Home(self.directory.parent.parent)

    @property
    def attached(self) -> Path:
        """Of an instance that is a machine over SSH and no VM: which one, and where the agent is there."""
        return self.directory / "attached.json"

    @property
    def running_config(self) -> Path:
        """What an instance that runs was made of, for the agent that comes after a killed one."""
        return self.directory / "running.json"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def qemu_identity(self) -> Path:
        return self.directory / "qemu.json"

    @property
    def agent_identity(self) -> Path:
        """Which process the host agent is, for whoever must end one that does not answer."""
        return self.directory / "agent.json"

    @property
    def agent_socket(self) -> Path:
        """Where the command line talks to the host agent."""
        return self.directory / "agent.sock"

    @property
    def qmp_socket(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def events_socket(self) -> Path:
        """A second monitor of QEMU's, which the host agent holds: a monitor has one client at a time."""
        return self.directory / "events.sock"

    @property
    def control_socket(self) -> Path:
        """QEMU's end of the guest's control port."""
        return self.directory / "control.sock"

    @property
    def files_socket(self) -> Path:
        """QEMU's end of the guest's files port."""
        return self.directory / "files.sock"

    @property
    def view_socket(self) -> Path:
        """QEMU's end of the port over which the guest's files are looked at."""
        return self.directory / "view.sock"

    @property
    def view(self) -> Path:
        """Where the guest's files are shown, if nobody says another place; there while they are."""
        return self.directory / "view"

    @property
    def view_record(self) -> Path:
        """Where they are shown, for the host agent that comes after a killed one."""
        return self.directory / "view.json"

    @property
    def view_log(self) -> Path:
        """What the process that shows them says on its standard error."""
        return self.directory / "view.log"

    @property
    def files_journal(self) -> Path:
        """What a file server that was killed must still know of the guest that it served."""
        return self.directory / "files.journal"

    @property
    def files_identity(self) -> Path:
        """Which process the file server is, for the host agent that comes after a killed one."""
        return self.directory / "files.json"

    @property
    def docker_socket(self) -> Path:
        return self.directory / "docker.sock"

    @property
    def containerd_socket(self) -> Path:
        """In the place of Docker's, where containerd alone runs the containers."""
        return self.directory / "containerd.sock"

    @property
    def agent_log(self) -> Path:
        return self.directory / "agent.log"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.directory / "qemu.log"

    @property
    def files_log(self) -> Path:
        """What the file server says on its standard error."""
        return self.directory / "files.log"

    @property
    def ssh_key(self) -> Path:
        """Opens the guest's sshd for its user."""
        return self.directory / "ssh_key"

    @property
    def provision_log(self) -> Path:
        """What the scripts of the configuration said."""
        return self.directory / "provision.log"

    @property
    def ssh_agent(self) -> Path:
        """A link to the socket of the user's SSH agent, wherever the newest login has it."""
        return self.directory / "ssh-agent.sock"

    @property
    def root_overlay(self) -> Path:
        """Thrown away at each boot."""
        return self.directory / "root.qcow2"

    @property
    def agent_drive(self) -> Path:
        """The guest agent as a tar, written at each boot."""
        return self.directory / "agent.tar"

    @property
    def bulk_memory(self) -> Path:
        """The memory shared with the VM, where it must be a file: not on Linux."""
        return self.directory / "bulk.mem"

    @property
    def data_disk(self) -> Path:
        """Everything worth keeping; only ``delete --data`` removes it."""
        return self.directory / "data.img"

    def sockets(self) -> tuple[Path, ...]:
        return (
            self.agent_socket,
            self.qmp_socket,
            self.events_socket,
            self.control_socket,
            self.files_socket,
            self.view_socket,
            self.docker_socket,
            self.containerd_socket,
        )

    def check_length(self) -> None:
        """Raise ``UserError`` if the folder's name is too long for the sockets in it."""
        longest = max((os.fsencode(path) for path in self.sockets()), key=len)
        if len(longest) > MAX_SOCKET_PATH:
            raise UserError(
                f"{self.directory} is too long for sockets ({len(longest)} of {MAX_SOCKET_PATH} bytes)",
                "set AGENTCTL_HOME to a folder with a shorter name",
                ExitCode.USAGE,
            )

    def ensure(self) -> None:
        """Create the folder; raises ``UserError`` if it cannot be private or its name is too long."""
        self.check_length()
        private_directory(self.directory)


@dataclass(frozen=True, slots=True)
class Home:
    """The user's folder of agentctl."""

    root: Path

    @classmethod
    def find(cls) -> Home:
        """From ``AGENTCTL_HOME``, else ``~/.agentctl``."""
        configured = os.environ.get("AGENTCTL_HOME")
        return cls(Path(configured).absolute()) if configured else cls.usual()

    @classmethod
    def usual(cls) -> Home:
        """The one of users who did not choose another."""
        return cls(Path.home() / ".agentctl")

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def tools(self) -> Path:
        """Programs unpacked for this user: a docker CLI where the host has none."""
        return self.root / "tools"

    @property
    def template(self) -> Path:
        """What the configuration of a new instance begins as, if the user has made one."""
        return self.root / "default.yaml"

    @property
    def template_draft(self) -> Path:
        return self.root / "template.draft.yaml"

    @property
    def template_lock(self) -> Path:
        return self.root / "default.lock"

    @property
    def config_schema(self) -> Path:
        """For editors: the first line of a configuration names it."""
        return self.root / "config.schema.json"

    def instance(self, name: str = DEFAULT_INSTANCE) -> InstancePaths:
        return InstancePaths(self.root / "instances" / name)

    def instances(self) -> list[InstancePaths]:
        """Those that have a folder, by name: they run, or have run, or their disk was kept."""
        try:
            names = sorted(entry.name for entry in (self.root / "instances").iterdir() if entry.is_dir())
        except OSError:
            return []
        return [self.instance(name) for name in names if _NAME.fullmatch(name)]

    def ensure(self) -> None:
        for directory in (self.root, self.images, self.cache, self.tools, self.root / "instances"):
            private_directory(directory)


def private_directory(path: Path) -> None:
    """Make ``path`` a folder that only this user can enter; raises ``UserError`` if it cannot be."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"cannot use {path}: {error.strerror}", "set AGENTCTL_HOME to a folder that you can write to"
        ) from error
    if status.st_uid != os.geteuid():
        raise UserError(
            f"{path} belongs to another user (uid {status.st_uid})",
            "set AGENTCTL_HOME to a folder of your own",
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)
