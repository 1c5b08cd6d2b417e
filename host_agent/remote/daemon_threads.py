"""Threads for what may never return: a name that no server resolves, a folder whose disk does not answer.

The law: nobody waits for such a thread but whoever asked, for as long as they like; neither the end of an event loop
nor that of the process does. (The threads of ``concurrent.futures`` are joined by both.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(ThreadPoolExecutor):
    """Each call in a thread of its own. (It is no pool; but asyncio takes nothing else for its loops.)"""

    def submit(self, call: Callable[P, T], /, *words: P.args, **more: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*words, **more)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=run, name="may-never-return", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing of it is waited for."""
