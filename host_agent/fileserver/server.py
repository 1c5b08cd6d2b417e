"""The file server: what ties the link to the guest, the shares, the journal and the host agent together.

The laws:
- The guest hears of no share before the host agent has said which there are: it would unmount them all.
- A guest is a run of a kernel (``boot_id``). For the same one everything goes on, also in a new process; for
  another one nothing is left of what the one before it had: nodes, descriptors, locks, outcomes.
- The host agent's end is the end of this process; a guest's is not, nor is QEMU's.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from fileserver import prompt
from fileserver.budget import Budget
from fileserver.calls import Calls
from fileserver.control import (
    GetShares,
    GuestStage,
    ServeShares,
    SharedFolder,
    SharesChanged,
    ShareState,
    ShareStates,
)
from fileserver.foreign import ForeignDevices
from fileserver.journal import Journal
from fileserver.keepsakes import Keepsakes
from fileserver.ledger import Kind, Ledger
from fileserver.manner import Manner
from fileserver.mountwatch import MountWatch, concerns
from fileserver.nodes import Link as NameLink
from fileserver.owner import Owner
from fileserver.renewal import Found
from fileserver.retractions import Retraction
from fileserver.shares import Share
from fileserver.watches import Changes, Watches
from fileserver.workers import Completions
from host_agent.client import hello
from host_agent.guest_link import GuestLink
from host_agent.view.unmounting import KIND
from protocol.bulk import Bulk
from protocol.errors import AgentctlProtocolError, ErrorCode, LinkError, RpcError
from protocol.files import (
    MAX_FILES_PAYLOAD,
    MountReports,
    MountShares,
    MountStage,
    NamesGone,
    owner_of,
    shares_in_use,
)
from protocol.files import Share as MountedShare
from protocol.lane import Lane
from protocol.link import Link, Service
from protocol.session import Role

logger = logging.getLogger(__name__)

#: Bytes of answers to the guest that may wait; large ones are not made beyond ``admission.MAX_ANSWERS``...
MAX_BACKLOG: Final = 256 << 20
#: ...and no more calls are read once this much waits, for as long as it does.
PAUSE_ABOVE: Final = 8 << 20
#: Seconds for the guest to mount what it was told to; a mount takes 20 ms under emulation.
MOUNT_TIMEOUT: Final = 60.0
#: Seconds that the first look at new folders may hold up the answer to the host agent.
FIRST_LOOK: Final = 2.0
#: Seconds between two looks at what has no event: how shares are doing, how large the journal is.
LOOK_INTERVAL: Final = 1.0
#: Names in one notice: at 255 bytes each they fit into a frame.
NAMES_AT_ONCE: Final = 512
#: Seconds for what is under way to be finished at the end.
LAST_CALLS: Final = 2.0

_GUEST_STAGES: Final = {MountStage.MOUNTED: GuestStage.MOUNTED, MountStage.FAILED: GuestStage.FAILED}


class FileServer:
    """Serves folders to the guest behind ``guest_socket`` (QEMU's) as the peer on ``control`` says."""

    def __init__(
        self,
        guest_socket: Path,
        control: trio.abc.Stream,
        journal: Journal,
        hidden: Iterable[str] = (),
        keepsakes: Keepsakes | None = None,
        bulk: Bulk | None = None,
        *,
        packed: bool = False,
    ) -> None:
        """``bulk``: memory for payloads that the guest may have, too. ``packed`` as for ``GuestLink``."""
        self._journal = journal
        self._keepsakes = Keepsakes() if keepsakes is None else keepsakes
        self._hidden = list(hidden)
        # A guest's files that are shown in a shared folder are not shown to that guest, or another, again.
        views = ForeignDevices(lambda kind: kind == KIND.encode())
        self._manner = Manner(is_foreign=views.__contains__)
        self._budget = Budget()
        self._shares: dict[int, Share] = {}
        self._lane = Lane()
        self._watches = Watches(self._lane, self._on_changes, self._on_void)
        self._retractions: Completions[tuple[Share, Retraction]] = Completions(self._retract, self._lane)
        self._renewals: Completions[tuple[Share, Link, Found]] = Completions(self._renew_found, self._lane)
        self._mount_watch = MountWatch(self._lane, self._on_mounts, self._on_sleep)
        self._calls = Calls(journal, self._shares, bulk, self._lane)
        self._boot_id: str | None = None  # of the guest that was here last
        self._owner: Owner | None = None  # its user, if that one has other ids than ours
        self._link: Link | None = None  # the session, from before its shares are mounted
        self._listed = self._told = 0  # the version of the list of shares, and the one the guest knows
        self._configured = trio.Event()
        self._mounting = trio.Lock()
        self._to_mount, self._to_announce = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._announced: list[object] = []
        service = Service()
        service.on_call(self._calls.take)
        self._guest = GuestLink(
            guest_socket,
            hello("files"),
            service,
            on_up=self._on_up,
            on_down=self._on_down,
            name="files",
            max_payload=MAX_FILES_PAYLOAD,
            max_backlog=MAX_BACKLOG,
            pause_above=PAUSE_ABOVE,
            bulk=bulk,
            lane=self._lane,
            packed=packed,
        )
        asked = Service()
        asked.on_request(ServeShares, self._serve_shares)
        asked.on_request(GetShares, self._get_shares)
        self._control = Link(control, Role.SERVER, asked, hello("files"))

    async def run(self) -> None:
        """Serve until the host agent ends the link, or its process."""
        try:
            async with trio.open_nursery() as self._nursery:
                for task in (
                    self._lane.run,
                    self._serve_guest,
                    self._mount_changes,
                    self._announce,
                    self._look_after,
                ):
                    self._nursery.start_soon(task)
                try:
                    await self._control.run()
                except LinkError as error:
                    logger.warning("the link to the host agent failed: %s", error)
                self._nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(LAST_CALLS, shield=True):
                await self._finish()

    async def _finish(self) -> None:
        """Let what is under way come to its end; what does not is in the journal as begun."""
        workers = [share.workers for share in self._shares.values()]
        for share in self._shares.values():
            share.close()
        for each in workers:
            await trio.to_thread.run_sync(each.wait_closed, LAST_CALLS, abandon_on_cancel=True)
        self._calls.close()
        self._retractions.close()
        self._renewals.close()
        self._mount_watch.close()
        self._watches.close()
        self._lane.close()

    # --- the guest ---------------------------------------------------------------------------------

    async def _serve_guest(self) -> None:
        await self._configured.wait()
        await self._guest.run()

    async def _on_up(self, link: Link) -> None:
        """A session begins."""
        self._begin(link)
        try:
            async with self._mounting:
                self._told = -1
                while self._told != self._listed:
                    await self._mount(link)
            for share in self._shares.values():
                share.telling.begin_session(link)
            self._judge()
        except BaseException:
            self._on_down()
            raise

    def _on_down(self) -> None:
        self._link = None
        self._calls.end_session()
        self._to_announce.unpark_all()

    def _begin(self, link: Link) -> None:
        boot_id = link.peer.boot_id
        past = self._journal.restored
        if boot_id != self._boot_id:
            same = self._boot_id is None and bool(boot_id) and past.boot_id == boot_id
            logger.info("guest %s: %s", boot_id or "(unknown)", "taken over" if same else "is new")
            if not same:
                self._keepsakes.give_up_unclaimed()
                self._renew(boot_id)
                past = Ledger()
            self._calls.begin_guest(past)
            self._boot_id = boot_id
        shown_as = owner_of(link.peer.capabilities)
        self._owner = None if shown_as is None else Owner(*shown_as)
        in_use = shares_in_use(link.peer.capabilities)
        for number in [] if in_use is None else self._shares.keys() - in_use:
            self._begin_anew(number, past)
        for number, share in self._shares.items():
            share.resume(past.nodes.get(number), past.locks.get(number), self._owner)
        for number in (past.nodes.keys() | past.locks.keys()) - self._shares.keys():
            self._journal.add(Kind.DROPPED, number)
        self._keepsakes.give_up_unclaimed()
        self._journal.restored = Ledger()  # it has served its purpose, and is large
        self._link = link
        self._calls.begin_session(link)

    def _begin_anew(self, number: int, past: Ledger) -> None:
        """No mount of a share is left in the guest: what was known of its files, and promised, ends here. A kernel that
        unmounts forgets no nodes, so else all would be kept, and said to be stale in the mount that comes."""
        known = [past.nodes.pop(number, None), past.locks.pop(number, None)]
        share = self._shares[number]
        if share.calls:
            share.close(for_good=True)
            self._calls.drop(number)
            self._shares[number] = self._open(share.folder)
        if share.calls or any(known):
            self._journal.add(Kind.DROPPED, number)

    def _renew(self, boot_id: str) -> None:
        """Nothing of the guest before is left."""
        self._journal.begin(boot_id)
        for number, share in list(self._shares.items()):
            share.close(for_good=True)
            self._shares[number] = self._open(share.folder)

    async def _mount(self, link: Link) -> None:
        """Tell the guest what to mount, and take its report. Raises ``RpcError`` and ``LinkError``."""
        version = self._listed
        folders = [share.folder for share in self._shares.values()]
        reports = await link.request(
            MountShares([MountedShare(f.id, f.guest_path, f.read_only, f.host_locks) for f in folders]),
            timeout=MOUNT_TIMEOUT,
        )
        self._told = version
        self._take_reports(reports)

    def _take_reports(self, reports: MountReports) -> None:
        skew = round((reports.clock_ns - time.time_ns()) / 1e6) if reports.clock_ns else 0
        for report in reports.reports:
            if (share := self._shares.get(report.share)) is not None:
                share.guest, share.guest_reason = _GUEST_STAGES[report.stage], report.reason
        for share in self._shares.values():
            share.clock_skew_ms = skew
        self._to_announce.unpark_all()

    async def _mount_changes(self) -> None:
        """Tell a session that is up of every change of the list."""
        while True:
            await self._to_mount.park()
            try:
                async with self._mounting:
                    while (link := self._guest.current) is not None and self._told != self._listed:
                        await self._mount(link)
            except AgentctlProtocolError as error:
                logger.warning("the guest could not be told what to mount: %s", error)

    # --- the host agent ----------------------------------------------------------------------------

    async def _serve_shares(self, request: ServeShares) -> ShareStates:
        folders = {folder.id: folder for folder in request.shares}
        if len(folders) < len(request.shares):
            raise RpcError(ErrorCode.INVALID, "two shares have the same id")
        changed = [*folders.values()] != [share.folder for share in self._shares.values()]
        if changed or not self._configured.is_set():
            opened = self._replace(folders)
            self._listed += 1
            self._configured.set()
            self._to_mount.unpark_all()
            with trio.move_on_after(FIRST_LOOK):
                for share in opened:
                    await share.wait_opened()
            self._judge()
        return self._states()

    def _replace(self, folders: dict[int, SharedFolder]) -> list[Share]:
        """Serve ``folders``, in this order; those that did not change go on as they are. Returns the new ones."""
        before = dict(self._shares)
        for known in before.values():  # who comes may be on another disk
            known.may_be_prompt_on(None)
        self._shares.clear()
        opened = []
        for number, folder in folders.items():
            share = before.get(number)
            if share is None or share.folder != folder:
                share = self._open(folder)
                opened.append(share)
                if self._boot_id is not None:
                    share.resume(owner=self._owner)
            else:
                del before[number]
            self._shares[number] = share
        for number, share in before.items():
            share.close(for_good=True)
            self._calls.drop(number)
            self._journal.add(Kind.DROPPED, number)
        return opened

    def _open(self, folder: SharedFolder) -> Share:
        share = Share(
            folder,
            self._journal,
            self._hidden,
            self._keepsakes.of(folder.id),
            self._budget,
            self._watches,
            lambda share, retraction: self._retractions.put((share, retraction)),
            lambda share, link, found: self._renewals.put((share, link, found)),
            manner=self._manner,
        )
        self._nursery.start_soon(share.tend, self._to_announce.unpark_all, self._tell_gone)
        return share

    def _on_changes(self, watched_as: int, changes: Changes) -> None:
        """Take back what was promised."""
        if (link := self._link) is not None:
            for share in self._shares.values():
                if share.watched_as == watched_as:
                    share.telling.changed(link, changes)

    def _retract(self, retractions: list[tuple[Share, Retraction]]) -> None:
        if (link := self._link) is not None:
            for share, retraction in retractions:
                share.telling.tell(link, retraction)

    def _renew_found(self, renewals: list[tuple[Share, Link, Found]]) -> None:
        self._journal.flush()  # nodes may be new
        for share, link, found in renewals:
            if self._shares.get(share.folder.id) is share:  # else its threads may have ended
                share.telling.renew(self._link, link, found)

    def _on_void(self, reason: str) -> None:
        """Nothing that was promised stands any more. Without a session nobody has a promise."""
        logger.info("what the guest was told is looked at again: %s", reason)
        if self._link is not None:
            for share in self._shares.values():
                share.telling.void()
            self._to_announce.unpark_all()

    def _on_mounts(self, points: frozenset[bytes]) -> None:
        """Filesystems were mounted or unmounted. What is watched in one that goes is not any more, without a word."""
        concerned = [
            share for share in self._shares.values() if concerns(points, os.fsencode(share.folder.host_path))
        ]
        for share in concerned:
            share.may_be_prompt_on(None)
            self._watches.forget_share(share.watched_as)
        if concerned:
            self._watches.void("mounts have changed")

    def _judge(self) -> None:
        """Which shares are prompt, as long as they are what they are now."""
        disks = {share: share.disk for share in self._shares.values()}
        ready = prompt.harmless(disks)
        for share, disk in disks.items():
            below = self._mount_watch.is_below(os.fsencode(share.folder.host_path))
            share.may_be_prompt_on(disk if share in ready and not below else None)

    def _on_sleep(self, seconds: float) -> None:
        self._watches.void(f"the host has slept for {seconds:.0f} s")

    def _tell_gone(self, number: int, names: list[NameLink]) -> None:
        """Have the guest drop names. Without a session it forgets them in its own time."""
        if (link := self._link) is not None:
            for start in range(0, len(names), NAMES_AT_ONCE):
                some = names[start : start + NAMES_AT_ONCE]
                notice = NamesGone(number, [parent for parent, _ in some], [name for _, name in some])
                self._nursery.start_soon(self._tell, link, notice)

    @staticmethod
    async def _tell(link: Link, notice: NamesGone) -> None:
        with suppress(LinkError):
            await link.notify(notice)

    async def _get_shares(self, request: GetShares) -> ShareStates:
        await trio.lowlevel.checkpoint()
        return self._states()

    def _states(self) -> ShareStates:
        return ShareStates([share.state() for share in self._shares.values()], self._link is not None)

    async def _announce(self) -> None:
        """Tell the host agent of what has changed that a user would want to know."""
        await self._configured.wait()
        while True:
            states = self._states()
            news: list[object] = [states.connected, *map(_telling, states.shares)]
            if news != self._announced:
                self._announced = news
                try:
                    await self._control.notify(SharesChanged(states))
                except LinkError:
                    return  # run() is about to end
            with trio.move_on_after(LOOK_INTERVAL):
                await self._to_announce.park()

    async def _look_after(self) -> None:
        """Keep the journal small, the store up to date, and what waits behind a dead disk going."""
        while True:
            await trio.sleep(LOOK_INTERVAL)
            self._watches.look()
            self._judge()
            for share in self._shares.values():
                share.workers.relieve()
            self._keepsakes.flush()
            self._journal.flush()  # what was recorded on its own, not for an answer
            if self._journal.wants_compaction:
                try:
                    await trio.to_thread.run_sync(self._journal.compact)
                except OSError as error:
                    logger.warning("the journal cannot be rewritten: %s", error)


def _telling(state: ShareState) -> object:
    """What of a state is worth an announcement."""
    return state.id, state.stage, state.guest, state.reason, state.hint, state.revalidating
