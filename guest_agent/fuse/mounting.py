"""mount(2) of shares, and what of ours is mounted where, from /proc/self/mountinfo.

The laws:
- A path may lead through a share that this very process serves (a mount inside of a mount). A thread that
  walks it waits for an answer of its own process; killed in that moment, the process never ends, for the
  thread keeps the descriptor open that would end its wait. So such a walk is a child's work, with a time
  limit, and the calling thread is a worker's, never the one that serves.
- Only what is ours is ever unmounted, and lazily: its users keep what they have open.
- The superblock of a read-only share is writable and its *mount* is not: what is shown read-only can still
  raise events and be written to by the server's own means.

Formats: mount(2), umount2(2), proc_pid_mountinfo(5); options of Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

FILE_SYSTEM = "fuse.agentctl"
SOURCE_PREFIX = "agentctl-"
MOUNTINFO = "/proc/self/mountinfo"

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

CHILD_TIMEOUT = 60.0
"""Seconds for a mount inside of another share: twice as long as that one waits for an absent host."""

_MODULE = "guest_agent.fuse.mounting"
"""Our own name, also where we are ``__main__``."""


@dataclass(frozen=True, slots=True)
class MountSpec:
    """A share to be mounted: its id, and where (an absolute path). ``host_locks``: locks reach the server."""

    share: int
    path: str
    read_only: bool = False
    host_locks: bool = False

    @property
    def source(self) -> str:
        """What stands for the device in mountinfo, findmnt(8) and df(1)."""
        return f"{SOURCE_PREFIX}{self.share}"


class MountError(Exception):
    """Why a share cannot be mounted or unmounted, as a sentence."""


# --- mountinfo -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. ``device`` is the superblock's minor number (all of FUSE's have major 0)."""

    device: int
    root: str
    path: str
    read_only: bool
    kind: str
    source: str

    @property
    def share(self) -> int | None:
        """The share's id if this is a whole share; a bind mount of a part of one (a container's) is not.

        A bind mount of all of it cannot be told from what we made, but comes later in the list.
        """
        number = self.source.removeprefix(SOURCE_PREFIX)
        if self.kind != FILE_SYSTEM or self.root != "/" or not (number.isascii() and number.isdigit()):
            return None
        return int(number)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """All mounts, in the order of the kernel's list: of several at one path the last is the one that is seen."""
    return [_parse_line(line.split(b" ")) for line in text.splitlines()]


def _parse_line(fields: list[bytes]) -> Mount:
    separator = fields.index(b"-", 6)  # optional fields (propagation) stand before it
    return Mount(
        device=int(fields[2].partition(b":")[2]),
        root=_unescape(fields[3]),
        path=_unescape(fields[4]),
        read_only=b"ro" in fields[5].split(b","),
        kind=_unescape(fields[separator + 1]),
        source=_unescape(fields[separator + 2]),
    )


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(field: bytes) -> str:
    r"""Blank, tab, newline and backslash are written as ``\040`` and so on."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def read_mounts() -> list[Mount]:
    """What is mounted in our mount namespace."""
    with open(MOUNTINFO, "rb") as file:
        return parse_mountinfo(file.read())


def mounted_shares(mounts: Iterable[Mount]) -> list[Mount]:
    """Those that are ours."""
    return [mount for mount in mounts if mount.share is not None]


def outermost_first(specs: Iterable[MountSpec]) -> list[MountSpec]:
    """An order in which no mount hides one made before it; to unmount, the reverse. Otherwise as given."""
    return sorted(specs, key=lambda spec: spec.path.rstrip("/").count("/"))


def is_below(path: str, directory: str) -> bool:
    """Whether ``path`` is inside of ``directory``, by its name."""
    return path.startswith(directory.rstrip("/") + "/") and path.rstrip("/") != directory.rstrip("/")


def leads_through_a_share(path: str, mounts: Iterable[Mount]) -> bool:
    """Whether walking to ``path`` asks a server of ours."""
    return any(is_below(path, mount.path) for mount in mounts if mount.kind == FILE_SYSTEM)


# --- mounting ------------------------------------------------------------------------------------------


def check_path(path: str) -> None:
    """Raises ``MountError`` for a path that no share can be at."""
    if not path.startswith("/") or "\0" in path or os.path.normpath(path) != path:
        raise MountError(f"{path!r} is not an absolute path in its simplest form")
    if path in ("/", "//"):
        raise MountError("a share cannot replace the root of the guest")


def mount(fd: int, spec: MountSpec) -> int:
    """Mount ``spec`` with ``fd``, an open /dev/fuse; returns the superblock's minor number.

    Directories that are missing are made. Does not wait for whoever serves ``fd``, but perhaps for another
    share's server: for a worker thread. Raises ``MountError``.
    """
    check_path(spec.path)
    if leads_through_a_share(spec.path, read_mounts()):
        _in_child([fd], "mount", str(fd), str(spec.share), spec.path, "ro" if spec.read_only else "rw")
    else:
        _mount_here(fd, spec)
    return _device(spec, mounted_shares(read_mounts()))


def _device(spec: MountSpec, mounts: list[Mount]) -> int:
    """The superblock at ``spec``'s path; or, if symlinks lead there, the share's newest."""
    own = [mount for mount in mounts if mount.share == spec.share]
    here = [mount for mount in own if mount.path == spec.path] or own
    if not here:
        raise MountError(f"{spec.path} was unmounted at once by somebody else")
    return here[-1].device


def _mount_here(fd: int, spec: MountSpec) -> None:
    make_mountpoint(spec.path)
    options = (
        f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions,allow_other"
    )
    try:
        _mount(spec.source, spec.path, FILE_SYSTEM, MS_NOSUID | MS_NODEV, options)
        if spec.read_only:
            _make_read_only(spec.path)
    except OSError as error:
        raise MountError(f"{spec.path} cannot be mounted: {error.strerror}") from error


def make_mountpoint(path: str) -> None:
    """Make sure that there is a directory at ``path``. Raises ``MountError``."""
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MountError(f"{path} exists in the guest and is not a directory") from error
    except OSError as error:
        raise MountError(f"{path} cannot be made in the guest: {error.strerror}") from error


def _make_read_only(path: str) -> None:
    """Only this mount; the superblock knows nothing of it (mount(2), MS_REMOUNT | MS_BIND)."""
    try:
        _mount("none", path, "none", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "")
    except OSError:
        _umount(path, MNT_FORCE | MNT_DETACH)
        raise


def unmount(path: str, *, force: bool = False) -> None:
    """Take our mount off ``path``, lazily; with ``force`` end the whole connection with it.

    Nothing if there is none of ours. Blocking as ``mount`` is. Raises ``MountError``.
    """
    mounts = read_mounts()
    here = [mount for mount in mounts if mount.path == path]
    if not any(mount.share is not None for mount in here):
        return
    if here[-1].share is None:
        raise MountError(f"{here[-1].source} ({here[-1].kind}) is mounted over {path}")
    if leads_through_a_share(path, mounts):
        _in_child([], "unmount", path, "force" if force else "lazy")
    else:
        _unmount_here(path, force)


def _unmount_here(path: str, force: bool) -> None:
    try:
        _umount(path, UMOUNT_NOFOLLOW | MNT_DETACH | (MNT_FORCE if force else 0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody else was faster
            raise MountError(f"{path} cannot be unmounted: {error.strerror}") from error


# --- system calls ----------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)  # calls through it let other threads run


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    encoded = [os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()):
        raise _os_error()


def _umount(target: str, flags: int) -> None:
    if _libc.umount2(os.fsencode(target), flags):
        raise _os_error()


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


# --- a walk through our own mounts: in a child -----------------------------------------------------------


def _in_child(fds: list[int], *arguments: str) -> None:
    """Run ``main`` in a process of its own, which may hang without harm. Raises ``MountError``."""
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # -P and -S: nothing but our own package and the standard library.
    # -P and -S: nothing but our own package and the standard library.
    command = [sys.executable, "-P", "-S", "-m", _MODULE, *arguments]
    environment = {**os.environ, "PYTHONPATH": package_root}
    child = subprocess.Popen(
        command,
        pass_fds=fds,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    try:
        _, said = child.communicate(timeout=CHILD_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()  # and no wait for its end: it may take as long as the answer it waits for
        child.stderr.close()
        raise MountError(f"{arguments[-2]}: the share around it does not answer") from None
    if child.returncode:
        raise MountError(os.fsdecode(said).strip().rpartition("\n")[2] or f"exit code {child.returncode}")


def main(arguments: list[str]) -> int:
    """``mount FD SHARE PATH ro|rw`` or ``unmount PATH lazy|force``."""
    try:
        match arguments:
            case ["mount", fd, share, path, mode]:
                _mount_here(int(fd), MountSpec(int(share), path, read_only=mode == "ro"))
            case ["unmount", path, how]:
                _unmount_here(path, how == "force")
            case _:
                raise MountError(f"unknown arguments {arguments}")
    except MountError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
