"""What a run found: every sample, the medians and ratios they come to, a table and a JSON file.

The law: pure. The JSON file is ``Report`` and nothing else; ``load`` refuses what is not one, so that whoever
compares two runs can trust their fields. Times are in seconds and never judged here.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.bench import records
from tests.bench.tables import aligned, factor, significant

FORMAT = 2

#: The peer whose times are divided by the others'.
OURS = "agentctl"

#: Samples that differ by more than this factor make a median that is not to be relied on; the table marks it.
WIDE = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run. Either ``error`` is a sentence, or ``seconds`` and ``count`` are what came of it."""

    round: int
    workload: str
    peer: str
    seconds: float = 0.0
    count: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """The samples of a workload on a peer: how many succeeded, and their median, least and greatest seconds."""

    workload: str
    peer: str
    samples: int
    median: float
    least: float
    greatest: float

    @property
    def is_wide(self) -> bool:
        return self.greatest > WIDE * self.least


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of ours over the median of ``peer``: below 1, ours is faster."""

    workload: str
    peer: str
    value: float


@dataclass(frozen=True, slots=True)
class Freshness:
    """How long ``edits`` on the host took until they were seen through ``peer``: seconds, give or take ``doubt``. If not all
    were measured, ``error`` is a sentence."""

    peer: str
    edits: int
    p50: float = 0.0
    p99: float = 0.0
    worst: float = 0.0
    doubt: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run. ``environment`` says what it ran on, ``sizes`` how much (``trees.Sizes``), ``procedure`` how,
    and ``unavailable`` why a peer is missing. ``complete``: nothing failed, and time did not run out."""

    command: list[str]
    started: str
    seconds: float
    rounds: int
    peers: list[str]
    workloads: list[str]
    environment: dict[str, str]
    sizes: dict[str, int]
    procedure: str
    unavailable: dict[str, str]
    complete: bool
    samples: list[Sample]
    freshness: list[Freshness] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    format: int = FORMAT


def summarize(samples: Iterable[Sample]) -> list[Cell]:
    """A cell for each workload and peer with a good sample, in the order of their first."""
    times: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        if not sample.error:
            times.setdefault((sample.workload, sample.peer), []).append(sample.seconds)
    return [
        Cell(workload, peer, len(found), statistics.median(found), min(found), max(found))
        for (workload, peer), found in times.items()
    ]


def compare(cells: Iterable[Cell]) -> list[Ratio]:
    """Ours over each peer, where both have a time. A time of zero has no ratio."""
    medians = {(cell.workload, cell.peer): cell.median for cell in cells}
    return [
        Ratio(workload, peer, medians[workload, OURS] / median)
        for (workload, peer), median in medians.items()
        if peer != OURS and median > 0 and (workload, OURS) in medians
    ]


def complete(report: Report) -> Report:
    """``report`` with the cells and ratios that its samples come to."""
    cells = summarize(report.samples)
    return dataclasses.replace(report, cells=cells, ratios=compare(cells))


def disagreements(samples: Sequence[Sample]) -> list[Sample]:
    """The good samples whose count is not that of the first good sample of their workload."""
    expected: dict[str, int] = {}
    good = [sample for sample in samples if not sample.error]
    for sample in good:
        expected.setdefault(sample.workload, sample.count)
    return [sample for sample in good if sample.count != expected[sample.workload]]


# --- JSON ------------------------------------------------------------------------------------------


def dump(report: Report) -> str:
    return records.dump(report)


def load(text: str) -> Report:
    """The report that ``dump`` wrote; raises ``ValueError`` for anything else."""
    return records.load(Report, text, FORMAT)


# --- the table -------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Seconds (medians) of each peer, and ours as a multiple of each of the others."""
    cells = {(cell.workload, cell.peer): cell for cell in report.cells}
    ratios = {(ratio.workload, ratio.peer): ratio.value for ratio in report.ratios}
    others = [peer for peer in report.peers if peer != OURS] if OURS in report.peers else []
    rows = [["seconds", *report.peers, *(f"{OURS} / {peer}" for peer in others)]]
    for workload in report.workloads:
        times = [_seconds(cells.get((workload, peer)), report.rounds) for peer in report.peers]
        rows.append([workload, *times, *(factor(ratios.get((workload, peer))) for peer in others)])
    lines = aligned(rows)
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_arrivals(report), *_footnotes(report)]) + "\n"


def _arrivals(report: Report) -> list[str]:
    """When edits of the host were seen, in milliseconds."""
    found = [one for one in report.freshness if not one.error]
    if not found:
        return []
    rows = [["an edit is seen after, ms", "p50", "p99", "worst", "edits", "give or take"]]
    for one in found:
        times = (significant(seconds * 1000) for seconds in (one.p50, one.p99, one.worst))
        rows.append([one.peer, *times, f"{one.edits:,}", significant(one.doubt * 1000)])
    lines = aligned(rows)
    return [lines[0], "-" * len(lines[0]), *lines[1:], ""]


def _seconds(cell: Cell | None, rounds: int) -> str:
    if cell is None:
        return "-"
    number = f"{'~' if cell.is_wide else ''}{significant(cell.median)}"
    return number if cell.samples == rounds else f"({cell.samples}) {number}"


def _footnotes(report: Report) -> list[str]:
    notes = [f"medians of {report.rounds} rounds, peers interleaved" if report.cells else "nothing was timed"]
    if any(cell.samples < report.rounds for cell in report.cells):
        notes.append("(n) of n samples only: it failed, time ran out, or it was too slow to be repeated")
    if any(cell.is_wide for cell in report.cells):
        notes.append(f"~ the slowest sample took more than {WIDE:g} times as long as the fastest")
    notes.append(report.procedure)
    notes.append("sizes: " + ", ".join(f"{name} {value:,}" for name, value in report.sizes.items()))
    notes += [f"{peer} is missing: {reason}" for peer, reason in report.unavailable.items()]
    errors = dict.fromkeys(f"{s.workload} on {s.peer}: {s.error}" for s in report.samples if s.error)
    notes += [f"failed: {error}" for error in errors]
    notes += [f"failed: edits on {one.peer}: {one.error}" for one in report.freshness if one.error]
    notes += [
        f"wrong: {s.workload} on {s.peer} counted {s.count}, unlike the others"
        for s in disagreements(report.samples)
    ]
    notes += [f"{name}: {value}" for name, value in report.environment.items()]
    return notes
