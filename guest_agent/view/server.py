"""Serves what there is to see, over one session after the other: the files plane with the roles exchanged.

The laws:
- This process has the files, so it answers (``fileserver``); the host shows what it is told of (``MountShares``),
  asks, and is never asked anything else.
- Nothing is promised, and nothing is resumed: a host keeps what it was told for a moment, and of a server that was
  killed its successor knows no node, so that a stale one never means another file (``Journal`` without a path).
- A place that is another one than before has another number, however it is called; and none has one that a place of our
  predecessor's had: what waited for us may be meant for a volume of that.
"""

from __future__ import annotations

import itertools
import logging
import random
import uuid
from functools import partial
from typing import Final

import trio

from fileserver.budget import Budget
from fileserver.calls import Calls
from fileserver.control import SharedFolder
from fileserver.foreign import ForeignDevices, is_fuse
from fileserver.journal import Journal
from fileserver.keepsakes import Keepsakes
from fileserver.ledger import Ledger
from fileserver.manner import Manner
from fileserver.shares import Share
from guest_agent.transports import OpenTransport
from guest_agent.view.overlay import Overlay
from guest_agent.view.places import Place
from guest_agent.view.watching import Watch
from protocol.build import digest
from protocol.errors import LinkError, RpcError
from protocol.files import MAX_FILES_PAYLOAD, MountShares
from protocol.files import Share as Shown
from protocol.lane import Lane
from protocol.link import Hello, Link, Role, SerialChannel, Service

log = logging.getLogger(__name__)

MAX_BACKLOG: Final = 64 << 20
"""Bytes of answers that may wait; more is not asked for at once by one thread that reads."""

PAUSE_ABOVE: Final = 8 << 20

PAUSE: Final = 0.5
"""Seconds before a transport that broke is opened again, and after a session that never came to be."""

TELL_TIME: Final = 30.0
"""Seconds for the host to take in what there is."""

LOOK_EVERY: Final = 10.0
"""Seconds between two looks at a root: that it is another one is heard of otherwise."""

LAST_CALLS: Final = 2.0


class Served:
    """A place at work."""

    def __init__(
        self, number: int, place: Place, journal: Journal, budget: Budget, foreign: ForeignDevices
    ) -> None:
        self.number, self.place = number, place
        self._overlay = Overlay(place.layers) if place.layers else None
        manner = Manner(
            open_root=None if self._overlay is None else self._overlay.open,
            inherit=place.inherit,
            is_foreign=foreign.__contains__,
            look_every=LOOK_EVERY,
        )
        folder = SharedFolder(number, place.source or place.path, place.path, place.read_only)
        self.share = Share(folder, journal, list(place.hidden), Keepsakes().of(number), budget, manner=manner)
        self.share.resume()

    def close(self) -> None:
        self.share.close(for_good=True)
        if self._overlay is not None:
            self._overlay.close()


class ViewServer:
    """Serves what ``watch`` finds."""

    def __init__(self, nursery: trio.Nursery, watch: Watch) -> None:
        self._nursery = nursery
        self._watch = watch
        self._numbers = itertools.count(1 + (random.getrandbits(30) << 16))
        self._journal = Journal(None)
        self._budget = Budget()
        self._foreign = ForeignDevices(is_fuse)
        self._served: dict[str, Served] = {}
        self._shares: dict[int, Share] = {}
        self._lane = Lane()
        nursery.start_soon(self._lane.run)
        nursery.start_soon(self._look_after)
        self._calls = Calls(self._journal, self._shares, None, self._lane)
        self._calls.begin_guest(Ledger())
        # Whoever asks knows by it whether the numbers of nodes are still those.
        self._hello = Hello(
            digest=digest(), boot_id=uuid.uuid4().hex, capabilities=["view"], name="guest-view"
        )

    async def serve(self, open_transport: OpenTransport, pause: float = PAUSE) -> None:
        """Sessions for ever, over a transport that is opened again whenever it breaks, after ``pause`` seconds."""
        while True:
            try:
                async with await open_transport() as transport:
                    channel = SerialChannel(transport)
                    while True:
                        if not await self._session(await channel.establish()):
                            await trio.sleep(PAUSE)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, LinkError) as error:
                log.warning("transport.lost error=%r", error)
            await trio.sleep(pause)

    async def close(self) -> None:
        """Let what is under way come to its end."""
        shares = list(self._shares.values())
        for served in self._served.values():
            served.close()
        for share in shares:
            await trio.to_thread.run_sync(share.workers.wait_closed, LAST_CALLS, abandon_on_cancel=True)
        self._calls.close()
        self._lane.close()

    async def _session(self, stream: trio.abc.Stream) -> bool:
        """One session, to its end; False if there were not even greetings."""
        service = Service()
        service.on_call(self._calls.take)
        link = Link(
            stream,
            Role.GUEST,
            service,
            self._hello,
            lane=self._lane,
            max_payload=MAX_FILES_PAYLOAD,
            max_backlog=MAX_BACKLOG,
            pause_above=PAUSE_ABOVE,
        )
        greeted = False
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(_run_and_end, link, nursery.cancel_scope)
                greeted = True
                log.info("session.begin peer=%s digest=%s", link.peer.name, link.peer.digest)
                self._calls.begin_session(link)
                await self._watch.run(partial(self._tell, link))
        except* (LinkError, RpcError) as errors:
            log.info("session.end reason=%s", errors.exceptions[0])
        except* Exception as errors:
            log.error("session.failed", exc_info=errors)
        finally:
            if greeted:
                self._calls.end_session()
        return greeted

    async def _tell(self, link: Link, places: list[Place]) -> None:
        """Serve these, and have the host show them. Raises ``RpcError``, ``LinkError``."""
        gone = self._replace(places)
        shown = [Shown(each.number, each.place.path, each.place.read_only) for each in self._served.values()]
        await link.request(MountShares(shown), timeout=TELL_TIME)
        for each in gone:  # nobody is told of these any more
            each.close()
            self._calls.drop(each.number)

    def _replace(self, places: list[Place]) -> list[Served]:
        """Have exactly these, in their order; those that did not change go on. Returns those that are to go."""
        before = dict(self._served)
        self._served.clear()
        for place in places:
            known = before.get(place.path)
            if known is not None and known.place == place:
                del before[place.path]
            else:
                known = Served(next(self._numbers), place, self._journal, self._budget, self._foreign)
                self._nursery.start_soon(known.share.tend, _nothing, _nothing)
            self._served[place.path] = known
        self._shares.clear()
        self._shares.update({each.number: each.share for each in self._served.values()})
        return list(before.values())

    async def _look_after(self) -> None:
        """See that what waits behind a dead disk goes on."""
        while True:
            await trio.sleep(1.0)
            for share in self._shares.values():
                share.workers.relieve()


def _nothing(*_: object) -> None:
    """Nobody is told."""


async def _run_and_end(
    link: Link, session: trio.CancelScope, task_status: trio.TaskStatus[Link] = trio.TASK_STATUS_IGNORED
) -> None:
    try:
        await link.run(task_status)
    finally:
        session.cancel()
