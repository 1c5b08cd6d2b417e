"""How something is that has just changed, told to a guest that will ask for it.

A program that waits for a change (a watcher that polls, a server that reloads itself) asks at once: for the
directory, for the name, for the file's data, one after the other, and each costs a message there and back. So what the
guest had of it before is looked up here, as if it had been asked for, and told behind ``Changed``.

The laws:
- It is read in the share's own threads, or where its calls are done at once (``prompt``), and promised as every answer
  is: what was sampled before must stand when it is sent. Calls of the guest that change something move what was
  sampled (``nodes.move``) before they are answered: so what is told behind such an answer was read after it.
- Only what the guest had is renewed, of few changes at a time (``MOST``), of small files, and no more than ``A_SECOND``
  times: who checks out another branch does not push a tree through the link that nobody looks at.
- A file that is still being written is not read: the last word is that it was closed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from fileserver.contents import Data
from fileserver.core import Outcome
from fileserver.fanotify import CLOSE_WRITE, MODIFY, OPEN
from fileserver.promises import Promise
from fileserver.retractions import Retraction
from fileserver.tree import Tree
from fileserver.watches import Changes
from fileserver.workers import WouldWait
from protocol.files import (
    ATTRIBUTES,
    NAME,
    Attributes,
    Contents,
    Entry,
    FileCall,
    Forget,
    GetAttributes,
    Lookup,
    ReadMany,
    Renewed,
)

MOST: Final = 4
"""Names, files and directories in one look at what has happened."""

A_SECOND: Final = 200
"""Of these looks. Each takes 0.2 ms, and the guest's agent as much."""

MAX_CONTENT: Final = 16 << 10
"""Bytes of a file: some 5 ms of an emulated guest's time."""


_NOT_FOUND: Final = (OSError, WouldWait)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to look up. ``names`` (directory, name) and ``files`` each with whether the guest had data of it. A file
    that has been replaced is one of them: who had opened it when the change came goes on reading it."""

    directories: list[int] = field(default_factory=list)
    names: list[tuple[int, bytes, bool]] = field(default_factory=list)
    files: list[tuple[int, bool]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: the call that would have asked, and its answer."""

    answers: list[tuple[FileCall[Any], Outcome]]


def wanted(changes: Changes, told: Retraction) -> Wanted | None:
    """What the guest, which is about to be told so, may ask for. None: nothing, or too much. In trio's thread."""
    if told.weight > 3 * MOST:
        return None
    written = {
        node for node, mask in changes.files.items() if mask & (MODIFY | OPEN) and not mask & CLOSE_WRITE
    }
    names = [
        (name.directory, name.name, name.node.base is not None)
        for name in told.names
        if name.node is not None
    ]
    files = {
        node.number: node.base is not None
        for node, _ in told.nodes
        if node not in written and (node.given or node.base is not None)
    }
    directories = [directory for directory, _ in told.directories]
    if max(len(names), len(files), len(directories)) > MOST or not (names or files or directories):
        return None
    return Wanted(directories, names, list(files.items()))


def find(tree: Tree, share: int, wanted: Wanted) -> Found:
    """Look it up. In a thread of the share's, or at once where that may be (``prompt``): all of it is small, and what
    was written a moment ago is in memory."""
    answers: list[tuple[FileCall[Any], Outcome]] = []

    def ask(call: FileCall[Any]) -> Any:
        outcome = tree.perform(call)
        answers.append((call, outcome))
        return outcome.value

    for directory in wanted.directories:
        with suppress(*_NOT_FOUND):
            ask(GetAttributes(share, 0, directory))
    for node, had_data in wanted.files:
        with suppress(*_NOT_FOUND):
            ask(GetAttributes(share, 0, node))
            if had_data:
                ask(ReadMany(share, 0, 0, [node], MAX_CONTENT))
    for directory, name, had_data in wanted.names:
        with suppress(*_NOT_FOUND):
            entry: Entry = ask(Lookup(share, 0, directory, name))
            if entry.node and had_data:
                ask(ReadMany(share, 0, directory, [entry.node], MAX_CONTENT))
    return Found(answers)


def settle(found: Found, share: int, promised: Callable[[object, Promise], int]) -> tuple[Renewed, list[int]]:
    """What of it can be told now, and nodes that were counted in vain. In trio's thread."""
    told, in_vain = Renewed(share), []
    for call, outcome in found.answers:
        result, promise = outcome.value, outcome.promise
        if isinstance(result, Contents):
            if isinstance(promise, Data) and isinstance(call, ReadMany):
                _add_contents(told, call, outcome, promise.settled(result, _bound(promised, result)))
            continue
        bits = 0 if promise is None else promised(result, promise)
        if isinstance(result, Attributes) and isinstance(call, GetAttributes):
            if bits & ATTRIBUTES and not result.stale:
                told.nodes.append(call.node)
                told.attributes.append(result.attr)
        elif isinstance(result, Entry) and isinstance(call, Lookup) and result.node:
            if bits == NAME | ATTRIBUTES and not result.stale:
                told.nodes.append(result.node)
                told.attributes.append(result.attr)
                told.parents.append(call.node)
                told.names.append(call.name)
                told.entries.append(result.node)
            else:
                in_vain.append(result.node)
    return told, in_vain


def _bound(promised: Callable[[object, Promise], int], result: object) -> Callable[[Promise], int]:
    return lambda promise: promised(result, promise)


def _add_contents(told: Renewed, call: ReadMany, outcome: Outcome, contents: Contents) -> None:
    for node, size in zip(call.nodes, contents.sizes, strict=True):
        if size >= 0:
            told.files.append(node)
            told.contents.append(bytes(outcome.payload))  # type: ignore[arg-type]  # one file, and no run


def counted(found: Found) -> list[int]:
    """The nodes of which a lookup was counted."""
    results = [outcome.value for _, outcome in found.answers]
    return [result.node for result in results if isinstance(result, Entry) and result.node]


def give_back(tree: Tree, share: int, nodes: list[int]) -> None:
    """The guest will not hear of lookups that were counted. In a thread of the share's."""
    tree.perform(Forget(share, 0, 0, nodes, [1] * len(nodes)))


class Allowance:
    """``A_SECOND`` at the most."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._left, self._since = float(A_SECOND), clock()

    def take(self) -> bool:
        """Whether there is one left, which is taken."""
        now = self._clock()
        self._left = min(float(A_SECOND), self._left + (now - self._since) * A_SECOND)
        self._since = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
