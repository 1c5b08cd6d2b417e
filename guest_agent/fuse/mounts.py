"""The shares that are mounted: brought to what the host wants, taken over from a killed predecessor, served.

The laws:
- One share that cannot be mounted is a sentence in its report, and no other's trouble.
- A mount is served until the kernel says that nobody has it any more: what was unmounted lazily may still be
  in use by a container.
- A share whose place stays keeps its superblock, whatever comes or goes around it and whether it may be written
  to: two superblocks of one share would not know of each other's writes. Where the agent is not root it gets another;
  who still uses the one before goes on with that.
- The descriptor of each mount is in systemd's store for as long as the mount is there. Only its end, or this
  agent's orderly one, takes it out: whatever else ends this process, a successor goes on.
- A path may lead through a share of ours. Mounting is a worker thread's work, while this one serves.
- What a predecessor promised of names that are not there nobody knows: with its connection comes a purge. (Only systemd
  keeps connections, and only for root.)
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from zlib import crc32

import trio

from guest_agent import fdstore
from guest_agent.fdstore import StoredConnection, StoredDescriptor
from guest_agent.fuse import mountinfo, mounting
from guest_agent.fuse.abi import Negotiated
from guest_agent.fuse.device import Connection
from guest_agent.fuse.filesystem import Filesystem
from guest_agent.fuse.host import Host
from guest_agent.fuse.landing import Landing
from guest_agent.fuse.mountinfo import Mount
from guest_agent.fuse.mounting import MountError, MountSpec
from guest_agent.fuse.notifier import Notifiers
from guest_agent.fuse.operation import Timers
from guest_agent.fuse.volume import SALT_BITS, Volume
from protocol.files import Changed, MountReport, MountStage, NamesGone, Renewed, Share
from protocol.lane import Lane

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30.0
"""Seconds for the kernel to say hello on a new mount; it takes a millisecond."""

PURGE_AGAIN = 5.0
"""Seconds until a purge that failed is tried again; it does while the host is away and pages are to be written."""


@dataclass(frozen=True, slots=True, eq=False)
class Mounted:
    """A mount that is served. ``salt``: see ``volume``. ``inherited`` from a predecessor, who served it before."""

    share: Share
    connection: Connection
    salt: int
    inherited: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """What a successor must know of a mount: ``path_crc`` tells it from bind mounts of the same superblock."""

    connection: StoredConnection
    salt: int
    path_crc: int | None = None


def stored_name(mounted: Mounted) -> str:
    """A ``Stored``, as a descriptor's name."""
    crc = crc32(os.fsencode(mounted.share.path))
    return f"{mounted.connection.stored_as().name()},salt={mounted.salt:x},path={crc:x}"


def parse_stored_name(name: str) -> Stored | None:
    """None for what is no ``stored_name``."""
    connection = StoredConnection.parse(name)
    salt, crc = (re.search(rf",{key}=([0-9a-f]+)", name) for key in ("salt", "path"))
    if connection is None or salt is None:
        return None
    return Stored(connection, int(salt[1], 16), int(crc[1], 16) if crc else None)


def made_by_us(stored: Stored, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that was stored, among ``mounts``; None if it was taken off, and is at most in use somewhere."""
    here = [
        mount
        for mount in mounts
        if (mount.share, mount.device) == (stored.connection.share, stored.connection.device)
    ]
    # Others are bind mounts of it, those of Docker's volumes for one. Where a symlink leads to it, its path is
    # another than that we know; then the first is taken, for a mount that was never detached comes before them.
    ours = [mount for mount in here if crc32(os.fsencode(mount.path)) == stored.path_crc]
    return next(iter(ours or here), None)


def place(share: Share) -> Share:
    """What must stay the same for a mount to stay: all but whether it may be written to."""
    return replace(share, read_only=False)


def disturbed(kept: Iterable[Share], changed: Iterable[str]) -> list[Share]:
    """Those of ``kept`` that are below a path where a mount comes or goes: it would hide them, or take them along."""
    paths = list(changed)
    return [share for share in kept if any(mountinfo.is_below(share.path, path) for path in paths)]


class Mounts:
    """All mounts of this agent; ``nursery`` serves them."""

    def __init__(
        self,
        host: Host,
        notifiers: Notifiers,
        nursery: trio.Nursery,
        landing: Landing | None = None,
        lane: Lane | None = None,
    ) -> None:
        """``landing``: where the requests of all mounts arrive; ``lane``: where they are read."""
        self._lane = lane
        self._landing = Landing() if landing is None else landing
        self._host = host
        self._notifiers = notifiers
        self._nursery = nursery
        self._timers = Timers(nursery)
        self._current: dict[int, Mounted] = {}
        self._volumes: defaultdict[int, set[Volume]] = defaultdict(set)
        """By share: more than one while a mount that was taken off is still in use."""
        self._serving: Counter[int] = Counter()
        """By share, the connections that are, or are about to be."""
        self._failed: dict[str, str] = {}
        """Why the last attempt failed, by path."""
        self._arranging = trio.Lock()

    # --- what a predecessor left ---------------------------------------------------------------------

    def adopt(self, descriptors: Iterable[StoredDescriptor]) -> None:
        """Go on serving what was served by an agent that was killed. Takes the descriptors."""
        mounts = mountinfo.read_mounts()
        for descriptor in descriptors:
            if (parsed := parse_stored_name(descriptor.name)) is not None:
                self._adopt(descriptor.fd, parsed, mounts)
            else:
                # Nobody can serve it: better that its users get an error than that they wait for ever.
                log.warning("mounts.unknown_descriptor name=%s", descriptor.name)
                os.close(descriptor.fd)
                fdstore.remove(descriptor.name)

    def _adopt(self, fd: int, kept: Stored, mounts: list[Mount]) -> None:
        stored, here = kept.connection, made_by_us(kept, mountinfo.mounted_shares(mounts))
        path, read_only = (here.path, here.read_only) if here else ("", False)
        share = Share(stored.share, path, read_only, stored.host_locks)
        negotiated = Negotiated(stored.minor, stored.flags) if stored.minor else None
        connection = Connection.adopt(fd, _spec(share), negotiated, stored.device)
        mounted = Mounted(share, connection, kept.salt, inherited=True)
        if here:
            self._current[share.id] = mounted
        self._start(mounted)
        self._nursery.start_soon(self._purge, mounted)
        connection.resend()
        log.info("mounts.adopted share=%d path=%s", share.id, path or "(unmounted, in use)")

    async def _purge(self, mounted: Mounted) -> None:
        """Where it is mounted, or a part of it is, for a container. (One that is in use and mounted nowhere is beyond
        reach; whoever has a directory of it open may go on missing a name.)"""
        connection = mounted.connection
        while connection.fd >= 0:
            mounts = mountinfo.read_mounts()
            paths = (mount.path for mount in mounts if mountinfo.is_of(mount, connection.device))
            if (path := next(paths, None)) is None:
                break
            try:
                await trio.to_thread.run_sync(mounting.purge, path)
                log.info("mounts.purged share=%d path=%s", mounted.share.id, path)
                break
            except MountError as error:
                log.warning("mounts.purge share=%d path=%s error=%s", mounted.share.id, path, error)
            await trio.sleep(PURGE_AGAIN)

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
            wanted = {place(share): share for share in shares}
            current = {place(mounted.share): mounted for mounted in self._current.values()}
            changed = [one.path for one in current.keys() ^ wanted.keys() if one.path not in self._failed]
            kept = current.keys() & wanted.keys()
            moved = set(disturbed(kept, changed))
            with ExitStack() as trees:
                kept_trees: dict[Share, int] = {}
                for one in mounting_order((current.keys() - kept) | moved, innermost_first=True):
                    tree = await self._detach(one) if one in moved else None
                    if tree is not None:
                        trees.callback(os.close, tree)
                        kept_trees[one] = tree
                    else:
                        await self._unmount(current[one])
                result: dict[Share, MountReport] = {}
                for one in mounting_order(kept - moved):
                    result[one] = await self._keep(wanted[one])
                for one in mounting_order(wanted.keys() - (kept - moved)):
                    result[one] = await self._bring(wanted[one], kept_trees.get(one), kept - moved)
            reports += [result[place(share)] for share in shares]
            done.set()
            for share in shares:
                for volume in self._volumes.get(share.id, ()):
                    volume.look_around()

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

    async def _bring(self, share: Share, tree: int | None, kept: set[Share]) -> MountReport:
        """Mount ``share``, or attach again the ``tree`` that it was."""
        if tree is None:
            return await self._try_to_mount(share, kept)
        try:
            await trio.to_thread.run_sync(mounting.attach, tree, _spec(share))
        except MountError as error:
            log.warning("mounts.attach share=%d error=%s", share.id, error)
            del self._current[share.id]
            return await self._try_to_mount(share, kept)
        return self._has_become(share)

    async def _keep(self, share: Share) -> MountReport:
        """A mount that is where it should be; perhaps not as it should be."""
        mounted = self._current[share.id]
        if mounted.share == share:
            return MountReport(share.id, MountStage.MOUNTED)
        try:
            if await trio.to_thread.run_sync(mounting.set_read_only, share.path, share.read_only):
                return self._has_become(share)
            # Somebody writes. They go on with the mount that they have, and the host refuses; it has the last word.
            with ExitStack() as trees:
                trees.callback(os.close, tree := await trio.to_thread.run_sync(mounting.detach, share.path))
                return await self._bring(share, tree, set())
        except MountError as error:
            log.warning("mounts.mode share=%d error=%s", share.id, error)
        await self._unmount(mounted)
        return await self._try_to_mount(share, set())

    def _has_become(self, share: Share) -> MountReport:
        """The mount of ``share`` is as that says now."""
        self._current[share.id] = replace(self._current[share.id], share=share)
        log.info("mounts.kept share=%d path=%s read_only=%s", share.id, share.path, share.read_only)
        return MountReport(share.id, MountStage.MOUNTED)

    async def _detach(self, share: Share) -> int | None:
        """Make room around ``share``: a descriptor that keeps its mount. None: it cannot be kept."""
        try:
            return await trio.to_thread.run_sync(mounting.detach, share.path)
        except MountError as error:
            log.warning("mounts.detach share=%d error=%s", share.id, error)
            return None

    async def _mount(self, share: Share) -> None:
        """Raises ``MountError``, and ``OSError`` if there is no /dev/fuse."""
        connection = await trio.to_thread.run_sync(_mount_afresh, _spec(share))
        mounted = self._current[share.id] = Mounted(share, connection, random.getrandbits(SALT_BITS))
        self._start(mounted)
        with trio.move_on_after(INIT_TIMEOUT):
            await connection.initialized.wait()
            mounting.read_ahead(connection.device)
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
        for volume in self._volumes[notice.share]:
            for parent, name in zip(notice.parents, notice.names, strict=False):
                volume.drop_name(parent, name)

    def take_back(self, changed: Changed) -> None:
        """What the host has promised does not hold any more. Raises ``RemoteProtocolError`` if it says too much."""
        for volume in self._volumes.get(changed.share, ()):
            volume.take_back(changed)

    def renew(self, renewed: Renewed) -> None:
        """How something is that has changed."""
        for volume in self._volumes.get(renewed.share, ()):
            volume.renew(renewed)

    def void_promises(self) -> None:
        """The session in which they were made has ended."""
        for volumes in self._volumes.values():
            for volume in volumes:
                volume.void()

    # --- serving -------------------------------------------------------------------------------------

    @property
    def in_use(self) -> set[int]:
        """The shares of which the kernel may know anything: of what is neither mounted nor used nothing is left."""
        return set(self._serving)

    def _start(self, mounted: Mounted) -> None:
        self._serving[mounted.share.id] += 1
        self._nursery.start_soon(self._serve, mounted)

    async def _serve(self, mounted: Mounted) -> None:
        share, connection = mounted.share, mounted.connection
        notifier = self._notifiers.attach(connection)
        volumes = self._volumes[share.id]
        volume = Volume(
            share.id,
            self._host,
            notifier,
            self._timers,
            salt=mounted.salt,
            host_locks=share.host_locks,
            volumes=volumes,
            inherited=mounted.inherited,
        )
        try:
            await self._answer(connection, volume)
        except OSError:
            log.exception("mounts.broken share=%d path=%s", share.id, share.path)
        else:
            log.info("mounts.ended share=%d path=%s", share.id, share.path)
        finally:
            volume.void()
            volumes.discard(volume)
            self._serving[share.id] -= 1
            self._serving += Counter()  # without those of which there are none
            self._notifiers.detach(notifier)
            connection.close()
        fdstore.remove(stored_name(mounted))
        if self._is_current(connection):
            await self._heal(connection)

    async def _answer(self, connection: Connection, volume: Volume) -> None:
        """Serve to the end, but take nothing more from the kernel while too much of it waits for the host.

        Signals are not heard of meanwhile. Of what was not taken the kernel itself lets a killed caller go.
        """
        handle, gate, is_over = Filesystem(connection, volume).handle, self._host.gate(volume.share), False
        while not is_over:
            with gate.inside():
                await connection.serve(handle, self._landing, self._lane)
                is_over = True
            await gate.wait()

    def _is_current(self, connection: Connection) -> bool:
        mounted = self._current.get(connection.spec.share)
        return mounted is not None and mounted.connection is connection

    async def _heal(self, connection: Connection) -> None:
        """A mount has ended that should be there. If it was aborted (umount -f, /sys/fs/fuse/connections), it
        is replaced; if somebody took it away, that is what they want, until the host asks again."""
        async with self._arranging:
            if not self._is_current(connection):
                return
            mounted = self._current[connection.spec.share]
            share = mounted.share
            here = (share.id, connection.device)
            aborted = any((mount.share, mount.device) == here for mount in mountinfo.read_mounts())
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
