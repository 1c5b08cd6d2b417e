"""The order of a run: rounds, in each the workloads, in each the peers, so that all see the same weather.

The law: peers are compared within minutes of each other, never one after the other. In every round each peer
gets a fresh mount; then, group by group, each peer in turn runs the workloads of the group (``workloads.GROUPS``).
Who is first changes from round to round. When time runs out nothing more is begun, and what there is counts.
The same rule for all: what has taken a peer ``patience`` seconds in all is not repeated any more, since what is
a hundred times too slow is known well enough after one sample.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.bench.files.driver import Answer
from tests.bench.files.report import Sample
from tests.bench.files.workloads import GROUPS, Request, Workload

#: The slowest sample that is any use; sshfs in emulation takes 20 s for its worst.
SAMPLE_TIMEOUT = 150.0

#: Samples in a row that a peer may lose before it is left alone.
MAX_LOST = 3


class PeerFailed(Exception):
    """A peer could not be mounted; the message is a sentence."""


class Peer(Protocol):
    """A way to get at the files. ``common`` and ``own`` are where they are for the driver."""

    name: str
    common: str
    own: str

    def mount(self) -> None:
        """Mount it, anew if it is mounted; raises ``PeerFailed``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. ``guest`` is the local directory for copies, ``drop`` whether caches may be dropped,
    ``limit`` the seconds after which nothing is begun any more, ``patience`` those for one workload on one peer
    (with what is not timed)."""

    rounds: int
    workloads: tuple[str, ...]
    guest: str
    drop: bool
    limit: float
    patience: float = math.inf


def select(patterns: Sequence[str]) -> tuple[str, ...]:
    """The workloads that match one of ``patterns`` (shell wildcards, or a word of the name); all for none."""
    names = [workload.name for group in GROUPS for workload in group]

    def matches(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) or pattern in name.split() for pattern in patterns)

    return tuple(name for name in names if not patterns or matches(name))


def rotated(peers: Sequence[Peer], by: int) -> list[Peer]:
    by %= max(1, len(peers))
    return [*peers[by:], *peers[:by]]


class Run:
    """Produces the samples of a plan. ``ask`` is the driver's; ``say`` is told what goes on."""

    def __init__(
        self,
        plan: Plan,
        peers: Sequence[Peer],
        ask: Callable[[Request, float], Answer],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._peers = list(peers)
        self._ask = ask
        self._say = say
        self._clock = clock
        self._deadline = clock() + plan.limit
        self._lost: dict[str, int] = {}
        self._spent: dict[tuple[str, str], float] = {}
        self.out_of_time = False

    def samples(self) -> Iterator[Sample]:
        """Every sample as it is taken."""
        for number in range(1, self._plan.rounds + 1):
            peers = rotated(self._peers, number - 1)
            self._say(f"round {number} of {self._plan.rounds}: {', '.join(peer.name for peer in peers)}")
            yield from self._round(number, peers)

    def _round(self, number: int, peers: list[Peer]) -> Iterator[Sample]:
        mounted = []
        for peer in peers:
            if self._is_late():
                return
            try:
                peer.mount()
            except PeerFailed as error:
                yield Sample(number, "mount", peer.name, error=str(error))
            else:
                mounted.append(peer)
        for group in GROUPS:
            chosen = [workload for workload in group if workload.name in self._plan.workloads]
            for peer in mounted:
                yield from self._group(number, peer, chosen)

    def _group(self, number: int, peer: Peer, group: list[Workload]) -> Iterator[Sample]:
        warmed = False
        for workload in group:
            if self._is_late() or self._lost.get(peer.name, 0) >= MAX_LOST:
                return
            spent = self._spent.get((workload.name, peer.name), 0.0)
            if spent > self._plan.patience:
                continue
            started = self._clock()
            answer = self._ask(self._request(peer, workload, warmed=warmed), SAMPLE_TIMEOUT)
            self._spent[workload.name, peer.name] = spent + self._clock() - started
            self._lost[peer.name] = self._lost.get(peer.name, 0) + 1 if answer.error else 0
            warmed = True
            yield Sample(number, workload.name, peer.name, answer.seconds, answer.count, answer.error)

    def _request(self, peer: Peer, workload: Workload, *, warmed: bool) -> Request:
        """``warmed``: another workload of its group has just run. Else what is to be warm is run untimed before."""
        return Request(
            workload=workload.name,
            common=peer.common,
            own=peer.own,
            guest=self._plan.guest,
            drop=self._plan.drop,
            warm_up=workload.warm and not warmed,
        )

    def _is_late(self) -> bool:
        self.out_of_time = self.out_of_time or self._clock() > self._deadline
        return self.out_of_time
