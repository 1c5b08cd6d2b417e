"""What there is to see, told whenever it has changed.

The law: a change is told within a second of it. dockerd says when something of its has changed; homes are looked at,
and whatever else is missed is found ``AGAIN`` later.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from guest_agent.view import docker
from guest_agent.view.around import enterable
from guest_agent.view.docker import Docker, NoDocker
from guest_agent.view.places import Place, arranged

log = logging.getLogger(__name__)

LOOK: Final = 0.5
"""Seconds between two looks at what has no events: whether there is a dockerd, and which homes."""

AGAIN: Final = 20.0
"""Seconds after which dockerd is asked though it has told nothing."""

GATHER: Final = 0.05
"""Seconds in which further events are awaited: to start a container is four of them."""

Tell = Callable[[list[Place]], Awaitable[None]]


class Watch:
    """Those around us, and those of the first dockerd of ``sockets`` that answers."""

    def __init__(
        self,
        around: Callable[[], list[Place]],
        sockets: Sequence[Path],
        open_docker: Callable[[Path], Docker] = Docker,
    ) -> None:
        self._around = around
        self._sockets = sockets
        self._open_docker = open_docker
        self._docker: Docker | None = None
        self._of_docker: list[Place] = []
        self._asked_at = float("-inf")
        self._news = trio.Event()
        self._changed = True

    async def run(self, tell: Tell) -> None:
        """Until cancelled; tells what there is at first."""
        told: list[Place] | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear)
            while True:
                found = await self._look()
                if found != told:
                    told = found
                    await tell(found)
                with trio.move_on_after(LOOK):
                    await self._news.wait()
                    await trio.sleep(GATHER)

    async def _look(self) -> list[Place]:
        self._news = trio.Event()
        if self._changed or self._docker is None or trio.current_time() - self._asked_at >= AGAIN:
            self._changed = False
            self._asked_at = trio.current_time()
            self._of_docker = await trio.to_thread.run_sync(self._ask_docker, abandon_on_cancel=True)
        around = await trio.to_thread.run_sync(self._around, abandon_on_cancel=True)
        # In the order in which it matters should there be too many.
        images_last = sorted(self._of_docker, key=lambda place: place.path.startswith("/images/"))
        return arranged([*around, *images_last])

    def _ask_docker(self) -> list[Place]:
        for address in self._sockets:
            if not address.exists():
                continue
            if self._docker is None or self._docker.address != address:
                self._docker = self._open_docker(address)
            try:
                return enterable(self._docker.look())
            except NoDocker as error:  # it is just being started, or is busy: what is there stays there
                log.info("view.docker address=%s error=%s", address, error)
                self._changed = True
                return self._of_docker
        return []

    async def _hear(self) -> None:
        """Events of the dockerd that was found, for as long as it lives; then of the next."""
        while True:
            if self._docker is not None:
                with suppress(OSError, trio.BrokenResourceError):
                    # It is asked once more when events come: what changed in between was not told.
                    self._tell_changed()
                    await docker.hear(self._docker.address, self._tell_changed)
                self._tell_changed()
            await trio.sleep(LOOK)

    def _tell_changed(self) -> None:
        self._changed = True
        self._news.set()
