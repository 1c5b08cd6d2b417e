"""What a run found: every sample, the medians and ratios they come to, a table and a JSON file.

The law: pure. The JSON file is ``Report`` and nothing else. Values are in the unit of their row and never judged
here; a ratio is ours over the other's, so more is better for MB/s and less for us.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.bench import records
from tests.bench.tables import aligned, factor, significant

FORMAT = 1

#: The peer whose values are divided by the others'.
OURS = "agentctl"

#: Samples that differ by more than this factor make a median that is not to be relied on; the table marks it.
WIDE = 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    name: str
    unit: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one round. Either ``error`` is a clause, or ``value`` is what was measured."""

    round: int
    row: str
    peer: str
    value: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """The samples of a row on a peer: how many succeeded, and their median, least and greatest value."""

    row: str
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
    """The median of ours over the median of ``peer``."""

    row: str
    peer: str
    value: float


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run. ``environment`` says what it ran on, ``effort`` how much (``measurements.Effort``), ``procedure``
    what the numbers mean, and ``unavailable`` why a peer is missing. ``complete``: nothing failed, and time did not
    run out."""

    command: list[str]
    started: str
    seconds: float
    rounds: int
    peers: list[str]
    rows: list[Row]
    environment: dict[str, str]
    effort: dict[str, float]
    procedure: str
    unavailable: dict[str, str]
    complete: bool
    samples: list[Sample]
    cells: list[Cell] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    format: int = FORMAT


def summarize(samples: Iterable[Sample]) -> list[Cell]:
    """A cell for each row and peer with a good sample, in the order of their first."""
    values: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        if not sample.error:
            values.setdefault((sample.row, sample.peer), []).append(sample.value)
    return [
        Cell(row, peer, len(found), statistics.median(found), min(found), max(found))
        for (row, peer), found in values.items()
    ]


def compare(cells: Iterable[Cell]) -> list[Ratio]:
    """Ours over each peer, where both have a value."""
    medians = {(cell.row, cell.peer): cell.median for cell in cells}
    return [
        Ratio(row, peer, medians[row, OURS] / median)
        for (row, peer), median in medians.items()
        if peer != OURS and median > 0 and (row, OURS) in medians
    ]


def complete(report: Report) -> Report:
    """``report`` with the cells and ratios that its samples come to."""
    cells = summarize(report.samples)
    return dataclasses.replace(report, cells=cells, ratios=compare(cells))


def dump(report: Report) -> str:
    return records.dump(report)


def load(text: str) -> Report:
    """The report that ``dump`` wrote; raises ``ValueError`` for anything else."""
    return records.load(Report, text, FORMAT)


# --- the table -------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """The medians of each peer, and ours as a multiple of each of the others."""
    cells = {(cell.row, cell.peer): cell for cell in report.cells}
    ratios = {(ratio.row, ratio.peer): ratio.value for ratio in report.ratios}
    others = [peer for peer in report.peers if peer != OURS] if OURS in report.peers else []
    rows = [["", "unit", *report.peers, *(f"{OURS} / {peer}" for peer in others)]]
    for row in report.rows:
        values = [_value(cells.get((row.name, peer)), report.rounds) for peer in report.peers]
        rows.append([row.name, row.unit, *values, *(factor(ratios.get((row.name, peer))) for peer in others)])
    lines = aligned(rows)
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_footnotes(report)]) + "\n"


def _value(cell: Cell | None, rounds: int) -> str:
    if cell is None:
        return "-"
    number = f"{'~' if cell.is_wide else ''}{significant(cell.median)}"
    return number if cell.samples == rounds else f"({cell.samples}) {number}"


def _footnotes(report: Report) -> list[str]:
    notes = [
        f"medians of {report.rounds} rounds, peers interleaved" if report.cells else "nothing was measured"
    ]
    if OURS in report.peers:
        notes.append("ratios: more is better for MB/s, less for us")
    if any(cell.samples < report.rounds for cell in report.cells):
        notes.append("(n) of n samples only: it failed, or time ran out")
    if any(cell.is_wide for cell in report.cells):
        notes.append(f"~ the greatest sample was more than {WIDE:g} times the least")
    notes.append(report.procedure)
    notes.append("a sample: " + ", ".join(f"{name} {value:g}" for name, value in report.effort.items()))
    notes += [f"{peer} is missing: {reason}" for peer, reason in report.unavailable.items()]
    errors = dict.fromkeys(f"{s.row} on {s.peer}: {s.error}" for s in report.samples if s.error)
    notes += [f"failed: {error}" for error in errors]
    notes += [f"{name}: {value}" for name, value in report.environment.items()]
    return notes
