"""What a run over several lines found: a report as of ``tests.bench.files`` for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.bench import records
from tests.bench.files.report import OURS, Report, table
from tests.bench.tables import factor, significant

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Line:
    """``round_trip``: seconds that it adds to one, half of them each way."""

    round_trip: float
    report: Report


@dataclass(frozen=True, slots=True)
class Attached:
    lines: list[Line]
    format: int = FORMAT


def dump(found: Attached) -> str:
    return records.dump(found)


def load(text: str) -> Attached:
    """What ``dump`` wrote; raises ``ValueError`` for anything else."""
    return records.load(Attached, text, FORMAT)


def tables(lines: Iterable[Line]) -> str:
    return "\n".join(
        f"--- round trip {line.round_trip * 1000:g} ms ({line.round_trip * 500:g} ms each way)\n{table(line.report)}"
        for line in lines
    )


def markdown(found: Attached) -> str:
    """The table of ``docs/benchmarks.md``: medians of all lines side by side, and when edits were seen."""
    cells = {
        (line.round_trip, cell.workload, cell.peer): cell.median
        for line in found.lines
        for cell in line.report.cells
    }
    ratios = {
        (line.round_trip, ratio.workload, ratio.peer): ratio.value
        for line in found.lines
        for ratio in line.report.ratios
    }
    columns = [(line.round_trip, peer) for line in found.lines for peer in line.report.peers]
    head = ["seconds"]
    for round_trip, peer in columns:
        head.append(f"{peer}, {round_trip * 1000:g} ms")
        head += [f"/ {peer}"] if peer != OURS else []
    rows = [head, ["---"] * len(head)]
    for workload in dict.fromkeys(name for line in found.lines for name in line.report.workloads):
        row = [workload]
        for round_trip, peer in columns:
            median = cells.get((round_trip, workload, peer))
            row.append("-" if median is None else significant(median))
            row += [factor(ratios.get((round_trip, workload, peer)))] if peer != OURS else []
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines[1] = lines[1].replace(" ", "")
    return "\n".join([*lines, "", *_edits(found.lines)]) + "\n"


def _edits(lines: Iterable[Line]) -> Iterable[str]:
    for line in lines:
        seen = ", ".join(
            f"{one.peer} {significant(one.p50 * 1000)} and {significant(one.p99 * 1000)}"
            for one in line.report.freshness
            if not one.error
        )
        if seen:
            yield f"An edit is seen after, in ms, at {line.round_trip * 1000:g} ms (p50 and p99): {seen}."
