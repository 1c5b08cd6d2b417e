"""Each changing call is done once, however often it is asked: what is under way, and what came of it. Sans-IO.

A call is named by (share, unique). The laws:
- The same question gets the same answer, also while the first is still being worked on: then both wait for it.
- A name alone is not believed. The FUSE connection of a share that is unmounted and mounted again counts its
  requests anew, so the content of a call is compared too (``digest``); another content is another call.
- Questions that change nothing are asked of the disk again. But a lookup that is asked again has not arrived, and
  what the first answer counted is given back (``Glimpses``).

Everything here belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Generic, TypeVar
from zlib import crc32

import msgpack

from fileserver.ledger import Answer, CallKey, Intent, Ledger, Recent
from protocol.files import ListEntries, Lookup

AskerT = TypeVar("AskerT")

#: Bytes of a payload that are compared. Two writes to one place whose name, length and beginning are the same
#: are the same write; and the whole of a large one would take 1 ms.
_COMPARED: Final = 4096


def digest(op: int, arguments: object, payload: bytes | memoryview) -> int:
    """A number for the content of a call."""
    said = msgpack.packb((op, arguments, len(payload)), unicode_errors="surrogateescape")
    return crc32(payload[:_COMPARED], crc32(said))


class Verdict(Enum):
    """What is to be done about a call that has no answer yet."""

    DO = auto()  # and tell ``done``
    WAIT = auto()  # it is being done
    APART = auto()  # do it, and tell nobody: its name is taken by another that is being done


@dataclass(slots=True)
class _Running(Generic[AskerT]):
    digest: int
    askers: list[AskerT]


class Once(Generic[AskerT]):
    """Calls that change something. An asker is whatever the caller needs to send an answer."""

    def __init__(self, past: Ledger | None = None) -> None:
        """``past``: what a server that was killed has left."""
        past = past or Ledger()
        self._outcomes = past.outcomes
        self._intents: Recent[CallKey, Intent] = past.intents
        self._running: dict[CallKey, _Running[AskerT]] = {}

    def ask(self, key: CallKey, digest: int, asker: AskerT) -> Answer | Verdict:
        """The answer, if the call is done; else what to do. With ``WAIT``, ``asker`` is told by ``done``."""
        if (running := self._running.get(key)) is not None:
            if running.digest != digest:
                return Verdict.APART
            running.askers.append(asker)
            return Verdict.WAIT
        answer = self._outcomes.get(key)
        if answer is not None and answer.digest == digest:
            return answer
        self._running[key] = _Running(digest, [asker])
        return Verdict.DO

    def begun(self, key: CallKey, digest: int) -> bytes | None:
        """The precondition of a call that a killed server may have done already; None if it never began."""
        intent = self._intents.pop(key, None)
        return None if intent is None or intent.digest != digest else intent.precondition

    def done(self, key: CallKey, answer: Answer) -> list[AskerT]:
        """Remember what came of it; returns who wants to know."""
        running = self._running.pop(key)
        self._outcomes.remember(key, answer)
        return running.askers

    def dismiss(self, key: CallKey) -> None:
        """The call that ``ask`` has just given to be done will not be: it may be asked again as if it never was."""
        del self._running[key]

    def drop(self, share: int) -> None:
        """Nothing of ``share`` will be asked again. What is under way has still to be told to ``done``."""
        for table in (self._outcomes, self._intents):
            for key in [key for key in table if key[0] == share]:
                del table[key]


class Glimpses:
    """The nodes that the last lookups have counted, in case one of them is asked for again."""

    def __init__(self) -> None:
        self._seen: Recent[CallKey, tuple[Lookup | ListEntries, Sequence[int]]] = Recent()

    def remember(self, call: Lookup | ListEntries, nodes: Sequence[int]) -> None:
        self._seen.remember((call.share, call.unique), (call, nodes))

    def take(self, call: Lookup | ListEntries) -> Sequence[int]:
        """The nodes that were counted when this very question was asked before; none if it was not."""
        before, nodes = self._seen.pop((call.share, call.unique), (None, ()))
        return nodes if before == call else ()
