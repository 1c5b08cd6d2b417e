"""Runs operations: a request's coroutine, driven by what it waits for instead of by a task.

A trio task for each request costs 300 us in an emulated guest, as much as all else a request needs; a step
here costs 2 % of that. An operation awaits only what is a ``Wait``, and returns the bytes of its reply.

The law: each operation answers its request exactly once. An ``OSError`` becomes its errno; any other
exception is a bug of ours, costs its caller EIO and us a line in the log, and nobody else anything.
Everything here happens on trio's thread.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Protocol

import trio

from protocol.bulk import Loan

log = logging.getLogger(__name__)

Resume = Callable[[Any], None]
"""Goes on with an operation; given what its ``await`` is to return. To be called once."""


class Wait(Protocol):
    """Something that an operation can wait for."""

    def begin(self, resume: Resume) -> None:
        """Have ``resume`` called when it has come; at once is allowed."""


Operation = Coroutine[Wait, Any, bytes | Loan | None]
"""Returns the bytes of its reply, or where they are: released when the kernel has them. None: it has replied itself."""


class Kernel(Protocol):
    """Where requests are answered: ``device.Connection``."""

    def reply(self, unique: int, *buffers: bytes | bytearray | memoryview) -> None: ...

    def fail(self, unique: int, error: int) -> None: ...


def start(operation: Operation, kernel: Kernel, unique: int) -> None:
    """Run ``operation`` up to its first wait, and in time to its end: the answer to request ``unique``."""
    _Running(operation, kernel, unique).resume(None)


def spawn(operation: Coroutine[Wait, Any, None]) -> None:
    """Run an operation that answers no request, up to its first wait, and in time to its end."""
    _Spawned(operation).resume(None)


class _Running:
    __slots__ = ("_kernel", "_operation", "_unique")

    def __init__(self, operation: Operation, kernel: Kernel, unique: int) -> None:
        self._operation = operation
        self._kernel = kernel
        self._unique = unique

    def resume(self, value: object) -> None:
        try:
            self._operation.send(value).begin(self.resume)
        except StopIteration as done:
            reply = done.value
            if reply.__class__ is Loan:
                self._kernel.reply(self._unique, reply.view)
                reply.release()
            elif reply is not None:
                self._kernel.reply(self._unique, reply)
        except OSError as error:
            self._kernel.fail(self._unique, error.errno or errno.EIO)
        except Exception:
            log.exception("operation.failed unique=%d operation=%r", self._unique, self._operation)
            self._kernel.fail(self._unique, errno.EIO)


class _Spawned:
    __slots__ = ("_operation",)

    def __init__(self, operation: Coroutine[Wait, Any, None]) -> None:
        self._operation = operation

    def resume(self, value: object) -> None:
        try:
            self._operation.send(value).begin(self.resume)
        except StopIteration:
            pass
        except Exception:
            log.exception("operation.failed operation=%r", self._operation)


class Timers:
    """Calls functions later. Seldom used, so a task each is cheap enough."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Call ``function``, which must not raise, in ``seconds``."""
        self._nursery.start_soon(self._after, seconds, function)

    async def _after(self, seconds: float, function: Callable[[], None]) -> None:
        await trio.sleep(seconds)
        function()


class Idle:
    """Has what is held for somebody let go when it was not ``used`` for some ``seconds``, twice that at the most."""

    def __init__(
        self, timers: Timers, seconds: float, let_go: Callable[[], None], is_held: Callable[[], object]
    ) -> None:
        self._timers = timers
        self._seconds = seconds
        self._let_go, self._is_held = let_go, is_held
        self._uses = 0
        self._watching = False

    def used(self) -> None:
        self._uses += 1

    def watch(self) -> None:
        """Something is held from now on."""
        if not self._watching:
            self._watching = True
            self._timers.after(self._seconds, partial(self._look, self._uses))

    def _look(self, uses: int) -> None:
        self._watching = False
        if self._uses == uses:
            self._let_go()
        elif self._is_held():
            self.watch()


class Pause:
    """Wait for some time; ``interrupt`` ends it early and makes ``await`` return True."""

    __slots__ = ("_resume", "_seconds", "_timers")

    def __init__(self, timers: Timers, seconds: float) -> None:
        self._timers = timers
        self._seconds = seconds
        self._resume: Resume | None = None

    def __await__(self) -> Generator[Wait, Any, bool]:
        interrupted: bool = yield self
        return interrupted

    def begin(self, resume: Resume) -> None:
        self._resume = resume
        self._timers.after(self._seconds, self._end)

    def interrupt(self) -> None:
        self._end(interrupted=True)

    def _end(self, interrupted: bool = False) -> None:
        if (resume := self._resume) is not None:
            self._resume = None
            resume(interrupted)
