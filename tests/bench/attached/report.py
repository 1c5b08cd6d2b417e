"""What a run over several lines found: a report as of ``tests.bench.files`` for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.bench import records
from tests.bench.files.report import Report, table

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
