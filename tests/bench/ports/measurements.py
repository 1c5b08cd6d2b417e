"""What is measured, in which order, and how long each sample takes.

The law: the same for every peer. In each round, measurement by measurement, each peer has its turn, and who is
first changes from round to round; so all see the same weather. When time runs out nothing more is begun, and
what there is counts.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.bench.ports import client
from tests.bench.ports.client import MeasureFailed
from tests.bench.ports.report import Row, Sample

#: Samples in a row that a peer may fail before it is left alone.
MAX_FAILED = 3

QUANTILES = (("p50", 0.50), ("p99", 0.99))


@dataclass(frozen=True, slots=True)
class Effort:
    """Of one sample: seconds and megabytes of throughput, whichever are over first, exchanges on one connection,
    connections one after the other."""

    seconds: float
    megabytes: float
    exchanges: int
    connects: int

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)


NATIVE = Effort(seconds=2.0, megabytes=4000, exchanges=2000, connects=500)
#: More megabytes would only be more of the same: ``ssh -L`` takes in 150 at once, and passes on 5 a second.
EMULATED = Effort(seconds=2.5, megabytes=48, exchanges=300, connects=200)
#: For a test of the program itself.
TINY = Effort(seconds=0.05, megabytes=5, exchanges=20, connects=5)


@dataclass(frozen=True, slots=True)
class Measurement:
    """``take`` measures a port; what it returns are the values of ``rows``, in their order."""

    name: str
    rows: tuple[Row, ...]
    take: Callable[[int, Effort], list[float]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to the server: a port of this host's."""

    name: str
    port: int


def _to_guest(streams: int) -> Measurement:
    name = f"to guest x{streams}"

    def take(port: int, effort: Effort) -> list[float]:
        return [client.push(port, streams, effort.seconds, effort.bytes).rate]

    return Measurement(name, (Row(name, "MB/s"),), take)


def _from_guest(streams: int) -> Measurement:
    name = f"from guest x{streams}"

    def take(port: int, effort: Effort) -> list[float]:
        return [client.pull(port, streams, effort.seconds, effort.bytes).rate]

    return Measurement(name, (Row(name, "MB/s"),), take)


def _latency(name: str, times: Callable[[int, Effort], list[float]]) -> Measurement:
    def take(port: int, effort: Effort) -> list[float]:
        found = times(port, effort)
        return [client.percentile(found, fraction) * 1e6 for _, fraction in QUANTILES]

    return Measurement(name, tuple(Row(f"{name} {word}", "us") for word, _ in QUANTILES), take)


MEASUREMENTS = (
    _to_guest(1),
    _to_guest(8),
    _to_guest(64),
    _from_guest(1),
    _from_guest(8),
    _from_guest(64),
    _latency("round trip", lambda port, effort: client.round_trips(port, effort.exchanges)),
    _latency("connect", lambda port, effort: client.connects(port, effort.connects)),
)


def select(patterns: Sequence[str]) -> tuple[Measurement, ...]:
    """The measurements whose name matches one of ``patterns`` (shell wildcards, or a part of it); all for none."""

    def matches(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) or pattern in name for pattern in patterns)

    return tuple(each for each in MEASUREMENTS if not patterns or matches(each.name))


class Run:
    """Produces the samples. ``limit``: seconds after which nothing is begun any more."""

    def __init__(
        self,
        measurements: Sequence[Measurement],
        peers: Sequence[Peer],
        effort: Effort,
        *,
        rounds: int,
        limit: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._measurements = measurements
        self._peers = list(peers)
        self._effort = effort
        self._rounds = rounds
        self._clock = clock
        self._deadline = clock() + limit
        self._failed = dict.fromkeys((peer.name for peer in peers), 0)
        self.out_of_time = False

    def samples(self) -> Iterator[Sample]:
        """Every sample as it is taken."""
        for number in range(1, self._rounds + 1):
            by = (number - 1) % max(1, len(self._peers))
            for measurement in self._measurements:
                for peer in [*self._peers[by:], *self._peers[:by]]:
                    if self._clock() > self._deadline:
                        self.out_of_time = True
                        return
                    if self._failed[peer.name] < MAX_FAILED:
                        yield from self._take(number, measurement, peer)

    def _take(self, number: int, measurement: Measurement, peer: Peer) -> Iterator[Sample]:
        try:
            values = measurement.take(peer.port, self._effort)
        except MeasureFailed as error:
            self._failed[peer.name] += 1
            yield Sample(number, measurement.rows[0].name, peer.name, error=str(error))
            return
        self._failed[peer.name] = 0
        for row, value in zip(measurement.rows, values, strict=True):
            yield Sample(number, row.name, peer.name, value)
