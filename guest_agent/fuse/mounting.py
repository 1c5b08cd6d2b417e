"""mount(2) of shares.

The laws:
- A path may lead through a share that this very process serves (a mount inside of a mount). A thread that
  walks it waits for an answer of its own process; killed in that moment, the process never ends, for the
  thread keeps the descriptor open that would end its wait. So such a walk is a child's work, with a time
  limit, and the calling thread is a worker's, never the one that serves.
- Only what is ours is ever unmounted, and lazily: its users keep what they have open.
- A mount that has to give way for a moment keeps its superblock: it is detached and attached again, so that who
  still uses it in its old place shares the cache, and the fate, of who walks there anew.
- The superblock of a read-only share is writable and its *mount* is not: what is shown read-only can still
  raise events and be written to by the server's own means.
- An ordinary user mounts and unmounts (``fusermount``), and cannot do anything else here: what cannot be changed in
  its place is taken off and mounted anew by whoever asks.

Sources: mount(2), umount2(2), open_tree(2), move_mount(2); for options Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from guest_agent.fuse import fusermount
from guest_agent.fuse.mountinfo import (
    FILE_SYSTEM,
    SOURCE_PREFIX,
    Mount,
    leads_through_a_share,
    mounted_shares,
    read_mounts,
)

log = logging.getLogger(__name__)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

READ_AHEAD = 1 << 20
"""Bytes that the kernel reads ahead of a program that reads in order: the most that one READ asks for, so that a large
file costs one message for each. Its own 128 KiB are made for disks that answer within 0.1 ms."""

SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSCONFIG, SYS_FSPICK = 428, 429, 431, 433
"""On all architectures, as every system call since Linux 5.0; the C library has had them since glibc 2.36 only."""
AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_RECURSIVE = -100, 0x100, 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_SYMLINKS = 0x4, 0x10
FSPICK_CLOEXEC, FSPICK_NO_AUTOMOUNT = 1, 4
FSCONFIG_CMD_RECONFIGURE = 7

CHILD_TIMEOUT = 60.0
"""Seconds for a mount inside of another share: twice as long as that one waits for an absent host."""

DEVICE = "/dev/fuse"

CONNECTIONS = "/sys/fs/fuse/connections"
"""Where the kernel lets the owner of a mount end it (Documentation/filesystems/fuse.rst, "Control filesystem")."""

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


def outermost_first(specs: Iterable[MountSpec]) -> list[MountSpec]:
    """An order in which no mount hides one made before it; to unmount, the reverse. Otherwise as given."""
    return sorted(specs, key=lambda spec: spec.path.rstrip("/").count("/"))


# --- mounting ------------------------------------------------------------------------------------------


def is_root() -> bool:
    """Whether mounts are ours to make and change; else ``fusermount`` makes them, and nobody changes them."""
    return os.geteuid() == 0


def read_ahead(device: int) -> None:
    """Let the kernel read ``READ_AHEAD`` ahead on the mount whose superblock has ``device`` as its minor number.

    After INIT, which can only lower it. Root alone may set it.
    """
    if not is_root():
        return
    try:
        with open(f"/sys/class/bdi/0:{device}/read_ahead_kb", "w") as setting:
            setting.write(str(READ_AHEAD >> 10))
    except OSError as error:  # slower, and right all the same
        log.warning("mounting.read_ahead device=%d error=%s", device, error.strerror)


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
        _in_child([fd], "mount", str(fd), str(spec.share), spec.path, _mode(spec.read_only))
    else:
        _mount_here(fd, spec)
    return _device(spec, mounted_shares(read_mounts()))


def mount_afresh(spec: MountSpec) -> tuple[int, int]:
    """As ``mount``, by whoever we are; returns the device, which is the caller's, and the superblock's minor number.

    Raises ``MountError``, and ``OSError`` if there is no /dev/fuse.
    """
    if not is_root():
        return _mount_as_user(spec)
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return fd, mount(fd, spec)
    except BaseException:
        os.close(fd)
        raise


def _mount_as_user(spec: MountSpec) -> tuple[int, int]:
    check_path(spec.path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if not leads_through_a_share(spec.path, read_mounts()):
            _mount_as_user_here(theirs, spec)
        elif fusermount.may_allow_other():
            keeper = theirs.fileno()
            _in_child([keeper], "hand-over", str(keeper), str(spec.share), spec.path, _mode(spec.read_only))
        else:
            # fusermount3 walks as root, to whom the kernel does not show another user's share.
            raise MountError(
                f"{spec.path} is inside of another share: without root that takes user_allow_other in "
                f"{fusermount.CONFIGURATION} on the machine"
            )
        theirs.close()
        try:
            fd = fusermount.take(ours)
        except fusermount.Refused as error:
            raise MountError(f"{spec.path} cannot be mounted: {error}") from error
    try:
        return fd, _device(spec, mounted_shares(read_mounts()))
    except BaseException:
        os.close(fd)
        raise


def _mount_as_user_here(keeper: socket.socket, spec: MountSpec) -> None:
    make_mountpoint(spec.path)
    try:
        said = fusermount.options(spec.source, FILE_SYSTEM, read_only=spec.read_only)
        fusermount.mount(spec.path, said, keeper)
    except fusermount.Refused as error:
        raise MountError(f"{spec.path} cannot be mounted: {error}") from error


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
            _begin_as(spec.path, True)
    except OSError as error:
        raise MountError(f"{spec.path} cannot be mounted: {error.strerror}") from error


def make_mountpoint(path: str) -> None:
    """Make sure that there is a directory at ``path``. Raises ``MountError``."""
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MountError(f"{path} exists in the guest and is not a directory") from error
    except PermissionError as error:
        raise MountError(
            f"{path} cannot be made in the guest: {error.strerror}"
            + ("" if is_root() else "; mount it elsewhere, or have root make it there and give it to you")
        ) from error
    except OSError as error:
        raise MountError(f"{path} cannot be made in the guest: {error.strerror}") from error


def _begin_as(path: str, read_only: bool) -> None:
    """Of a mount that is new at ``path``: it is as it should be, or is not."""
    try:
        _set_read_only(path, read_only)
    except OSError:
        _umount(path, MNT_DETACH)
        raise


def _set_read_only(path: str, read_only: bool) -> None:
    """Only this mount; the superblock knows nothing of it (mount(2), MS_REMOUNT | MS_BIND)."""
    flags = MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | (MS_RDONLY if read_only else 0)
    _mount("none", path, "none", flags, "")


def unmount(path: str, *, force: bool = False) -> None:
    """Take our mount off ``path``, lazily; with ``force`` end the whole connection with it.

    Nothing if there is none of ours. Blocking as ``mount`` is. Raises ``MountError``.
    """
    mounts = read_mounts()
    if not _is_ours(path, mounts):
        return
    if leads_through_a_share(path, mounts):
        _in_child([], "unmount", path, "force" if force else "lazy")
    else:
        _unmount_here(path, force)


def _is_ours(path: str, mounts: list[Mount]) -> bool:
    """Whether there is a mount of ours at ``path``. Raises ``MountError`` if something is mounted over it."""
    here = [mount for mount in mounts if mount.path == path]
    if not any(mount.share is not None for mount in here):
        return False
    if here[-1].share is None:
        raise MountError(f"{here[-1].source} ({here[-1].kind}) is mounted over {path}")
    return True


def _unmount_here(path: str, force: bool) -> None:
    if not is_root():
        return _unmount_as_user(path, force)
    try:
        _umount(path, UMOUNT_NOFOLLOW | MNT_DETACH | (MNT_FORCE if force else 0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody else was faster
            raise MountError(f"{path} cannot be unmounted: {error.strerror}") from error
    return None


def _unmount_as_user(path: str, force: bool) -> None:
    if force:
        for mount in mounted_shares(read_mounts()):
            if mount.path == path:
                _abort(mount.device)
    try:
        fusermount.unmount(path)
    except fusermount.Refused as error:
        if any(
            mount.path == path for mount in mounted_shares(read_mounts())
        ):  # else somebody else was faster
            raise MountError(f"{path} cannot be unmounted: {error}") from error


def _abort(device: int) -> None:
    """End a connection that is ours, where the kernel offers it; without that it ends with its last descriptor."""
    with suppress(OSError), open(f"{CONNECTIONS}/{device}/abort", "w") as switch:
        switch.write("1")


# --- making room -----------------------------------------------------------------------------------------


def detach(path: str) -> int:
    """Take our mount off ``path``, with all that others have mounted in it, and keep it for ``attach``.

    Returns a descriptor that is the caller's; when it is closed before that, the mount is gone. Blocking as
    ``mount`` is. Raises ``MountError``, also where the kernel cannot (before Linux 5.2).
    """
    mounts = read_mounts()
    if not _is_ours(path, mounts):
        raise MountError(f"{path} was unmounted by somebody else")
    _only_root(f"{path} cannot be detached")
    if not leads_through_a_share(path, mounts):
        return _detach_here(path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _in_child([theirs.fileno()], "detach", path, str(theirs.fileno()))
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    return fds[0]


def _detach_here(path: str, keeper: socket.socket | None = None) -> int:
    """With ``keeper`` the descriptor is sent there before there is nothing else left of the mount."""
    try:
        tree = _open_tree(path)
        if keeper is not None:
            socket.send_fds(keeper, [b"."], [tree])
    except OSError as error:
        raise MountError(f"{path} cannot be detached: {error.strerror}") from error
    _unmount_here(path, force=False)
    return tree


def attach(tree: int, spec: MountSpec) -> None:
    """Mount what ``detach`` has kept, as ``spec`` says; the superblock is the one of before.

    As ``mount`` is in all else. ``tree`` may be closed afterwards, and must be. Raises ``MountError``.
    """
    check_path(spec.path)
    if leads_through_a_share(spec.path, read_mounts()):
        _in_child([tree], "attach", str(tree), spec.path, _mode(spec.read_only))
    else:
        _attach_here(tree, spec.path, spec.read_only)


def _attach_here(tree: int, path: str, read_only: bool) -> None:
    make_mountpoint(path)
    try:
        _move_mount(tree, path)
        _begin_as(path, read_only)
    except OSError as error:
        raise MountError(f"{path} cannot be mounted again: {error.strerror}") from error


def set_read_only(path: str, read_only: bool) -> bool:
    """Make the mount at ``path`` read-only, or writable, for all who use it.

    False, and nothing done, while files in it are open for writing. Blocking as ``mount`` is. Raises ``MountError``.
    """
    mounts = read_mounts()
    if not _is_ours(path, mounts):
        raise MountError(f"{path} was unmounted by somebody else")
    _only_root(f"{path} cannot be made {_mode(read_only)}")
    if not leads_through_a_share(path, mounts):
        return _change_mode_here(path, read_only)
    try:
        _in_child([], "mode", path, _mode(read_only))
    except _Busy:
        return False
    return True


def _change_mode_here(path: str, read_only: bool) -> bool:
    try:
        _set_read_only(path, read_only)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise MountError(f"{path} cannot be made {_mode(read_only)}: {error.strerror}") from error
    return True


def _only_root(failure: str) -> None:
    if not is_root():
        raise MountError(f"{failure}: only root changes a mount")


def _mode(read_only: bool) -> str:
    return "ro" if read_only else "rw"


# --- forgetting --------------------------------------------------------------------------------------------


def purge(path: str) -> None:
    """Have the kernel drop every name below the mount at ``path`` that nobody uses, and all those that are not there.

    That is a part of each change of a superblock's settings (reconfigure_super, fs/super.c), also where nothing is
    changed. Not by mount(2), which would change the mount's own flags as well. It writes dirty pages first, so it waits
    for this very process: in a child. Raises ``MountError``.
    """
    _in_child([], "purge", path)


def _purge_here(path: str) -> None:
    try:
        context = _fspick(path)
        try:
            _reconfigure(context)
        finally:
            os.close(context)
    except OSError as error:
        raise MountError(f"{path} cannot be purged: {error.strerror}") from error


# --- system calls ----------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)  # calls through it let other threads run


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    encoded = [os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()):
        raise _os_error()


def _umount(target: str, flags: int) -> None:
    if _libc.umount2(os.fsencode(target), flags):
        raise _os_error()


def _open_tree(path: str) -> int:
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW
    tree: int = _libc.syscall(
        ctypes.c_long(SYS_OPEN_TREE), ctypes.c_int(AT_FDCWD), os.fsencode(path), ctypes.c_uint(flags)
    )
    if tree < 0:
        raise _os_error()
    return tree


def _move_mount(tree: int, target: str) -> None:
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS
    source, destination = (ctypes.c_int(tree), b""), (ctypes.c_int(AT_FDCWD), os.fsencode(target))
    if _libc.syscall(ctypes.c_long(SYS_MOVE_MOUNT), *source, *destination, ctypes.c_uint(flags)):
        raise _os_error()


def _fspick(path: str) -> int:
    flags = FSPICK_CLOEXEC | FSPICK_NO_AUTOMOUNT
    context: int = _libc.syscall(
        ctypes.c_long(SYS_FSPICK), ctypes.c_int(AT_FDCWD), os.fsencode(path), ctypes.c_uint(flags)
    )
    if context < 0:
        raise _os_error()
    return context


def _reconfigure(context: int) -> None:
    nothing = (None, None, ctypes.c_int(0))
    command = ctypes.c_uint(FSCONFIG_CMD_RECONFIGURE)
    if _libc.syscall(ctypes.c_long(SYS_FSCONFIG), ctypes.c_int(context), command, *nothing):
        raise _os_error()


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


# --- a walk through our own mounts: in a child -----------------------------------------------------------


_BUSY = 3
"""The exit code that says what ``set_read_only`` says with False."""


class _Busy(Exception):
    """A child has ended with ``_BUSY``."""


def _in_child(fds: list[int], *arguments: str) -> None:
    """Run ``main`` in a process of its own, which may hang without harm. Raises ``MountError``."""
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
        path = next(argument for argument in arguments if argument.startswith("/"))
        raise MountError(f"{path}: the share around it does not answer") from None
    if child.returncode == _BUSY:
        raise _Busy
    if child.returncode:
        raise MountError(os.fsdecode(said).strip().rpartition("\n")[2] or f"exit code {child.returncode}")


def main(arguments: list[str]) -> int:
    """``mount FD SHARE PATH ro|rw``, ``hand-over SOCKET SHARE PATH ro|rw``, ``unmount PATH lazy|force``,
    ``detach PATH SOCKET``, ``attach FD PATH ro|rw``, ``mode PATH ro|rw`` or ``purge PATH``."""
    try:
        match arguments:
            case ["mount", fd, share, path, mode]:
                _mount_here(int(fd), MountSpec(int(share), path, read_only=mode == "ro"))
            case ["hand-over", keeper, share, path, mode]:
                with socket.socket(fileno=int(keeper)) as kept:
                    _mount_as_user_here(kept, MountSpec(int(share), path, read_only=mode == "ro"))
            case ["unmount", path, how]:
                _unmount_here(path, how == "force")
            case ["detach", path, keeper]:
                with socket.socket(fileno=int(keeper)) as kept:
                    os.close(_detach_here(path, kept))
            case ["attach", tree, path, mode]:
                _attach_here(int(tree), path, mode == "ro")
            case ["purge", path]:
                _purge_here(path)
            case ["mode", path, mode]:
                return 0 if _change_mode_here(path, mode == "ro") else _BUSY
            case _:
                raise MountError(f"unknown arguments {arguments}")
    except MountError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
