"""The process that serves the guest's files to the host (``guest_agent.view``): there while somebody looks, in a VM.

The law: it runs from the host's word on until the host's word, or the end of this one; killed it is started again. So a
guest whose files nobody looks at has nothing of it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import trio

from protocol.api import Done, ServeView
from protocol.link import Service

log = logging.getLogger(__name__)

PROGRAM: Final = (sys.executable, "-m", "guest_agent.view")

FIRST_DELAY, MOST_DELAY = 0.1, 5.0
"""Seconds before it is started again: twice as many each time, if it does not stay."""

SOUND_LIFE: Final = 10.0

END_TIME: Final = 5.0
"""Seconds for it to end when it is told to."""


class ViewProcess:
    """Answers ``ServeView``."""

    def __init__(self, nursery: trio.Nursery, program: Sequence[str] = PROGRAM) -> None:
        self._nursery = nursery
        self._program = list(program)
        self._life: trio.CancelScope | None = None

    def register(self, service: Service) -> None:
        service.on_request(ServeView, self.serve_view)

    async def serve_view(self, request: ServeView) -> Done:
        await trio.lowlevel.checkpoint()
        if request.wanted and self._life is None:
            self._life = trio.CancelScope()
            self._nursery.start_soon(self._live_again_and_again, self._life)
        elif not request.wanted and self._life is not None:
            self._life.cancel()
            self._life = None
        return Done()

    async def _live_again_and_again(self, life: trio.CancelScope) -> None:
        delay = FIRST_DELAY
        with life:
            while True:
                begun = trio.current_time()
                try:
                    status = await self._live()
                    log.warning("view.ended status=%d", status)
                except OSError as error:
                    log.error("view.failed error=%s", error)
                delay = (
                    FIRST_DELAY if trio.current_time() - begun >= SOUND_LIFE else min(MOST_DELAY, 2 * delay)
                )
                await trio.sleep(delay)

    async def _live(self) -> int:
        process = await trio.lowlevel.open_process(self._program, stdin=subprocess.DEVNULL)
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                with trio.CancelScope(shield=True):
                    process.terminate()
                    with trio.move_on_after(END_TIME):
                        await process.wait()
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
