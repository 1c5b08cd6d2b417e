"""The disks of one boot: a throw-away overlay, the durable data disk, the guest agent's drive.

The law: the data disk is created, grown, and never anything else; nothing here can shorten or replace it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from host_agent import sizes
from host_agent.errors import ExitCode, UserError
from host_agent.files import write_atomically
from host_agent.paths import InstancePaths
from provision import bundle
from provision.image import Image


def prepare(paths: InstancePaths, image: Image, disk_size: int) -> None:
    """Make the disks of the next boot; ``disk_size`` in bytes. Raises ``UserError``."""
    try:
        make_overlay(paths.root_overlay, image.root)
        make_data_disk(paths.data_disk, disk_size)
        grow_data_disk(paths.data_disk, disk_size)
        write_atomically(paths.agent_drive, bundle.build())
    except OSError as error:
        raise UserError(
            f"cannot write the disks of instance {paths.name}: {error.strerror or error}",
            f"free some space where {paths.directory} is, and try again",
            ExitCode.RESOURCES,
        ) from error


def make_overlay(overlay: Path, base: Path) -> None:
    """A fresh qcow2 overlay of ``base``; whatever the last boot wrote to its own is gone."""
    program = shutil.which("qemu-img")
    if program is None:
        raise UserError(
            "qemu-img is missing", "install it: sudo apt-get install qemu-utils", ExitCode.DEPENDENCY
        )
    overlay.unlink(missing_ok=True)
    result = subprocess.run(
        [program, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(overlay)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(
            f"qemu-img could not make the root overlay: {result.stderr.strip() or result.returncode}",
            f"free some space where {overlay.parent} is, and try again",
            ExitCode.RESOURCES,
        )
    overlay.chmod(0o600)


def make_data_disk(disk: Path, size: int) -> None:
    """Make the data disk with its filesystem, sparse; nothing happens if there is one.

    The filesystem is made here and not in the guest, beside the disk's final name: a start that is cut off at
    any moment leaves a whole disk or none, and the guest never has to decide whether to format something.
    """
    if disk.exists():
        return
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise UserError(
            "mke2fs is missing", "install it: sudo apt-get install e2fsprogs", ExitCode.DEPENDENCY
        )
    new = disk.with_name(f"{disk.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        options = ["-q", "-F", "-t", "ext4", "-L", "agentctl-data", "-m", "0"]
        lazy = "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
        result = subprocess.run(
            [program, *options, "-E", lazy, str(new)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise UserError(
                f"mke2fs could not make the data disk: {result.stderr.strip() or result.returncode}",
                f"free some space where {disk.parent} is, and try again",
                ExitCode.RESOURCES,
            )
        os.fsync(descriptor)
        new.rename(disk)
    finally:
        os.close(descriptor)
        new.unlink(missing_ok=True)


def grow_data_disk(disk: Path, size: int) -> None:
    """Make the data disk larger; the guest grows its filesystem when it sees it."""
    descriptor = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        current = os.fstat(descriptor).st_size
        if size < current:
            raise UserError(
                f"the disk has {sizes.show(current)} and never shrinks; asked for {sizes.show(size)}",
                f"--disk {sizes.flag(current)} or more",
                ExitCode.RESOURCES,
            )
        if size > current:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
