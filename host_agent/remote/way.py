"""The way to a machine, as its host agent sees it: something that runs commands there and carries bytes.

The law: what is above it knows nothing of SSH, and what is below it nothing of instances; so a test takes a shell of
this machine for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from protocol.api import LinkState


@dataclass(frozen=True, slots=True)
class Condition:
    """How it is since ``since``, seconds since the epoch. ``reason`` is a clause, ``attempts`` are those since it was
    connected. ``final``: it is not tried again, and ``hint`` says what to do."""

    state: LinkState
    since: float
    reason: str = ""
    hint: str = ""
    attempts: int = 0
    final: bool = False


class Finished(Protocol):
    """A command that has ended; ``status`` is None of one that a signal has ended."""

    @property
    def status(self) -> int | None: ...
    @property
    def out(self) -> bytes: ...
    @property
    def err(self) -> bytes: ...


class Way(Protocol):
    """Connects by itself, and again and again; each waits for a connection, or raises ``UserError``."""

    @property
    def condition(self) -> Condition: ...

    def on_change(self, tell: Callable[[Condition], None]) -> None:
        """``tell`` is called, in trio's thread, with each condition from now on."""

    async def connect(self) -> None:
        """Wait for the first connection. Raises ``UserError`` if there is none to be had."""

    async def run(self, command: str, input: bytes = b"", timeout: float = 30.0) -> Finished:
        """Raises ``UserError`` if there is no connection, or it is lost, or the time is over."""

    async def carry(
        self,
        listener_path: Path,
        command: str,
        on_end: Callable[[Finished], None] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the unix socket ``listener_path``: whoever connects talks to ``command``, until cancelled.

        ``on_end`` is called, in trio's thread, when a command has ended by itself.
        """
