"""The shares that are mounted: brought to what the host wants, taken over from a killed predecessor, served.

The laws:
- One share that cannot be mounted is a sentence in its report, and no other's trouble.
- A mount is served until the kernel says that nobody has it any more: what was unmounted lazily may still be
  in use by a container.
- The descriptor of each mount is in systemd's store for as long as the mount is there. Only its end, or this
  agent's orderly one, takes it out: whatever else ends this process, a successor goes on.
- A path may lead through a share of ours. Mounting is a worker thread's work, while this one serves.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from guest_agent import fdstore
from guest_agent.fdstore import StoredConnection, StoredDescriptor
from guest_agent.fuse import mounting
from guest_agent.fuse.abi import Negotiated
from guest_agent.fuse.device import Connection
from guest_agent.fuse.filesystem import Filesystem
from guest_agent.fuse.host import Host
from guest_agent.fuse.mounting import Mount, MountError, MountSpec
from guest_agent.fuse.notifier import Notifiers
from guest_agent.fuse.operation import Timers
from guest_agent.fuse.volume import SALT_BITS, Volume
from protocol.files import MountReport, MountStage, NamesGone, Share

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30.0
"""Seconds for the kernel to say hello on a new mount; it takes a millisecond."""


@dataclass(frozen=True, slots=True, eq=False)
class Mounted:
    """A mount that is served. ``salt``: see ``volume``."""

    share: Share
    connection: Connection
    salt: int


def stored_name(mounted: Mounted) -> str:
    """What a successor must know, as a descriptor's name."""
    return f"{mounted.connection.stored_as().name()},salt={mounted.salt:x}"


def parse_stored_name(name: str) -> tuple[StoredConnection, int] | None:
    """The connection and the salt; None for what is no ``stored_name``."""
    connection = StoredConnection.parse(name)
    salt = re.search(r",salt=([0-9a-f]+)", name)
    return (connection, int(salt[1], 16)) if connection and salt else None


def disturbed(kept: Iterable[Share], changed: Iterable[str]) -> list[Share]:
    """Those of ``kept`` that are below a path where a mount comes or goes: it would hide them, or take them along."""
    paths = list(changed)
    return [share for share in kept if any(mounting.is_below(share.path, path) for path in paths)]


class Mounts:
    """All mounts of this agent; ``nursery`` serves them."""

    def __init__(self, host: Host, notifiers: Notifiers, nursery: trio.Nursery) -> None:
        self._host = host
        self._notifiers = notifiers
        self._nursery = nursery
        self._timers = Timers(nursery)
        self._current: dict[int, Mounted] = {}
        self._volumes: dict[int, Volume] = {}
        self._failed: dict[str, str] = {}
        """Why the last attempt failed, by path."""
        self._arranging = trio.Lock()

    # --- what a predecessor left ---------------------------------------------------------------------

    def adopt(self, descriptors: Iterable[StoredDescriptor]) -> None:
        """Go on serving what was served by an agent that was killed. Takes the descriptors."""
        mounts = mounting.mounted_shares(mounting.read_mounts())
        for descriptor in descriptors:
            if (parsed := parse_stored_name(descriptor.name)) is not None:
                self._adopt(descriptor.fd, *parsed, mounts)
            else:
                # Nobody can serve it: better that its users get an error than that they wait for ever.
                log.warning("mounts.unknown_descriptor name=%s", descriptor.name)
                os.close(descriptor.fd)
                fdstore.remove(descriptor.name)

    def _adopt(self, fd: int, stored: StoredConnection, salt: int, mounts: list[Mount]) -> None:
        here = [mount for mount in mounts if (mount.share, mount.device) == (stored.share, stored.device)]
        # The first is the one that was made by us; others are bind mounts of it, those of Docker's volumes for one.
        path, read_only = (here[0].path, here[0].read_only) if here else ("", False)
        share = Share(stored.share, path, read_only, stored.host_locks)
        negotiated = Negotiated(stored.minor, stored.flags) if stored.minor else None
        connection = Connection.adopt(fd, _spec(share), negotiated, stored.device)
        mounted = Mounted(share, connection, salt)
        if here:
            self._current[share.id] = mounted
        self._nursery.start_soon(self._serve, mounted)
        connection.resend()
        log.info("mounts.adopted share=%d path=%s", share.id, path or "(unmounted, in use)")

    # --- what the host wants -------------------------------------------------------------------------

    async def arrange(self, shares: list[Share]) -> list[MountReport]:
        """Have exactly ``shares`` mounted; the reports are in the same order.

        The host must be there: a path may lead through a share. If it goes meanwhile and takes the caller
        along, the work is done all the same, and nothing is left half mounted.
        """
        reports: list[MountReport] = []
        done = trio.Event()
        self._nursery.start_soon(self._arrange, shares, reports, done)
        await done.wait()
        return reports

    async def _arrange(self, shares: list[Share], reports: list[MountReport], done: trio.Event) -> None:
        async with self._arranging:
            wanted, current = set(shares), {mounted.share for mounted in self._current.values()}
            changed = [share.path for share in current ^ wanted if share.path not in self._failed]
            kept = current & wanted
            kept -= set(disturbed(kept, changed))
            for share in mounting_order(current - kept, innermost_first=True):
                await self._unmount(self._current[share.id])
            result = {share: MountReport(share.id, MountStage.MOUNTED) for share in kept}
            for share in mounting_order(wanted - kept):
                result[share] = await self._try_to_mount(share, kept)
            reports += [result[share] for share in shares]
            done.set()

    async def unmount_all(self) -> None:
        """An orderly end. The outermost go first and take those below along, so that no path is walked that
        the host would have to answer for."""
        async with self._arranging:
            for share in mounting_order([mounted.share for mounted in self._current.values()]):
                mounted = self._current[share.id]
                await self._unmount(mounted)
                fdstore.remove(stored_name(mounted))

    async def _try_to_mount(self, share: Share, kept: set[Share]) -> MountReport:
        reason = self._failed.pop(share.path, "")
        if reason and disturbed(kept, [share.path]):
            # Should it succeed this time, it would hide what is mounted below.
            self._failed[share.path] = reason
            return MountReport(share.id, MountStage.FAILED, reason)
        try:
            await self._mount(share)
        except MountError as error:
            reason = str(error)
        except OSError as error:
            reason = f"FUSE does not work in the guest: {error.filename}: {error.strerror}"
        else:
            log.info("mounts.mounted share=%d path=%s", share.id, share.path)
            return MountReport(share.id, MountStage.MOUNTED)
        log.warning("mounts.failed share=%d path=%s reason=%s", share.id, share.path, reason)
        self._failed[share.path] = reason
        return MountReport(share.id, MountStage.FAILED, reason)

    async def _mount(self, share: Share) -> None:
        """Raises ``MountError``, and ``OSError`` if there is no /dev/fuse."""
        connection = await trio.to_thread.run_sync(_mount_afresh, _spec(share))
        mounted = self._current[share.id] = Mounted(share, connection, random.getrandbits(SALT_BITS))
        self._nursery.start_soon(self._serve, mounted)
        with trio.move_on_after(INIT_TIMEOUT):
            await connection.initialized.wait()
            fdstore.store(connection.fd, stored_name(mounted))
            return
        await self._unmount(mounted)
        raise MountError(f"{share.path}: the guest's kernel did not begin to use the mount")

    async def _unmount(self, mounted: Mounted) -> None:
        del self._current[mounted.share.id]
        try:
            await trio.to_thread.run_sync(mounted.connection.unmount)
            log.info("mounts.unmounted share=%d path=%s", mounted.share.id, mounted.share.path)
        except MountError as error:
            log.warning("mounts.unmount share=%d error=%s", mounted.share.id, error)

    async def drop_names(self, notice: NamesGone) -> None:
        """Let the kernel forget names of files that the host has deleted."""
        await trio.lowlevel.checkpoint()
        if (volume := self._volumes.get(notice.share)) is not None:
            for parent, name in zip(notice.parents, notice.names, strict=False):
                volume.drop_name(parent, name)

    # --- serving -------------------------------------------------------------------------------------

    async def _serve(self, mounted: Mounted) -> None:
        share, connection = mounted.share, mounted.connection
        notifier = self._notifiers.attach(connection)
        volume = Volume(
            share.id,
            self._host,
            notifier,
            self._timers,
            salt=mounted.salt,
            host_locks=share.host_locks,
        )
        self._volumes[share.id] = volume
        try:
            await connection.serve(Filesystem(connection, volume).handle)
        except OSError:
            log.exception("mounts.broken share=%d path=%s", share.id, share.path)
        else:
            log.info("mounts.ended share=%d path=%s", share.id, share.path)
        finally:
            if self._volumes.get(share.id) is volume:
                del self._volumes[share.id]
            self._notifiers.detach(notifier)
            connection.close()
        fdstore.remove(stored_name(mounted))
        if self._current.get(share.id) is mounted:
            await self._heal(mounted)

    async def _heal(self, mounted: Mounted) -> None:
        """A mount has ended that should be there. If it was aborted (umount -f, /sys/fs/fuse/connections), it
        is replaced; if somebody took it away, that is what they want, until the host asks again."""
        share = mounted.share
        async with self._arranging:
            if self._current.get(share.id) is not mounted:
                return
            here = (share.id, mounted.connection.device)
            aborted = any((mount.share, mount.device) == here for mount in mounting.read_mounts())
            log.warning("mounts.lost share=%d path=%s aborted=%s", share.id, share.path, aborted)
            if aborted:
                await self._unmount(mounted)
                await self._try_to_mount(share, set())
            else:
                del self._current[share.id]


def mounting_order(shares: Iterable[Share], *, innermost_first: bool = False) -> list[Share]:
    """An order in which none hides one before it; or, to take them off one by one, the reverse."""
    return sorted(shares, key=lambda share: (share.path.count("/"), share.path), reverse=innermost_first)


def _mount_afresh(spec: MountSpec) -> Connection:
    """Mount, in the place of what a predecessor left there without anybody serving it."""
    mounting.unmount(spec.path, force=True)
    return Connection.mount(spec)


def _spec(share: Share) -> MountSpec:
    return MountSpec(share.id, share.path, share.read_only, share.host_locks)
