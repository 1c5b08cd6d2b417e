"""Requests that wait for what another one, or nobody's, has asked the host for.

The law: who has had a signal waits no more (``leave``). It then asks the host for itself, so that it can be let go like
any other caller that dies (``host``). Sans-IO.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from guest_agent.fuse.operation import Resume, Wait


class Callers(Protocol):
    """Of ``host.Host``, what is needed here."""

    caller: int


class Arrival:
    """What was asked for, for whoever waits."""

    __slots__ = ("_callers", "_waiting")

    def __init__(self, callers: Callers) -> None:
        self._callers = callers
        self._waiting: dict[int, tuple[Resume, int]] = {}
        """By the unique of the request; with its caller, who is that of what it asks afterwards."""

    def until(self, unique: int) -> Until:
        """To be awaited by the operation of request ``unique``: it has come, or never will, or there was a signal."""
        return Until(self, unique)

    def wait(self, unique: int, resume: Resume) -> None:
        """(For ``until``.)"""
        self._waiting[unique] = resume, self._callers.caller

    def end(self) -> None:
        """It is here, or never will be."""
        for unique in list(self._waiting):
            self.leave(unique)

    def leave(self, unique: int) -> None:
        """The caller of request ``unique``, if that waits, has had a signal."""
        if unique in self._waiting:
            resume, caller = self._waiting.pop(unique)
            before, self._callers.caller = self._callers.caller, caller
            resume(None)
            self._callers.caller = before


class Until:
    """See ``Arrival.until``."""

    __slots__ = ("_arrival", "_unique")

    def __init__(self, arrival: Arrival, unique: int) -> None:
        self._arrival = arrival
        self._unique = unique

    def __await__(self) -> Generator[Wait, Any, None]:
        yield self

    def begin(self, resume: Resume) -> None:
        self._arrival.wait(self._unique, resume)
