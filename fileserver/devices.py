"""What the filesystems below a share can be believed, by their device.

The laws:
- What is the kernel's own (proc and its like) is not the share's: EACCES.
- A filesystem is believed only what it is known to keep. A rare one that is not listed here costs its user speed,
  never a change that goes unseen.
- The numbers of devices that are no disks (network, FUSE, memory) are given out again after an unmount, so what is
  known of them is forgotten once a second.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from fileserver import linux
from fileserver.linux import Status, failure
from fileserver.nodes import Key
from fileserver.signatures import COARSE_NS, NEVER_NS, UNSETTLED_NS

KERNEL_FILESYSTEMS: Final = frozenset(
    {
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x64626720,  # debugfs
        0x74726163,  # tracefs
        0x73636673,  # securityfs
        0xF97CFF8C,  # selinuxfs
        0x62656570,  # configfs
        0x0027E0EB,  # cgroup
        0x63677270,  # cgroup2
        0xCAFE4A11,  # bpf
        0x6165676C,  # pstore
        0xDE5E81E4,  # efivarfs
        0x42494E4D,  # binfmt_misc
        0x65735543,  # fusectl
        0x6E736673,  # nsfs
        0x1CD1,  # devpts
        0x19800202,  # mqueue
    }
)
"""f_type of what is no disk but the kernel (include/uapi/linux/magic.h): the memory of this very process is a file
in proc."""

_OVERLAYFS: Final = 0x794C7630
_TMPFS: Final = 0x01021994

_FINE: Final = frozenset(
    {
        0xEF53,  # ext4, and ext2 and ext3, whose stamps are whole seconds: ``signatures`` sees that by itself
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0xCA451A4E,  # bcachefs
        0x2FC12FC1,  # zfs
        _TMPFS,
        0x858458F6,  # ramfs
        _OVERLAYFS,
        0x3434,  # nilfs2
        0x3153464A,  # jfs
    }
)
"""Local, and each change gets an mtime and a ctime as of the last tick, or finer."""

_COARSE: Final = frozenset(
    {
        0x482B,  # HFS+: seconds
        0x7366746E,  # ntfs3: 100 ns
        0x52654973,  # reiserfs: seconds
        0x15013346,  # UDF: microseconds
        0xF15F,  # ecryptfs: those of what is below it
        0x9660,  # ISO 9660, and the other images that nobody can change
        0x73717368,  # squashfs
        0xE0F5E1E2,  # erofs
        0x28CD3D45,  # cramfs
    }
)
"""Local, with an mtime and a ctime of its own, of at most two seconds. Not FAT, exFAT and HFS: their ctime is the
mtime, so content whose mtime was set back (``cp -p``) looks as it was before."""


_TELLING: Final = frozenset(
    {
        0xEF53,  # ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0xCA451A4E,  # bcachefs
        _TMPFS,
    }
)
"""Nothing changes on them but through this machine's kernel and by an operation that fanotify(7) tells of. Not
overlayfs: a file has another handle once it is copied up. Not zfs: a rollback changes files without a word."""


@dataclass(frozen=True, slots=True)
class Device:
    """``births``: the time of birth tells files apart. ``unsettled_ns``: for so long after a change may the time stamps
    stay the same over the next one (``signatures``). ``accounts``: what it says is
    free can be written, but for a user's quota: it is local, and write(2) fails at once where there is no space."""

    births: bool
    unsettled_ns: int
    accounts: bool = False


def described(filesystem: int) -> Device:
    """What is known of an f_type. Network filesystems and FUSE are of those of which nothing is: their stamps are
    another machine's, as it was when it was last asked."""
    if filesystem in _FINE:
        unsettled = UNSETTLED_NS
    elif filesystem in _COARSE:
        unsettled = COARSE_NS
    else:
        unsettled = NEVER_NS
    # Copying a file up gives it another time of birth on overlayfs.
    return Device(filesystem != _OVERLAYFS, unsettled, tells(filesystem))


def tells(filesystem: int) -> bool:
    """Whether fanotify(7) hears of all that happens on a filesystem of this f_type. Network filesystems and FUSE take
    marks just as well, and say nothing of what others do."""
    return filesystem in _TELLING


def is_memory(filesystem: int) -> bool:
    """Whether a filesystem of this f_type waits for no disk of its own."""
    return filesystem == _TMPFS


class Devices:
    """Those below one share. Thread-safe: entries are only added, or all forgotten at once."""

    def __init__(self) -> None:
        self._known: dict[int, Device] = {}

    def of(self, device: int, descriptor: int) -> Device:
        """The device of the file behind ``descriptor``. Raises EACCES for what is the kernel's: somebody has mounted
        /proc below the share, in a chroot(2) say."""
        known = self._known.get(device)
        if known is None:
            filesystem = linux.filesystem_type(descriptor)
            if filesystem in KERNEL_FILESYSTEMS:
                raise failure(errno.EACCES)
            known = self._known[device] = described(filesystem)
        return known

    def key(self, status: Status, descriptor: int) -> Key:
        """The identity of the file behind ``descriptor``. Raises as ``of``."""
        device = status.device
        return device, status.ino, status.birth_ns() if self.of(device, descriptor).births else 0

    def is_key(self, key: Key, status: Status) -> bool:
        """Whether ``status`` is of the file ``key``. Also False if that cannot be told without a descriptor."""
        return key == self.known_key(status)

    def known_key(self, status: Status) -> Key | None:
        """The identity of a file, if it can be told without a descriptor."""
        device = status.device
        known = self._known.get(device)
        return None if known is None else (device, status.ino, status.birth_ns() if known.births else 0)

    def forget(self) -> None:
        """To be called once a second."""
        self._known = {}
