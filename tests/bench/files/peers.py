"""What agentctl's mount is compared with in the VM, each at the same host directory.

sshfs     As Lima mounts a folder with its default for QEMU, reverse-sshfs (lima-vm/sshocker, pkg/reversesshfs;
          Lima's pkg/hostagent/mount.go, pkg/sshutil): an ssh connection host -> guest runs sshfs in the guest in
          passive mode (once "slave"), and OpenSSH's sftp-server on the host speaks to it over that
          connection's stdin and stdout. allow_other, sshfs's cache on, Lima's ciphers, no compression.
virtiofs  QEMU's own virtiofsd (C) with cache=auto, vhost-user-fs-pci, memory shared.
ext4      A directory on the guest's data disk with the same files: no host, the ceiling.
agentctl  ``agentctl up --mount``, as a user has it.

The law: a mount is fresh when ``mount`` returns, its caches in the guest's user space included: sshfs and
the files agent are new processes. ext4 has none of those.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from provision import recipe as recipes
from tests.bench import processes, ssh
from tests.bench.files import guest_packages
from tests.bench.files.report import OURS
from tests.bench.files.runner import Peer, PeerFailed
from tests.bench.instance import Instance, InstanceFailed
from tests.bench.machine import TAG

#: On the guest's data disk: what is copied there, and ext4's own.
DATA = "/var/lib/agentctl/bench"
MOUNTS = "/mnt"
MOUNT_TIMEOUT = 60.0

SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/lib/ssh/sftp-server", "/usr/libexec/sftp-server")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


def find_sftp_server() -> str | None:
    return next((path for path in SFTP_SERVERS if os.access(path, os.X_OK)), None)


def obstacle(name: str) -> str:
    """Why this host cannot offer the peer ``name``, in a clause; empty if it can."""
    if name == "sshfs":
        if find_sftp_server() is None:
            return "no sftp-server (openssh-sftp-server)"
        return "" if shutil.which("ssh") and shutil.which("ssh-keygen") else "no ssh (openssh-client)"
    if name == "virtiofs":
        if not os.access(VIRTIOFSD, os.X_OK):
            return f"no {VIRTIOFSD} (qemu-system-common of Debian 12)"
        if subprocess.run([*_as_root(), "true"], capture_output=True, check=False).returncode:
            return "virtiofsd must be root, and this user may not make a user namespace"
    return ""


def _as_root() -> list[str]:
    """A namespace in which this user is root. The groups are mapped by newgidmap, or setgroups(2), which
    virtiofsd calls, would be forbidden."""
    if os.geteuid() == 0:
        return []
    user = f"--map-users={os.getuid()},0,1"
    return ["unshare", "--user", user, "--map-groups=auto", "--setuid=0", "--setgid=0"]


def virtiofsd(shared: Path) -> tuple[str, ...]:
    """The daemon for ``shared``, but for its socket. It must be root, if only of a namespace."""
    # fmt: off
    return (
        *_as_root(), VIRTIOFSD,
        "--rlimit-nofile=0",  # as it is: to raise it takes more than that root
        "-o", f"source={shared}",
        "-o", "cache=auto",
    )
    # fmt: on


class GuestMount:
    """What the peers in the guest have in common: a mount point, and how it is cleared."""

    def __init__(self, instance: Instance, name: str) -> None:
        self.name = name
        self.point = f"{MOUNTS}/{name}"
        self.common = f"{self.point}/common"
        self.own = f"{self.point}/{name}"
        self._instance = instance

    def _unmount(self) -> str:
        """A script that leaves an empty mount point."""
        return f"umount -l {self.point} 2>/dev/null || true; mkdir -p {self.point}; "

    def _run(self, script: str) -> str:
        try:
            return self._instance.guest(script, timeout=MOUNT_TIMEOUT)
        except InstanceFailed as error:
            raise PeerFailed(f"{self.name} cannot be mounted: {error}") from None


class Virtiofs(GuestMount):
    def __init__(self, instance: Instance) -> None:
        super().__init__(instance, "virtiofs")

    def mount(self) -> None:
        self._run(f"{self._unmount()}mount -t virtiofs {TAG} {self.point}")


class Ext4(GuestMount):
    """Nothing to mount: ``DATA`` is on the data disk, which Docker's files are on as well."""

    def __init__(self, instance: Instance, shared: Path) -> None:
        super().__init__(instance, "ext4")
        self.common, self.own = f"{DATA}/common", f"{DATA}/ext4"
        archive = subprocess.run(
            ["tar", "-c", "-C", str(shared), "common", "ext4"], stdout=subprocess.PIPE, check=True
        ).stdout
        instance.guest(f"tar -x --no-same-owner -C {DATA} && sync", timeout=300, input=archive)

    def mount(self) -> None:
        self._run(f"mountpoint -q {Path(DATA).parent}")


class Agentctl(GuestMount):
    """The product. A restart of its files agent in the guest mounts every share anew."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance, OURS)

    def mount(self) -> None:
        self._run("systemctl restart agentctl-files.service")
        deadline = time.monotonic() + MOUNT_TIMEOUT
        while "yes" not in self._run(f"stat -c yes {self.common} 2>/dev/null || true"):
            if time.monotonic() > deadline:
                raise PeerFailed(f"{self.name} does not come back")
            time.sleep(0.2)


class Sshfs(GuestMount):
    """``ssh guest sshfs -o passive`` and sftp-server, back to back."""

    def __init__(self, instance: Instance, shared: Path, key: Path, port: int) -> None:
        super().__init__(instance, "sshfs")
        self._shared = shared
        self._key = key
        self._port = port
        self._log = instance.directory / "sshfs.log"
        self._connection = contextlib.ExitStack()

    def mount(self) -> None:
        self.close()
        self._run(self._unmount())
        server = find_sftp_server()
        assert server is not None
        command = f"exec sshfs :{shlex.quote(str(self._shared))} {self.point} -o passive,allow_other"
        with contextlib.ExitStack() as stack:
            stack.enter_context(joined(ssh.command(self._key, self._port, command), [server], self._log))
            self._wait()
            self._connection = stack.pop_all()

    def close(self) -> None:
        self._connection.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + MOUNT_TIMEOUT
        while "fuse.sshfs" not in self._run(f"findmnt -n -o FSTYPE {self.point} || true"):
            if time.monotonic() > deadline:
                raise PeerFailed(f"sshfs did not mount; see {self._log}")
            time.sleep(0.2)


@contextlib.contextmanager
def joined(first: list[str], second: list[str], log: Path) -> Iterator[None]:
    """Two processes, the stdin and stdout of each being those of the other."""
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack, log.open("ab") as errors:
        with ours, theirs:
            for command, end in ((first, ours), (second, theirs)):
                process = processes.spawn(command, stdin=end, stdout=end, stderr=errors)
                stack.callback(processes.end, process)
        yield


def sshfs(instance: Instance, shared: Path, port: int) -> Sshfs:
    """Install sshfs in the guest and let this host in; raises ``PeerFailed``."""
    try:
        status = instance.guest("cat /var/lib/dpkg/status")
        packages = guest_packages.fetch(["sshfs"], recipes.load(), status, instance.directory / "packages")
        install(instance, packages)
        key = ssh.authorize(instance)
    except (InstanceFailed, guest_packages.PackagesUnavailable) as error:
        raise PeerFailed(f"sshfs cannot be installed in the guest: {error}") from None
    return Sshfs(instance, shared, key, port)


def install(instance: Instance, packages: list[Path]) -> None:
    """dpkg's way, without the pages that nobody reads there."""
    folder = packages[0].parent
    archive = subprocess.run(
        ["tar", "-c", "-C", str(folder), *(package.name for package in packages)],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    script = (
        "mkdir -p /run/bench-packages; cd /run/bench-packages; tar -x; "
        "DEBIAN_FRONTEND=noninteractive dpkg --force-unsafe-io -i ./*.deb >&2; rm -r /run/bench-packages"
    )
    instance.guest(script, timeout=300, input=archive)


def offered(
    instance: Instance, shared: Path, port: int, names: list[str]
) -> tuple[list[Peer], dict[str, str]]:
    """The peers ``names`` that the running ``instance`` can have, and why it cannot have the others."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    instance.guest(f"mkdir -p {DATA}")
    for name in names:
        try:
            if name == "sshfs":
                peers.append(sshfs(instance, shared, port))
            elif name == "virtiofs":
                peers.append(Virtiofs(instance))
            elif name == "ext4":
                peers.append(Ext4(instance, shared))
            else:
                peers.append(Agentctl(instance))
        except PeerFailed as error:
            missing[name] = str(error)
    return peers, missing
