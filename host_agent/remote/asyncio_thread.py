"""An event loop of asyncio's in a thread of its own, for trio: what is asked of it, and its end.

The law: its end is bounded, whatever is under way in it. A name that is being looked up, a disk that does not answer, a
task that does not take a cancellation: after a few seconds it is left behind, and ends with the process at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import trio

from host_agent.remote.daemon_threads import DaemonThreads

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Seconds that each step of the end may take; all that is in order takes less than one.
END_TIME: Final = 5.0

#: Seconds between one cancellation of a task and the next.
_AGAIN: Final = 1.0


class AsyncioThread:
    """To be made in trio's thread."""

    def __init__(self, name: str) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(DaemonThreads())
        self._thread = threading.Thread(target=self._run_loop, name=name, daemon=True)

    def start(self) -> None:
        """Run what is asked for, until ``aclose``."""
        self._thread.start()

    async def aclose(self) -> None:
        """End all that is under way, and the thread. Nothing may be waited for any more."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(END_TIME):
                await self._call(self._close)
            self._loop.call_soon_threadsafe(self._loop.stop)
            await trio.to_thread.run_sync(self._thread.join, 2 * END_TIME)
        if self._thread.is_alive():
            logger.error("the thread %s does not end", self._thread.name)

    async def _close(self) -> None:
        """What a subclass has to do in the loop before that ends."""

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_end_all(asyncio.all_tasks(self._loop)))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _call(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run something of asyncio's, and wait for its end. Cancelled, it is cancelled there, and waited for as ``end``
        does."""
        done = trio.Event()
        task: asyncio.Task[T] | None = None

        def begin() -> None:
            nonlocal task
            task = self._loop.create_task(ask())
            task.add_done_callback(lambda _: self._in_trio(done.set))

        def give_up() -> None:
            assert task is not None
            self._loop.create_task(end(task))

        self._loop.call_soon_threadsafe(begin)
        try:
            await done.wait()
        except trio.Cancelled:
            self._loop.call_soon_threadsafe(give_up)
            with trio.move_on_after(END_TIME, shield=True):
                await done.wait()
            if task is not None and task.done() and not task.cancelled():
                task.exception()  # looked at; what was wanted is to end
            raise
        assert task is not None
        return task.result()

    def _in_trio(self, tell: Callable[..., object], *words: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(tell, *words)


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel it, until it has ended: asyncio's ``wait_for``, which asyncssh uses, may swallow a cancellation.

    One that has not ended after ``END_TIME`` is left alone.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_TIME):
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_AGAIN)
    if not task.done():
        logger.error("%s does not end", task)


async def _end_all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*map(end, tasks))
