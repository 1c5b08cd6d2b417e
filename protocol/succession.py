"""Sessions of which one lives at a time, whatever transports they come over: who begins ends the one before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Succession:
    """The newest session is the one that counts: only who is reached has agreed to it. What belongs to a plane (its
    shared memory, what is announced) is never that of two: a session begins when nothing of the one before is left."""

    def __init__(self) -> None:
        self._turn = trio.Lock()
        self._living = trio.CancelScope()
        self._newest = 0

    async def run(self, session: Callable[[], Awaitable[None]]) -> bool:
        """Run ``session`` once the one before is over, which it is made to be; False if a newer one ended this one."""
        self._newest = mine = self._newest + 1
        self._living.cancel()
        async with self._turn:
            if mine == self._newest:
                with trio.CancelScope() as self._living:
                    await session()
        return mine == self._newest
